"""DistiLLM-2's author: two streams over the same rows, with the weights of equation 5 and of its growing B."""

import pytest

from potstill.rollouts.config import PairConfig
from potstill.rollouts.endings import Endings
from potstill.rollouts.pairs import PairAuthor
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.writer import Writer
from potstill.rollouts.writing import Sampling
from seeded_generator import END, SeededGenerator
from small_runs import examples

PROMPTS = Prompts(examples(12, seed=4), max_tokens=64, max_new_tokens=8)


def _author(config=None, *, other=False, num_steps=10):
    def writer(by):
        return Writer(PROMPTS, SeededGenerator(), Sampling(max_new_tokens=8), Endings([END]), seed=3, by=by)

    return PairAuthor(writer("student"), writer("teacher") if other else None, config or PairConfig(), num_steps=num_steps)


@pytest.mark.parametrize("weight", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("other", [False, True])
def test_the_weights_are_two_less_b_and_b(weight, other):
    author = _author(PairConfig(student_weight=weight), other=other)
    assert list(author.streams(4)) == [("teacher" if other else "dataset", 2 - weight), ("student", weight)]
    assert author.most_streams == 2


def test_b_grows_to_one_and_a_half_over_the_first_half():
    author = _author(PairConfig(gradual=True))
    weights = [dict(author.streams(step)) for step in range(11)]
    assert [found["student"] for found in weights] == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5])
    assert all(found["student"] + found["dataset"] == pytest.approx(2.0) for found in weights)


@pytest.mark.parametrize(("weight", "stream"), [(0.0, "dataset"), (2.0, "student")])
def test_what_has_no_weight_is_not_computed(weight, stream):
    assert list(_author(PairConfig(student_weight=weight)).streams(0)) == [(stream, 2.0)]


def test_both_answer_the_same_rows_and_only_the_student_has_log_probabilities():
    author = _author(other=True)
    rows = [3, 0, 7]
    own, others = author.write("student", rows, 2), author.write("teacher", rows, 2)
    assert [example.index for example in own] == [example.index for example in others] == rows
    for row, mine, its in zip(rows, own, others, strict=True):
        length = len(PROMPTS[row].tokens)
        assert mine.tokens[:length] == its.tokens[:length] == list(PROMPTS[row].tokens)
        assert mine.log_probs is not None
        assert its.log_probs is None
    assert [example.tokens for example in own] != [example.tokens for example in others]
    author.step_done(3)
    metrics = author.metrics()
    assert metrics["rollouts/length"] != metrics["rollouts/teacher/length"]


def test_its_writers_come_back():
    author = _author(other=True)
    author.write("student", [1, 2], 0)
    author.write("teacher", [1, 2], 0)
    author.step_done(1)
    again = _author(other=True)
    again.restore(*author.state())
    before, after = author.metrics(), again.metrics()
    assert before == after
    assert before["rollouts/length"] > 0
