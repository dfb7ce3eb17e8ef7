"""How a vLLM server comes to the student's weights: never, as an adapter, or from a folder; push stands in vllm_push.py.

Where parameters are sharded every rank calls `send`, and the first one talks to the server. Each way can say whether the server still
has what it was sent: one that was started again has not.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from peft import PeftModel
from transformers.utils import logging

from potstill import storage
from potstill.errors import IncompatibleError, ServerError
from potstill.models.causal_lm import CausalLM
from potstill.models.export import adapter_weights, write_adapter, write_plain
from potstill.models.merging import merged_weights
from potstill.rollouts.vllm_asking import Asker
from potstill.serving.loop import Loop

NO_SUCH_PATH = {
    "/v1/load_lora_adapter": "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and with --enable-lora",
    "/collective_rpc": "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment, and let nobody else reach it",
    "/init_weight_transfer_engine": "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment and with --weight-transfer-config "
    "'{\"backend\": \"nccl\"}', and let nobody else reach it",
}  # fmt: skip
for _path in ("/get_world_size", "/weight_info", "/update_weight_version"):
    NO_SUCH_PATH[_path] = NO_SUCH_PATH["/init_weight_transfer_engine" if _path == "/get_world_size" else "/collective_rpc"]


class Weights(Protocol):
    """One way. `tag` names what is sent: no two sendings have the same."""

    def send(self, tag: str, *, first: bool) -> None:
        """The student's weights of this moment. Every rank calls it; the `first` one sends."""
        ...

    def adopt(self, tag: str) -> None:
        """What the others do when the first has sent: ask under the new name."""
        ...

    def is_there(self, tag: str) -> bool:
        """Whether the server writes with what was sent under this tag."""
        ...

    def close(self) -> None: ...


class AdapterWeights:
    """peft's files, loaded under a new name each time, so that no key or value of an older adapter is used again.

    vLLM's own reloading in place is not used: it reads the files again with every request, and keeps the prefixes of former weights.
    """

    def __init__(self, student: CausalLM, folder: Path, asker: Asker, loop: Loop):
        if not isinstance(student.model, PeftModel):
            raise IncompatibleError(
                f"rollouts.generator.weights: adapter sends a LoRA adapter, and the student {student.name} has none; add student.lora, or "
                "use reload or push"
            )
        self._student, self._folder, self._asker, self._loop = student, folder, asker, loop
        self._former: str | None = None

    def _named(self, tag: str) -> str:
        return f"{self._asker.served}-{tag}"

    def send(self, tag: str, *, first: bool) -> None:
        model = self._student.model
        assert isinstance(model, PeftModel)
        weights = adapter_weights(model)
        if not first:
            return
        storage.make_folder(self._folder)
        target = self._folder / "adapter"
        storage.commit_folder(target, lambda at: write_adapter(model, self._student.inner, weights, at), replace=True)
        self._loop.run(self._load(self._named(tag), str(target.resolve())))
        self._former = self._named(tag)

    async def _load(self, name: str, path: str) -> None:
        asker = self._asker
        try:
            await asker.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except ServerError:  # also what a second try is told, where the answer to the first was lost
            if name not in await asker.pool.ask(asker.names):
                raise
        if self._former is not None and self._former in await asker.pool.ask(asker.names):
            await asker.call("/v1/unload_lora_adapter", {"lora_name": self._former})

    def adopt(self, tag: str) -> None:
        self._asker.model = self._named(tag)

    def is_there(self, tag: str) -> bool:
        return self._named(tag) in self._loop.run(self._asker.pool.ask(self._asker.names))

    def close(self) -> None:
        _clear(self._folder, "adapter")


class ReloadWeights:
    """A whole model in safetensors, an adapter merged into it, that the server's workers read again in place."""

    def __init__(self, student: CausalLM, folder: Path, asker: Asker, loop: Loop):
        self._student, self._folder, self._asker, self._loop = student, folder, asker, loop

    def send(self, tag: str, *, first: bool) -> None:
        inner = self._student.inner
        weights = merged_weights(inner, inner.dtype, keep=first)
        if not first:
            return
        storage.make_folder(self._folder)
        target, size = self._folder / "student", sum(tensor.nbytes for tensor in weights.values())
        storage.require_free(self._folder, size)
        generation = copy.deepcopy(inner.generation_config)
        with _without_bars():
            storage.commit_folder(target, lambda at: write_plain(inner, weights, generation, at), replace=True, bytes_needed=size)
        self._loop.run(self._reload(str(target.resolve()), tag))

    async def _reload(self, path: str, tag: str) -> None:
        await self._asker.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        await self._asker.call("/reset_prefix_cache")
        await self._asker.call("/update_weight_version", {"new_version": tag})

    def adopt(self, tag: str) -> None:
        """The name stays."""

    def is_there(self, tag: str) -> bool:
        return weight_version(self._asker, self._loop) == tag

    def close(self) -> None:
        _clear(self._folder, "student")


def _clear(folder: Path, name: str) -> None:
    """What was sent, and the folder where nothing else is in it."""
    storage.remove(folder / name)
    if folder.is_dir() and not any(folder.iterdir()):
        storage.remove(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for every file that it writes, and here it writes again and again."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def weight_version(asker: Asker, loop: Loop) -> str | None:
    found = loop.run(asker.fetch("/weight_info")).get("weight_version")
    return found if isinstance(found, str) else None


def hint(path: str, status: int, said: str, section: str) -> str:
    """What to do about a refusal."""
    if status in (401, 403):
        return f"check the key: {section}.api_key_env or {section}.api_key_file"
    if status == 404:
        return NO_SUCH_PATH.get(path, f"check {section}.url and {section}.model")
    if "rank" in said and path == "/v1/load_lora_adapter":
        return "start vLLM with a --max-lora-rank that holds the student's student.lora.rank"
    return ""
