"""Quantiles from counts in bins: as good as the bins, smooth enough for a jackknife, and defined wherever a row is."""

import numpy as np
import pytest

from potstill.evaluation.row_quantiles import EDGES, NUM_BINS, quantile
from potstill.evaluation.statistics import estimate

WIDTH = 10 ** (1 / 12)


def counted(values: np.ndarray) -> np.ndarray:
    """[..., R] rows to [..., NUM_BINS] counts, one by one."""
    bins = np.searchsorted(EDGES, values, side="right")
    return (bins[..., None] == np.arange(NUM_BINS)).sum(axis=-2).astype(float)


@pytest.mark.parametrize("level", [0.5, 0.99])
@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0])
def test_a_quantile_is_within_a_bin_of_the_rows_own(level, scale):
    rows = scale * np.random.default_rng(0).gamma(0.5, size=20_000)
    found, true = quantile(counted(rows), level), np.quantile(rows, level, method="inverted_cdf")
    assert true / WIDTH <= found <= true * WIDTH
    # Where bins hold many rows the interpolation is far better than the bin is wide.
    assert found == pytest.approx(true, rel=0.03)


def test_the_ends_are_where_the_values_are():
    assert quantile(counted(np.zeros(10)), 0.5) == pytest.approx(5e-5)
    assert quantile(counted(np.full(10, 1e9)), 0.5) == 100
    assert np.isnan(quantile(np.zeros(NUM_BINS), 0.5))
    assert quantile(counted(np.array([[0.01, 0.2], [5.0, 5.0]])), 0.5).shape == (2,)


def test_more_of_a_value_moves_the_quantile_towards_it():
    rows = np.random.default_rng(1).gamma(1.0, size=400)
    before = quantile(counted(rows), 0.5)
    assert quantile(counted(rows) + counted(np.full(9, 40.0)), 0.5) > before > quantile(counted(rows) + counted(np.full(9, 1e-3)), 0.5)


@pytest.mark.parametrize("level", [0.5, 0.99])
def test_intervals_of_a_quantile_cover_it_in_simulation(level):
    """300 documents of 20 rows whose scale is the document's own: 95 of 100 intervals shall hold the quantile of all documents."""
    generator = np.random.default_rng(0)

    def documents(number):
        return np.exp(generator.normal(size=(number, 1)) * 0.5) * generator.gamma(0.5, size=(number, 20))

    true = np.quantile(documents(200_000), level)
    covered = 0
    for _ in range(200):
        found = estimate(lambda totals: quantile(totals, level), counted(documents(300)), count=6000)
        low, high = found.interval()
        covered += low <= true <= high
    assert 0.90 <= covered / 200 <= 0.99
