"""How the fused loss is executed: how many rows at once, and whether the elementwise part is compiled.

Two sizes, because two costs pull apart: the head's gradient is cheapest in few large groups of rows (each further group reads and
writes a tensor as large as the head), while the teacher's logits need never exist for more than a slice of a group. A third, the
block, keeps the elementwise part inside the cache where it is not compiled.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from potstill.objectives.plan import Plan
from potstill.objectives.tile import tile_step
from potstill.objectives.tile_parts import Finish, TileInput

_MIB = 2**20
# Elements of one elementwise block: its handful of float32 temporaries then stays inside the cache of one core.
_BLOCK = 2**17
# Where a block makes no temporaries as wide as the vocabulary, its many small steps weigh more than the cache.
_SPARSE_BLOCK = 2**19
# Rows of a compiled block on a GPU: enough to fill it at any vocabulary.
_COMPILED_ROWS = 256


@dataclass(frozen=True)
class Execution:
    """`compile` fuses the elementwise part with torch.compile: seconds once, then less time in each step. Sizes are in rows.

    "auto" compiles on a CUDA device and nowhere else: whoever knows that a run is long says "on".
    """

    compile: Literal["auto", "on", "off"] = "auto"
    group_rows: int | None = None
    slice_rows: int | None = None
    block_rows: int | None = None

    def compiles(self, device: torch.device) -> bool:
        return self.compile == "on" or (self.compile == "auto" and device.type == "cuda")


@dataclass(frozen=True)
class Sizes:
    """Rows of one gradient product, of one logits product, of one elementwise block."""

    group: int
    slice: int
    block: int


def choose_sizes(
    execution: Execution, num_rows: int, vocabulary: int, width: int, itemsize: int, *, head_gradient: bool, device: torch.device,
    sparse: bool = False, live: bool = True,
) -> Sizes:
    """Sizes for one call, deterministic in its arguments. `sparse`: few outcomes a row; `live`: the teacher's logits are made here."""
    row_bytes = vocabulary * itemsize
    cuda = device.type == "cuda"
    # A tile as large as the head's own gradient, which must exist in any case, is the natural size; never less than a good product
    # needs. Beside a record, which takes no memory, half of that is as fast.
    share = 1 if live or not sparse else 2
    group = max(64 * _MIB // (row_bytes * share), width // share if head_gradient else 0, 64)
    group = min(group, max(512 * _MIB // row_bytes, 64))
    group = _evened(num_rows, max(1, min(execution.group_rows or group, num_rows)))
    # Narrow products waste the processor, wide ones memory: a live teacher gets half of the student's rows.
    part = max(group // 2, 1) if live else group
    part = _evened(group, max(1, min(execution.slice_rows or part, group)))
    block = max(1, (_SPARSE_BLOCK if sparse else _BLOCK) // vocabulary)
    if cuda:
        # A compiled tile is compiled anew for every number of rows, and batches differ in theirs.
        block = min(_COMPILED_ROWS, 1 << (part.bit_length() - 1)) if execution.compiles(device) else part
    return Sizes(group, part, max(1, min(execution.block_rows or block, part)))


def _evened(num_rows: int, size: int) -> int:
    """The size of as many equal parts as `size` would make: a last small part costs a product of its own and saves no memory."""
    return -(-num_rows // -(-num_rows // size)) if num_rows else size


@lru_cache(maxsize=64)
def compiled_step(plan: Plan, finishes: tuple[Finish, Finish], training: bool, details: bool):
    """A compiled tile for one plan. Row counts are static: whoever calls it does so with blocks of one size."""

    def step(linear: torch.Tensor, rows: TileInput):
        return tile_step(plan, finishes, linear, rows, training=training, details=details)

    return torch.compile(step, dynamic=False)
