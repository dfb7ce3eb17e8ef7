"""The ranks of a run and what they agree on. Control words travel over gloo on the CPU, so that agreeing never waits for a GPU.

It knows nothing of models. One process is one rank, opens no socket and talks to nobody.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import distributed

from potstill.errors import StorageError

T = TypeVar("T")


def launched_ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun or `accelerate launch` set them; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def stay_on_this_machine() -> None:
    """Binds the ranks' own sockets to the loopback interface where all of them run on this machine, unless told otherwise.

    Call it before the process group is made.
    """
    world_size = launched_ranks()[1]
    if world_size == 1 or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != world_size:
        return
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


class Ranks:
    """The processes of the initialised process group, or this one alone."""

    def __init__(self):
        self.together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.rank = distributed.get_rank() if self.together else 0
        self.world_size = distributed.get_world_size() if self.together else 1
        self._group: distributed.ProcessGroup | None = None
        if self.together and distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo")  # type: ignore[assignment]

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Element by element over the ranks, in float64: exact for counts below 2**53."""
        return self._reduce(numbers, distributed.ReduceOp.SUM)

    def largest(self, numbers: Sequence[float]) -> list[float]:
        return self._reduce(numbers, distributed.ReduceOp.MAX)

    def _reduce(self, numbers: Sequence[float], operation: distributed.ReduceOp.RedOpType) -> list[float]:
        if not self.together:
            return list(numbers)
        tensor = torch.tensor(list(numbers), dtype=torch.float64)
        distributed.all_reduce(tensor, operation, group=self._group)
        return tensor.tolist()

    def gather(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The one-dimensional int64 or float64 array of each rank, in their order; lengths may differ, dtypes not."""
        if not self.together:
            return [numbers]
        longest = int(self.largest([len(numbers)])[0])
        padded = torch.zeros(longest + 1, dtype=torch.from_numpy(numbers).dtype)
        padded[0], padded[1 : len(numbers) + 1] = len(numbers), torch.from_numpy(numbers)
        every = [torch.empty_like(padded) for _ in range(self.world_size)]
        distributed.all_gather(every, padded, group=self._group)
        return [part[1 : int(part[0]) + 1].numpy() for part in every]

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest([0])

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Runs `action` on the first rank while the others wait. A failure there is raised on every rank, so that none hangs."""
        result, failure = None, None
        if self.first:
            try:
                result = action()
            except Exception as error:
                failure = error
        if self.largest([failure is not None])[0]:
            raise failure if failure is not None else StorageError("the first rank failed; its message says why")
        return result
