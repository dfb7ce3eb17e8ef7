"""The promises of the tests and intervals, counted on models whose true difference is known.

Each share is held against its promise with three standard errors of the simulation. The slow ones repeat it with ten times the studies.
"""

import numpy as np
import pytest

from potstill.evaluation.comparison import compare, compare_correct, holm
from potstill.evaluation.scores import Formula
from potstill.evaluation.statistics import across_seeds, estimate, ratio

STATISTICS = {
    "ratio": Formula("ratio", ("nats", "tokens")).statistic(("nats", "tokens")),
    "perplexity": Formula("perplexity", ("nats", "tokens")).statistic(("nats", "tokens")),
}
REPETITIONS = [300, pytest.param(3000, marks=pytest.mark.slow)]
slow = pytest.mark.slow


def documents(generator, num_items, *, difference=0.0, num_seeds=None, seed_noise=0.0):
    """Two models on documents of unequal length and difficulty, [I, 2] or [S, I, 2]; the first has `difference` nats a token more."""
    lengths = generator.integers(5, 60, num_items).astype(float)
    hardness = generator.normal(2.0, 0.6, num_items)
    shape = (num_items,) if num_seeds is None else (num_seeds, num_items)

    def model(more):
        nats = hardness + generator.normal(0, 0.3, shape) + more
        if num_seeds is not None:
            nats = nats + generator.normal(0, seed_noise, (num_seeds, 1))
        return np.stack([nats * lengths, np.broadcast_to(lengths, shape)], axis=-1)

    return model(difference), model(0.0)


def answers(generator, num_items, *, difference=0.0, discordant=0.3):
    """Right and wrong answers of two models that differ on a share of the questions; the first is better by `difference`."""
    drawn = generator.random(num_items)
    second_alone = (max(discordant, difference) - difference) / 2
    first = np.where(drawn < second_alone, 0.0, 1.0)
    second = np.where((drawn >= second_alone) & (drawn < max(discordant, difference)), 0.0, 1.0)
    return first, second


def near(share, promised, repetitions, *, slack=0.0):
    """Whether a share that was counted is the promised one, within three standard errors of the count and `slack`."""
    return abs(share - promised) <= 3 * np.sqrt(promised * (1 - promised) / repetitions) + slack


def at_most(share, promised, repetitions, *, slack=0.0):
    return share <= promised + 3 * np.sqrt(promised * (1 - promised) / repetitions) + slack


# The ratio of few documents is not yet normal: shares up to 0.062 were counted with 5 to 20 of them, over 2,000 repetitions.
@pytest.mark.parametrize("repetitions", [600, pytest.param(3000, marks=slow)])
@pytest.mark.parametrize(
    ("statistic", "num_items", "slack"),
    [
        ("ratio", 5, 0.0125), ("ratio", 8, 0.0125),
        pytest.param("ratio", 20, 0.0125, marks=slow), pytest.param("ratio", 100, 0.0, marks=slow),
        pytest.param("perplexity", 8, 0.0125, marks=slow), ("perplexity", 20, 0.0125), ("perplexity", 100, 0.0),
    ],
)  # fmt: skip
def test_equal_models_are_told_apart_once_in_twenty_and_the_interval_covers(statistic, num_items, slack, repetitions):
    generator = np.random.default_rng(num_items)
    draws = 2000 if num_items < 50 else 400
    found = [compare(STATISTICS[statistic], *documents(generator, num_items), draws=draws) for _ in range(repetitions)]
    assert near(np.mean([one.is_significant for one in found]), 0.05, repetitions, slack=slack)
    assert near(np.mean([one.low <= 0 <= one.high for one in found]), 0.95, repetitions, slack=slack)
    # The interval and the p-value are one test; a draw that lies on the end of the interval may fall to either side.
    assert np.mean([one.is_significant == (not one.low <= 0 <= one.high) for one in found]) >= 0.99


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_the_interval_covers_a_true_difference(repetitions):
    generator = np.random.default_rng(0)
    found = [compare(STATISTICS["ratio"], *documents(generator, 60, difference=0.2), draws=400) for _ in range(repetitions)]
    assert near(np.mean([one.low <= 0.2 <= one.high for one in found]), 0.95, repetitions, slack=0.01)


@pytest.mark.parametrize("repetitions", REPETITIONS)
@pytest.mark.parametrize("num_items", [pytest.param(10, marks=slow), 40, pytest.param(200, marks=slow)])
def test_mcnemar_stays_at_or_below_its_level(num_items, repetitions):
    generator = np.random.default_rng(num_items)
    found = [compare_correct(*answers(generator, num_items)).is_significant for _ in range(repetitions)]
    assert at_most(np.mean(found), 0.05, repetitions)


@pytest.mark.parametrize("repetitions", REPETITIONS)
@pytest.mark.parametrize(
    ("num_seeds", "seed_noise"),
    [(2, 0.3), (3, 0.0), (4, 0.1), *(pytest.param(*one, marks=slow) for one in [(2, 0.0), (2, 0.1), (3, 0.3), (4, 0.3)])],
)
def test_several_seeds_stay_at_or_below_the_level(num_seeds, seed_noise, repetitions):
    generator = np.random.default_rng(num_seeds)
    pairs = (documents(generator, 60, num_seeds=num_seeds, seed_noise=seed_noise) for _ in range(repetitions))
    found = [compare(ratio(), *pair).is_significant for pair in pairs]
    assert at_most(np.mean(found), 0.05, repetitions, slack=0.01)


