"""Checkpoints: a training state on disk that is whole or is not there, in safetensors and JSON, without pickle.

A checkpoint counts once its manifest is committed. Torn ones are named and passed over; old ones go only after a newer one is
committed. What the state means is for state.py and the trainer to know.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from potstill import storage
from potstill.cache.provenance import Provenance
from potstill.errors import IncompatibleError, StorageError

NUMBERS = "state.json"
BYTES_PER_FILE = 2**30  # a file is held in memory once while it is written or verified
_FOLDER = re.compile(r"step-(\d{8,})\Z")
_FILE = re.compile(r"([A-Za-z0-9_]+)-\d{5}\.safetensors\Z")


@dataclass
class CheckpointState:
    """`tensors[group][name]` (weights, optimizer, random_0, ...) and `numbers`, all JSON.

    Group names are letters, digits and underscores. Integers and finite floats come back exactly.
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for group in self.tensors.values() for tensor in group.values())


@dataclass(frozen=True)
class Found:
    """The newest committed checkpoint of a folder (None if there is none), and the newer ones that do not read, with the reason."""

    path: Path | None
    step: int
    torn: tuple[str, ...]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that is named like a checkpoint, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(((int(match[1]), path) for path in entries if (match := _FOLDER.match(path.name))), reverse=True)


def _files(group: str, tensors: Mapping[str, Tensor], bytes_per_file: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Splits a group into files of bounded size; a larger tensor gets a file of its own. An empty group is one empty file."""
    number, size, part = 0, 0, {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage_pointer = tensor.untyped_storage().data_ptr()
        if storage_pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        seen.add(storage_pointer)
        if part and size + tensor.nbytes > bytes_per_file:
            yield f"{group}-{number:05d}.safetensors", part
            number, size, part = number + 1, 0, {}
        part[name] = tensor
        size += tensor.nbytes
    yield f"{group}-{number:05d}.safetensors", part


def save_checkpoint(
    folder: Path, step: int, state: CheckpointState, *, keep: int, best: int | None = None, bytes_per_file: int = BYTES_PER_FILE
) -> Path:
    """Commits the state of optimizer step `step`, then deletes all but the newest `keep` checkpoints and the one of step `best`.

    Raises StorageError naming path and bytes needed when the disk is full; every former checkpoint is then still there.
    """
    final = checkpoint_path(folder, step)
    numbers = storage.to_json(state.numbers, indent=1)
    bytes_needed = state.num_bytes + len(numbers) + 2**16
    storage.require_free(final, bytes_needed)

    def write(unfinished: Path) -> None:
        for group, tensors in state.tensors.items():
            for name, part in _files(group, tensors, bytes_per_file):
                storage.write_tensors(unfinished / name, part)
        storage.write_text(unfinished / NUMBERS, numbers)

    # A checkpoint of this very step can be there already, torn: the run passed it over and came here again.
    storage.commit_folder(final, write, facts={"step": step}, replace=True, bytes_needed=bytes_needed)
    rotate(folder, keep=keep, best=best)
    return final


def rotate(folder: Path, *, keep: int, best: int | None = None) -> list[Path]:
    """Deletes committed checkpoints beyond the newest `keep` (at least one stays) and `best`, and torn ones older than the newest.

    Returns what was deleted. Only what is committed counts among the kept.
    """
    committed, doomed = [], []
    for step, path in _steps(folder):
        if storage.verify_folder(path, contents=False):
            if committed:
                doomed.append(path)
        elif len(committed) < max(keep, 1) or step == best:
            committed.append(path)
        else:
            doomed.append(path)
    for path in reversed(doomed):
        storage.remove(path)
    return doomed


def latest_checkpoint(folder: Path) -> Found:
    """Finds the newest checkpoint whose every byte is as it was written."""
    torn = []
    for step, path in _steps(folder):
        problems = storage.verify_folder(path)
        if not problems:
            return Found(path, step, tuple(torn))
        torn.append(f"{path.name}: {problems[0]}")
    return Found(None, 0, tuple(torn))


def load_checkpoint(path: Path) -> CheckpointState:
    """Reads a committed checkpoint, every byte compared with its manifest. Raises StorageError if one differs."""
    manifest = storage.read_manifest(path)
    state = CheckpointState(numbers=storage.read_json(path, NUMBERS))
    for name in sorted(manifest.files):
        if match := _FILE.match(name):
            state.tensors.setdefault(match[1], {}).update(storage.read_tensors(path, name))
        elif name != NUMBERS:
            raise StorageError(f"{path / name}: not a file of a checkpoint")
    return state


def refuse_other(recorded: Mapping[str, Any], now: Mapping[str, Any], overridden: Collection[str] = ()) -> None:
    """Compares fingerprints (of data, tokenizer, teacher ...) with those of the run. Raises IncompatibleError naming what differs.

    Measured numbers, which a fingerprint marks by a tolerance, may differ by it. A fingerprint under the name of a recipe's key may
    differ where that key is `overridden`.
    """
    for name in sorted((recorded.keys() | now.keys()) - set(overridden)):
        regardless = f", or go on regardless with --override-resume {name}" if "." in name and " " not in name else ""
        if Provenance({name: recorded.get(name)}).differences(Provenance({name: now.get(name)})):
            raise IncompatibleError(
                f"checkpoint: this run began with another {name} ({json.dumps(recorded.get(name))}, now {json.dumps(now.get(name))}); "
                f"restore it, or --fresh starts over{regardless}"
            )
