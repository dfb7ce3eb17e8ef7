"""Standard errors against their definition: closed forms, repeated sampling, and intervals that cover as often as they say."""

import numpy as np
import pytest

from potstill.evaluation.statistics import (
    Estimate,
    across_seeds,
    estimate,
    influence_variance,
    jackknife,
    mean_of,
    proportion_across_seeds,
    proportion_of,
    ratio,
    spread,
    student_t_quantile,
)

# Standard tables of Student's t.
QUANTILES = [
    (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 5, 2.5706), (0.975, 30, 2.0423), (0.975, 10**9, 1.9602), (0.8, 1, 1.3764),
    (0.8, 10, 0.8791), (0.995, 4, 4.6041), (0.5, 3, 0.0), (0.025, 5, -2.5706),
]  # fmt: skip


@pytest.mark.parametrize(("probability", "degrees", "expected"), QUANTILES)
def test_student_t_quantiles_are_those_of_the_tables(probability, degrees, expected):
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, abs=3e-4)


def documents(generator, num_documents, spread_between=0.5):
    """Documents of very unequal length whose tokens share a document effect: columns sum and count."""
    lengths = generator.integers(5, 200, num_documents)
    effects = generator.normal(0, spread_between, num_documents)
    sums = [generator.normal(2 + effect, 1, length).sum() for effect, length in zip(effects, lengths, strict=True)]
    return np.stack([np.array(sums), lengths.astype(float)], axis=1)


def test_the_jackknife_of_a_mean_is_the_textbook_standard_error():
    values = np.random.default_rng(0).normal(size=37)
    found = mean_of(values)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(37), rel=1e-12)
    assert (found.count, found.num_clusters) == (37, 37)


def test_the_jackknife_of_a_ratio_is_the_cluster_robust_error_up_to_one_in_items():
    items = documents(np.random.default_rng(1), 400)
    found = estimate(ratio(), items, count=int(items[:, 1].sum()))
    residual = items[:, 0] - found.value * items[:, 1]
    linearised = np.sqrt(400 / 399 * np.square(residual).sum()) / items[:, 1].sum()
    assert found.standard_error == pytest.approx(linearised, rel=0.01)


def test_intervals_cover_the_truth_and_token_wise_errors_would_not():
    generator = np.random.default_rng(2)
    covered = naive = 0
    for _ in range(600):
        items = documents(generator, 40)
        found = estimate(ratio(), items, count=int(items[:, 1].sum()))
        low, high = found.interval()
        covered += low <= 2 <= high
        # What one would get from tokens taken as independent (their variance is 1 + 0.25).
        naive += abs(found.value - 2) <= 1.96 * np.sqrt(1.25 / found.count)
    assert 0.92 <= covered / 600 <= 0.975
    assert naive / 600 < 0.6


def test_the_standard_error_is_what_repetition_shows():
    generator = np.random.default_rng(3)
    found = [estimate(ratio(), documents(generator, 60), count=1) for _ in range(500)]
    assert np.mean([one.standard_error for one in found]) == pytest.approx(np.std([one.value for one in found]), rel=0.1)


def test_the_jackknife_of_a_nonlinear_statistic_agrees_with_the_bootstrap():
    items = documents(np.random.default_rng(4), 200)
    perplexity = lambda totals: np.exp(totals[..., 0] / totals[..., 1])  # noqa: E731
    weights = np.random.default_rng(5).multinomial(200, np.full(200, 1 / 200), size=4000)
    assert estimate(perplexity, items, count=1).standard_error == pytest.approx(perplexity(weights @ items).std(), rel=0.06)


def test_one_item_has_no_known_error_and_no_interval():
    found = estimate(ratio(), np.array([[3.0, 2.0]]), count=2)
    assert (found.value, found.standard_error, found.interval()) == (1.5, None, None)


def test_influences_of_two_statistics_on_the_same_items_subtract():
    items = documents(np.random.default_rng(6), 50)
    doubled = items * [2.0, 1.0]
    (_, one), (_, two) = jackknife(ratio(), items), jackknife(ratio(), doubled)
    assert influence_variance(two - one) == pytest.approx(influence_variance(one), rel=1e-9)