@pytest.mark.parametrize("repetitions", REPETITIONS)
def test_the_interval_of_one_model_covers(repetitions):
    generator = np.random.default_rng(0)
    one = [estimate(ratio(), documents(generator, 60)[0], count=1).interval() for _ in range(repetitions)]
    three = [
        across_seeds(ratio(), documents(generator, 60, num_seeds=3, seed_noise=0.2)[0], count=1).interval() for _ in range(repetitions)
    ]
    assert near(np.mean([low <= 2.0 <= high for low, high in one]), 0.95, repetitions, slack=0.01)
    assert np.mean([low <= 2.0 <= high for low, high in three]) >= 0.95 - 3 * np.sqrt(0.0475 / repetitions)


# Power of a share rises in leaps with few questions, and that of two seeds is a rough figure: docstring of Comparison.
@pytest.mark.parametrize("repetitions", [100, pytest.param(1000, marks=slow)])
@pytest.mark.parametrize(
    ("num_items", "num_seeds", "seed_noise", "low", "high"),
    [(20, None, 0, 0.7, 0.9), (200, None, 0, 0.7, 0.9), (60, 2, 0.3, 0.5, 0.9), (60, 3, 0.1, 0.65, 0.9), (60, 4, 0.0, 0.7, 0.9)],
)
def test_the_smallest_visible_difference_is_found_about_four_times_in_five(num_items, num_seeds, seed_noise, low, high, repetitions):
    generator = np.random.default_rng(num_items)
    shape = {"num_seeds": num_seeds, "seed_noise": seed_noise}
    sizes = [compare(ratio(), *documents(generator, num_items, **shape), draws=50).smallest_visible for _ in range(60)]
    difference = np.sqrt(np.mean(np.square(sizes)))
    pairs = (documents(generator, num_items, difference=difference, **shape) for _ in range(repetitions))
    assert low - 0.05 <= np.mean([compare(ratio(), *pair, draws=400).is_significant for pair in pairs]) <= high + 0.05


@pytest.mark.parametrize("repetitions", [100, pytest.param(1000, marks=slow)])
@pytest.mark.parametrize(
    ("num_items", "discordant"), [(50, 0.05), (200, 0.3), pytest.param(50, 0.3, marks=slow), pytest.param(400, 0.05, marks=slow)]
)
def test_the_smallest_visible_share_is_found_about_four_times_in_five(num_items, discordant, repetitions):
    generator = np.random.default_rng(num_items)
    sizes = [compare_correct(*answers(generator, num_items, discordant=discordant)).smallest_visible for _ in range(20)]
    pairs = (answers(generator, num_items, discordant=discordant, difference=np.mean(sizes)) for _ in range(repetitions))
    assert 0.65 <= np.mean([compare_correct(*pair).is_significant for pair in pairs]) <= 0.97


@pytest.mark.parametrize("repetitions", REPETITIONS)
@pytest.mark.parametrize("num_comparisons", [4, pytest.param(12, marks=slow)])
def test_holm_keeps_the_chance_of_any_false_finding_in_a_study(num_comparisons, repetitions):
    """Every cell against one twin that all share: the comparisons hang together, as a study's do."""
    generator = np.random.default_rng(num_comparisons)
    any_false, uncorrected = 0, 0
    for _ in range(repetitions):
        models = generator.normal(0, 1, (num_comparisons + 1, 60)) + generator.normal(0, 3, 60)
        p_values = [_p_value(model - models[0]) for model in models[1:]]
        any_false += min(holm(p_values)) < 0.05
        uncorrected += min(p_values) < 0.05
    assert at_most(any_false / repetitions, 0.05, repetitions)
    assert uncorrected / repetitions > 0.1


def test_holm_finds_whatever_bonferroni_finds_and_sometimes_more():
    generator = np.random.default_rng(0)
    more = 0
    for _ in range(500):
        p_values = list(generator.beta(0.3, 4, generator.integers(1, 15)))
        adjusted = np.array(holm(p_values))
        bonferroni = np.minimum(1, len(p_values) * np.array(p_values))
        assert np.all(adjusted <= bonferroni)
        more += np.sum(adjusted < 0.05) > np.sum(bonferroni < 0.05)
    assert more > 10


def test_a_large_family_can_still_find_what_is_plain():
    """The draws of the bootstrap are 2,000, and a p-value of one in 2,000 would be lost among a hundred comparisons."""
    pair = documents(np.random.default_rng(0), 200, difference=0.3)
    p_value = compare(ratio(), *pair).p_value
    assert holm([p_value, *[0.5] * 199])[0] < 0.05


def _p_value(differences):
    zeros = np.zeros_like(differences)
    ones = np.ones_like(differences)
    columns = np.stack([differences, ones], axis=-1), np.stack([zeros, ones], axis=-1)
    return compare(ratio(), *columns, draws=400).p_value
