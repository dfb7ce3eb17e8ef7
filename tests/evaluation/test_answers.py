"""pass@k, majority and agreement against enumeration of all draws; lengths as pictures."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from potstill.evaluation.answers import agreeing_pairs, comes_to, majority, modal_share, pass_at
from potstill.evaluation.lengths import histogram, quantiles


def test_the_stated_fixture():
    assert pass_at(1, 10, 3) == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(number):
    for right in range(number + 1):
        for k in range(1, number + 1):
            draws = list(combinations([True] * right + [False] * (number - right), k))
            assert pass_at(k, number, right) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_of_many_samples_stays_exact():
    assert pass_at(100, 1000, 7) == pytest.approx(1 - comb(993, 100) / comb(1000, 100), rel=1e-12)
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at(3, 2, 1)


def test_the_majority_is_right_as_often_as_a_fair_draw_among_the_most_frequent():
    assert majority(["a", "b", "a"], [True, False, True]) == 1
    assert majority(["a", "b", "b"], [True, False, False]) == 0
    assert majority(["a", "b", "b", "a", "c"], [True, False, False, True, True]) == 0.5
    assert majority(["a", "a"], [True, False]) == 0.5, "answers of one kind may differ in what the checker says"
    assert majority([None, None, None, "a"], [False, False, False, True]) == 1, "what comes to nothing has no vote"
    assert majority([None, None], [False, False]) == 0


def test_agreement_is_counted_over_all_pairs():
    generator = np.random.default_rng(0)
    for _ in range(50):
        keys = [None if value == 0 else int(value) for value in generator.integers(0, 4, 6)]
        pairs = list(combinations(keys, 2))
        assert agreeing_pairs(keys) == (sum(one == other and one is not None for one, other in pairs), len(pairs))
        assert modal_share(keys) == max([keys.count(key) for key in keys if key is not None], default=0) / 6
    assert agreeing_pairs(["a"]) == (0, 0)


def test_answers_are_the_same_by_what_they_come_to():
    assert comes_to("First this. Answer: Paris") == comes_to("so \\boxed{paris}")
    assert comes_to("the answer is 42") != comes_to("the answer is 42 apples")
    assert comes_to("the answer is 42", "numeric") == comes_to("42.0 apples", "numeric")
    assert comes_to("(B)", "choice") == comes_to("so the answer is B", "choice")
    assert comes_to("nothing", "numeric") is comes_to(" \n", "exact") is None


@pytest.mark.parametrize("longest", [1, 7, 20, 64, 1000])
def test_lengths_fall_into_the_same_classes_for_every_model(longest):
    lengths = np.random.default_rng(0).integers(0, longest + 1, 200).tolist()
    drawn = histogram("answers", lengths, longest)
    assert drawn.x == histogram("answers", [0], longest).x
    assert len(drawn.x) <= 20
    assert sum(drawn.y) == pytest.approx(1)
    width = drawn.x[1] - drawn.x[0]
    for middle, share in zip(drawn.x, drawn.y, strict=True):
        assert share == pytest.approx(sum(abs(length - middle) < width / 2 for length in lengths) / 200)
    assert histogram("references", [10 * longest], longest).y[-1] == 1


def test_quantiles_are_those_of_the_lengths():
    found = quantiles("answers", list(range(101)))
    assert dict(zip(found.x, found.y, strict=True)) == {0.05: 5, 0.1: 10, 0.25: 25, 0.5: 50, 0.75: 75, 0.9: 90, 0.95: 95}