@pytest.mark.parametrize("right", [0, 50])
def test_answers_that_are_all_right_or_all_wrong_are_not_certain(right):
    found = proportion_of([1] * right + [0] * (50 - right))
    assert found.value == right / 50
    assert found.standard_error > 0.02


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_of_a_share_ends_at_nothing_and_at_all(seeds):
    few = np.zeros((seeds, 40))
    few[0, 0] = 1
    assert proportion_across_seeds(few).interval()[0] == 0
    assert proportion_across_seeds(1 - few).interval()[1] == 1
    assert 0 < proportion_across_seeds(1 - few).interval()[0] < 39 / 40


def test_the_error_of_a_proportion_in_the_middle_is_the_usual_one():
    assert proportion_of([1] * 400 + [0] * 600).standard_error == pytest.approx(np.sqrt(0.4 * 0.6 / 1000), rel=0.01)


def test_a_proportion_over_seeds_is_the_mean_and_never_certain():
    correct = np.random.default_rng(10).random((3, 200)) < 0.6
    found = proportion_across_seeds(correct)
    assert found.value == pytest.approx(correct.mean())
    assert found.standard_error > proportion_of(correct.reshape(-1)).standard_error
    assert proportion_across_seeds(correct[:1]) == proportion_of(correct[0])
    assert proportion_across_seeds(np.ones((4, 30))) == proportion_of(np.ones(30))


def test_equal_seeds_have_the_error_of_one_run():
    items = documents(np.random.default_rng(7), 80)
    one, three = estimate(ratio(), items, count=1), across_seeds(ratio(), np.stack([items] * 3), count=1)
    assert three.value == pytest.approx(one.value)
    assert three.standard_error == pytest.approx(one.standard_error, rel=1e-9)


def test_where_only_seeds_differ_the_error_is_theirs_with_few_degrees_of_freedom():
    runs = np.stack([np.stack([np.full(100, level), np.ones(100)], axis=1) for level in (1.0, 1.2, 1.7)])
    found = across_seeds(ratio(), runs, count=100)
    assert found.standard_error == pytest.approx(np.std([1.0, 1.2, 1.7], ddof=1) / np.sqrt(3), rel=1e-9)
    low, high = found.interval()
    assert (high - low) / 2 == pytest.approx(4.3027 * found.standard_error, rel=1e-3)


@pytest.mark.parametrize(("seed_spread", "item_spread"), [(0.0, 1.0), (0.1, 1.0), (0.3, 0.3), (0.3, 0.1)])
@pytest.mark.parametrize("num_seeds", [2, 4])
def test_intervals_over_seeds_and_items_cover_the_truth(seed_spread, item_spread, num_seeds):
    generator = np.random.default_rng(8)
    covered = 0
    for _ in range(400):
        effects = generator.normal(0, seed_spread, (num_seeds, 1)) + generator.normal(0, item_spread, (1, 60))
        values = effects + generator.normal(0, 0.5, (num_seeds, 60))
        low, high = across_seeds(ratio(), np.stack([values, np.ones_like(values)], axis=-1), count=1).interval()
        covered += low <= 0 <= high
    assert covered / 400 >= 0.925


@pytest.mark.parametrize("num_seeds", [1, 2, 5])
def test_the_p_value_is_the_level_at_which_the_interval_touches_zero(num_seeds):
    influences = np.random.default_rng(9).normal(size=(num_seeds, 30)) / 30
    joined = spread(np.linspace(0.1, 0.4, num_seeds), influences - influences.mean(axis=1, keepdims=True))
    assert joined.quantile(1 - joined.p_value / 2) * joined.standard_error == pytest.approx(abs(joined.value), rel=1e-4)


def test_an_interval_is_symmetric_and_as_wide_as_its_critical_value_says():
    low, high = Estimate(2.0, 0.5, 10, "nats", 10).interval()
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(2.2622 * 0.5, rel=1e-4)
    assert Estimate(2.0, 0.5, 10, critical=3.0).interval() == (0.5, 3.5)
