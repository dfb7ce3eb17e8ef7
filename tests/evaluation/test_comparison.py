"""Paired comparisons: known answers, error rates under repetition, and words that say what was found."""

import numpy as np
import pytest

from potstill.evaluation.comparison import compare, compare_correct, decimals, format_p, mcnemar_exact, verdict
from potstill.evaluation.statistics import ratio


def with_counts(values):
    return np.stack([values, np.ones_like(values)], axis=-1)


def pair(generator, num_items=60, difference=0.0, noise=0.3, num_seeds=None, seed_noise=0.0):
    """Two models on items of very unequal difficulty; the second is better by `difference`."""
    shape = (num_items,) if num_seeds is None else (num_seeds, num_items)
    difficulty = generator.normal(0, 3, num_items)
    first, second = (difficulty + generator.normal(0, noise, shape) for _ in range(2))
    if num_seeds is not None:
        first = first + generator.normal(0, seed_noise, (num_seeds, 1))
    return with_counts(first + difference), with_counts(second)


# By hand: twice the binomial tail; the last is a widely printed example.
@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (0, 6, 0.03125), (10, 2, 2 * 79 / 4096), (7, 7, 1.0), (121, 59, 4.434446e-06)],
)
def test_mcnemar_is_exact(only_first, only_second, expected):
    assert mcnemar_exact(only_first, only_second) == pytest.approx(expected, rel=1e-6)
    assert mcnemar_exact(only_second, only_first) == mcnemar_exact(only_first, only_second)


def test_mcnemar_looks_at_discordant_questions_alone():
    first = np.array([1] * 10 + [0] * 2 + [1] * 50)
    second = np.array([0] * 10 + [1] * 2 + [1] * 50)
    found = compare_correct(first, second)
    assert found.p_value == pytest.approx(2 * 79 / 4096)
    assert found.difference.value == pytest.approx(8 / 62)
    assert "10 questions right by the first alone, 2 by the second" in found.method


def test_fewer_than_six_discordant_questions_can_show_nothing():
    first, second = np.ones(100), np.concatenate([np.zeros(5), np.ones(95)])
    found = compare_correct(first, second)
    assert not found.is_significant
    assert found.smallest_visible >= 0.06
    assert compare_correct(np.ones(100), np.ones(100)).smallest_visible >= 0.06


def test_the_paired_difference_has_the_closed_form_error_and_the_seed_decides_the_bootstrap():
    first, second = pair(np.random.default_rng(0), difference=0.1)
    found = compare(ratio(), first, second, seed=3)
    differences = first[:, 0] - second[:, 0]
    assert found.difference.value == pytest.approx(differences.mean())
    assert found.difference.standard_error == pytest.approx(differences.std(ddof=1) / np.sqrt(60), rel=1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.difference.standard_error, rel=0.08)
    assert compare(ratio(), first, second, seed=3) == found
    assert compare(ratio(), first, second, seed=4) != found


def test_exchanging_the_models_changes_the_sign_alone():
    first, second = pair(np.random.default_rng(1), difference=0.1)
    one, other = compare(ratio(), first, second), compare(ratio(), second, first)
    assert one.difference.value == pytest.approx(-other.difference.value)
    assert (one.low, one.p_value) == (pytest.approx(-other.high), pytest.approx(other.p_value))


@pytest.mark.parametrize(("num_seeds", "seed_noise"), [(None, 0.0), (2, 0.0), (2, 0.1), (2, 0.5), (3, 0.0), (3, 0.3)])
def test_models_that_do_not_differ_are_rarely_told_apart(num_seeds, seed_noise):
    generator = np.random.default_rng(2)
    found = [compare(ratio(), *pair(generator, num_seeds=num_seeds, seed_noise=seed_noise), draws=400) for _ in range(300)]
    assert np.mean([one.is_significant for one in found]) <= 0.085
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.915


def test_the_smallest_visible_difference_is_seen_four_times_in_five():
    generator = np.random.default_rng(3)
    size = compare(ratio(), *pair(generator, num_items=200, noise=0.3)).smallest_visible
    found = [compare(ratio(), *pair(generator, num_items=200, difference=size), draws=400).is_significant for _ in range(300)]
    assert 0.7 <= np.mean(found) <= 0.9


