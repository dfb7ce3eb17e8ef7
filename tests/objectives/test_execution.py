"""Sizes of groups, slices and blocks: they cover every row, stay within their bounds, and a compiled block has few shapes."""

import pytest
import torch

from potstill.objectives.execution import Execution, choose_sizes

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("kind", [{}, {"sparse": True, "live": False}, {"sparse": True}], ids=["whole", "record", "cut down"])
@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize(("vocabulary", "width", "itemsize"), [(320, 32, 4), (32_000, 512, 4), (128_256, 2048, 2)])
def test_a_block_is_within_a_slice_and_a_slice_within_a_group(vocabulary, width, itemsize, compile, device, kind):
    execution = Execution(compile=compile)
    for num_rows in (0, 1, 2, 7, 100, 2048, 5000):
        sizes = choose_sizes(execution, num_rows, vocabulary, width, itemsize, head_gradient=True, device=device, **kind)
        assert 1 <= sizes.block <= sizes.slice <= sizes.group <= max(num_rows, 1)


@pytest.mark.parametrize("kind", [{}, {"sparse": True, "live": False}], ids=["whole", "record"])
@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_batches_of_any_length_need_few_compiled_shapes(device, kind):
    """torch.compile gives up after eight; validation and training have shapes of their own."""
    for vocabulary, width in ((32_000, 512), (128_256, 2048), (151_936, 896)):
        chosen = [
            choose_sizes(Execution(compile="on"), num_rows, vocabulary, width, 2, head_gradient=True, device=device, **kind).block
            for num_rows in range(500, 9000, 7)
        ]
        assert len(set(chosen)) <= 3


def test_a_record_needs_half_of_the_usual_tile_and_no_room_for_a_teacher():
    """What the goal of memory allows at 2048 rows of 32,000: the head's gradient, this tile, and little else."""
    of_record = choose_sizes(Execution(), 2048, 32_000, 512, 4, head_gradient=True, device=CPU, sparse=True, live=False)
    assert of_record.group == of_record.slice == 256
    assert of_record.group * 32_000 * 4 <= 32 * 2**20
