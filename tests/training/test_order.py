"""The order of samples: every row once an epoch, a function of seed and step, the same for any number of ranks."""

import numpy
import pytest

from potstill.errors import ConfigError
from potstill.training.order import Division, GlobalOrder, mix

LENGTHS = [3, 9, 4, 4, 12, 5, 7, 8, 2, 6, 6, 11, 10, 1, 3, 5, 9, 8, 4, 7, 2, 2, 5]


def _order(batch_size: int = 2, accumulation: int = 4, seed: int = 0, lengths=LENGTHS) -> GlobalOrder:
    return GlobalOrder(lengths, seed=seed, batch_size=batch_size, accumulation=accumulation)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 23])
def test_each_epoch_holds_every_row_once_and_the_short_last_window_is_kept(rows):
    order = _order(lengths=LENGTHS[:rows])
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        windows = [order.window(step) for step in steps]
        assert sorted(row for window in windows for row in window.rows) == list(range(rows))
        assert all(window.epoch == epoch for window in windows)
        assert [len(window.rows) for window in windows[:-1]] == [8] * (len(windows) - 1)


def test_the_order_depends_on_seed_and_epoch_alone():
    order, again = _order(), _order(batch_size=8, accumulation=1)
    assert [order.window(step).rows for step in (5, 0, 3)] == [again.window(step).rows for step in (5, 0, 3)]
    assert order.permutation(0).tolist() != order.permutation(1).tolist()
    assert _order(seed=1).permutation(0).tolist() != order.permutation(0).tolist()


def test_the_stream_of_random_numbers_never_changes():
    """A resumed run must see the order of its beginning, whatever versions have come since."""
    assert GlobalOrder([1] * 8, seed=0, batch_size=8, accumulation=1).permutation(0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_ranks_divide_a_window_and_add_nothing(world_size, step):
    order = _order()
    window = order.window(step)
    shares = [order.share(window, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for micro_batch in share for row in micro_batch.rows) == sorted(window.rows)
    for turn in zip(*shares, strict=True):
        # A micro-batch is left out only where no rank has a row, so that the ranks stay together.
        assert len({micro_batch.everywhere_empty for micro_batch in turn}) == 1
        assert turn[0].everywhere_empty == (not any(micro_batch.rows for micro_batch in turn))
        assert all(len(micro_batch.rows) <= 2 for micro_batch in turn)
    assert not shares[0][-1].everywhere_empty
    numbers = [micro_batch.number for share in shares for micro_batch in share]
    assert set(numbers) == set(range(step * 4, step * 4 + 4))


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation", "division"),
    [(1, 8, 1, (1, 1)), (2, 8, 4, (2, 1)), (4, 8, 2, (2, 2)), (4, 8, 1, (1, 4)), (6, 2, 3, (3, 2)), (8, 4, 32, (8, 1))],
)
def test_how_ranks_share(world_size, batch_size, accumulation, division):
    assert Division.of(world_size, batch_size, accumulation) == Division(*division)


@pytest.mark.parametrize(("world_size", "batch_size", "accumulation"), [(3, 4, 4), (2, 1, 1), (8, 2, 2), (16, 4, 2)])
def test_what_cannot_be_shared_is_refused_with_the_remedy(world_size, batch_size, accumulation):
    with pytest.raises(ConfigError, match=f"make accumulation a multiple of {world_size}"):
        Division.of(world_size, batch_size, accumulation)


def test_rows_of_like_length_share_a_micro_batch():
    order = _order(batch_size=4, accumulation=2)
    first, second = order.share(order.window(0), 0, 1)
    assert min(LENGTHS[row] for row in first.rows) >= max(LENGTHS[row] for row in second.rows)


def test_seeds_do_not_meet():
    seeds = [mix(seed, number) for seed in range(50) for number in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    assert numpy.median(seeds) > 2**61