def test_two_seeds_that_disagree_decide_nothing_however_many_the_items():
    generator = np.random.default_rng(4)
    values = generator.normal(0, 0.01, (2, 5000)) + np.array([[1.0], [0.1]])
    found = compare(ratio(), with_counts(values), with_counts(np.zeros((2, 5000))))
    assert found.difference.value == pytest.approx(0.55, abs=0.01)
    assert not found.is_significant
    assert "2 seeds" in found.method


@pytest.mark.parametrize("num_items", [2, 5, 7, 8, 30])
@pytest.mark.parametrize("num_seeds", [None, 2])
def test_differences_that_are_all_alike_are_worth_the_tosses_of_a_coin(num_items, num_seeds):
    """Without a spread Student's t would be sure of two items."""
    shape = (num_items,) if num_seeds is None else (num_seeds, num_items)
    second = np.broadcast_to(np.linspace(0.1, 0.7, num_items), shape)
    found = compare(ratio(), with_counts(second + 0.1), with_counts(second))
    assert found.p_value >= 0.5 ** (num_items - 1)
    assert found.is_significant == (num_items > 5)
    assert compare(ratio(), with_counts(second), with_counts(second)).p_value == 1


def test_many_items_are_drawn_in_parts_without_a_trace(monkeypatch):
    import potstill.evaluation.comparison as comparison

    first, second = pair(np.random.default_rng(5), difference=0.05)
    whole = compare(ratio(), first, second)
    monkeypatch.setattr(comparison, "_WEIGHTS_AT_ONCE", 60 * 7)
    found = compare(ratio(), first, second)
    assert (found.low, found.high) == (pytest.approx(whole.low, rel=1e-9), pytest.approx(whole.high, rel=1e-9))


def test_pairs_must_be_pairs():
    first, second = pair(np.random.default_rng(6))
    with pytest.raises(ValueError, match="same items"):
        compare(ratio(), first, second[:-1])
    with pytest.raises(ValueError, match="at least two"):
        compare(ratio(), first[:1], second[:1])


def test_the_verdict_says_whether_and_in_which_direction():
    generator = np.random.default_rng(7)
    first, second = pair(generator, difference=0.5)
    words = {"first": "KD", "second": "SFT", "metric": "forward KL"}
    worse = verdict(compare(ratio(), first, second, unit="nats"), **words, higher_is_better=False)
    assert "KD is 0.5" in worse
    assert "nats higher than SFT, which is worse" in worse
    assert "The difference is larger than its uncertainty" in worse
    better = verdict(compare(ratio(), second, first), **words, higher_is_better=False)
    assert "lower than SFT, which is better" in better
    neither = verdict(compare(ratio(), first, second), **words)
    assert "worse" not in neither
    assert "better" not in neither


def test_the_verdict_on_noise_names_what_could_have_been_seen():
    found = compare(ratio(), *pair(np.random.default_rng(8)))
    words = verdict(found, first="A", second="B", metric="accuracy")
    assert "The difference is not larger than its uncertainty" in words
    assert f"four times in five is {found.smallest_visible:.3f}" in words


def test_a_model_compared_with_itself_leaves_nothing_to_judge():
    first, _ = pair(np.random.default_rng(9))
    found = compare(ratio(), first, first)
    assert (found.difference.value, found.p_value, found.is_significant) == (0, 1, False)
    assert "equal on every item" in verdict(found, first="A", second="A", metric="accuracy")


@pytest.mark.parametrize(("error", "expected"), [(0.0123, 3), (1.4, 1), (25.0, 0), (0.5, 2), (None, 4), (0.0, 4)])
def test_digits_follow_the_error(error, expected):
    assert decimals(error) == expected


@pytest.mark.parametrize(("p_value", "expected"), [(0.0001, "p < 0.001"), (0.0386, "p = 0.039"), (1.0, "p = 1.000")])
def test_p_values_as_people_write_them(p_value, expected):
    assert format_p(p_value) == expected
