"""vLLM's own weight transfer: the server's workers are told the names and shapes, and receive the tensors over NCCL, in place.

Workers and sender meet in NCCL's calls, so the HTTP request that receives is under way while the tensors are sent.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from potstill.errors import OutageError
from potstill.models.causal_lm import CausalLM
from potstill.models.merging import checkpoint_weights
from potstill.rollouts.nccl import Sender
from potstill.rollouts.vllm_asking import Asker
from potstill.rollouts.vllm_weights import weight_version
from potstill.serving.endpoint import Unanswered, Unbelievable
from potstill.serving.loop import Loop
from potstill.serving.strict_json import integer


class Line(Protocol):
    """What tensors are sent through: `nccl.Sender`."""

    @property
    def unique_id(self) -> str: ...

    def join(self, world_size: int) -> None: ...

    def send(self, tensor: Tensor) -> None: ...

    def finish(self) -> None: ...

    def close(self, *, broken: bool = False) -> None: ...


class PushWeights:
    """The connection is made at the first sending, and again where it broke. `dial` makes the line on the student's device."""

    def __init__(self, student: CausalLM, asker: Asker, loop: Loop, dial: Callable[[torch.device], Line] = Sender):
        self._student, self._asker, self._loop, self._dial = student, asker, loop, dial
        self._line: Line | None = None

    def send(self, tag: str, *, first: bool) -> None:
        weights = checkpoint_weights(self._student.inner)
        if not first:
            return
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        if self._student.device.type == "cuda":  # another thread sends them, on a stream of its own
            torch.cuda.synchronize(self._student.device)
        try:
            self._loop.run(self._sent(weights, tag))
        except BaseException:
            self._hang_up(broken=True)
            raise

    async def _sent(self, weights: Mapping[str, Tensor], tag: str) -> None:
        try:
            await self._send_once(weights, tag)
        except (Unanswered, Unbelievable):
            # The server may have been started again, and then knows nothing of the line.
            self._hang_up(broken=True)
            await self._asker.pool.ask(self._asker.names)
            try:
                await self._send_once(weights, tag)
            except (Unanswered, Unbelievable) as error:
                raise OutageError(
                    f"{self._asker.service.url} has not taken the student's weights (push), twice: {error}. Look into the server's log; "
                    "everything committed stays: run the same command again to go on"
                ) from None

    async def _send_once(self, weights: Mapping[str, Tensor], tag: str) -> None:
        line = self._line or await self._connected()
        await self._asker.call_once("/start_weight_update")
        names = list(weights)
        description = {
            "names": names, "dtype_names": [str(weights[name].dtype).removeprefix("torch.") for name in names],
            "shapes": [list(weights[name].shape) for name in names],
        }  # fmt: skip

        def send_all() -> None:
            for name in names:
                line.send(weights[name])

        await self._beside("/update_weights", {"update_info": description}, send_all)
        line.finish()
        await self._asker.call_once("/finish_weight_update", {"weight_version": tag})

    async def _connected(self) -> Line:
        """The workers are ranks 1 and up of the group; each process of the server is one."""
        found = (await self._asker.fetch("/get_world_size")).get("world_size")
        workers = integer(found, "world_size")
        line = self._dial(self._student.device)
        self._line = line
        about = {"rank_offset": 1, "world_size": workers + 1, "nccl_unique_id_b64": line.unique_id, "packed": False}
        await self._beside("/init_weight_transfer_engine", {"init_info": about}, lambda: line.join(workers + 1))
        return line

    async def _beside(self, path: str, body: dict, work: Callable[[], None]) -> None:
        """The request and our half of it at once. Where the server refuses, our half is not waited for: nobody would come."""
        asked = asyncio.ensure_future(self._asker.call_once(path, body))
        half = _in_thread(work)
        done, _ = await asyncio.wait({asked, half}, return_when=asyncio.FIRST_EXCEPTION)
        for one in (asked, half):
            if one in done and one.exception() is not None:
                (half if one is asked else asked).cancel()
                one.result()
        await asyncio.gather(asked, half)

    def adopt(self, tag: str) -> None:
        """The name stays."""

    def is_there(self, tag: str) -> bool:
        return weight_version(self._asker, self._loop) == tag

    def _hang_up(self, *, broken: bool) -> None:
        if self._line is not None:
            self._line.close(broken=broken)
            self._line = None

    def close(self) -> None:
        self._hang_up(broken=False)


def _in_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """What waits in a library cannot be cancelled: its thread is a daemon, so that it keeps no process from leaving."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        failure = None
        try:
            work()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, failure)

    threading.Thread(target=run, name="potstill-push", daemon=True).start()
    return ended
