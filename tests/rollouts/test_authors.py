"""One writer all the time, or a draw at each step; the draws are a function of (seed, step), the same on every rank and in every run."""

import json

import pytest

from potstill.rollouts.authors import MixtureAuthor, OneAuthor
from potstill.rollouts.endings import Endings
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.writer import Writer
from potstill.rollouts.writing import Sampling
from seeded_generator import END, SeededGenerator
from small_runs import examples


def writer(by="student") -> Writer:
    prompts = Prompts(examples(6, shortest=6), max_tokens=64, max_new_tokens=8)
    return Writer(prompts, SeededGenerator(), Sampling(max_new_tokens=8), Endings([END]), seed=3, by=by, keep_texts=1, decode=str)


def drawn(share: float, seed: int, other=None, steps: int = 400) -> list[str]:
    author = MixtureAuthor(writer(), other, share, seed)
    return [stream for step in range(steps) for stream, weight in author.streams(step) if weight == 1.0]


@pytest.mark.parametrize("stream", ["student", "teacher"])
def test_one_writer(stream):
    author = OneAuthor(stream, writer(stream))
    assert author.most_streams == 1
    assert [author.streams(step) for step in range(3)] == [[(stream, 1.0)]] * 3
    written = author.write(stream, [2, 0], 1)
    assert [example.index for example in written] == [2, 0]
    author.step_done(2)
    assert [text["by"] for text in author.texts()] == [stream]
    assert author.metrics()


def test_a_share_is_how_often_the_student_writes():
    assert set(drawn(0.0, 1)) == {"dataset"}
    assert set(drawn(1.0, 1)) == {"student"}
    for share in (0.25, 0.5):
        assert abs(drawn(share, 1).count("student") / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5
    assert set(drawn(0.5, 1, other=writer("teacher"))) == {"student", "teacher"}


def test_the_draw_belongs_to_the_seed_and_the_step():
    assert drawn(0.5, 1) == drawn(0.5, 1)
    assert drawn(0.5, 1) != drawn(0.5, 2)
    # A larger share only adds steps: two runs that differ in it alone have the others in common.
    assert all(more == "student" for less, more in zip(drawn(0.3, 1), drawn(0.6, 1), strict=True) if less == "student")
    assert MixtureAuthor(writer(), None, 0.5, 7).streams(0) == MixtureAuthor(writer(), None, 0.5, 7).streams(0)


def test_both_writers_state_goes_through_json():
    author = MixtureAuthor(writer(), writer("teacher"), 0.5, 1)
    author.write("student", [0, 1], 0)
    author.step_done(1)
    author.write("teacher", [0, 1], 1)
    author.step_done(2)
    tensors, numbers = author.state()
    resumed = MixtureAuthor(writer(), writer("teacher"), 0.5, 1)
    resumed.restore(tensors, json.loads(json.dumps(numbers)))
    assert resumed.metrics() == author.metrics()
    assert {name.count("/") for name in MixtureAuthor(writer(), None, 0.5, 1).metrics()} == set()
    one = OneAuthor("student", writer())
    one.restore({}, {})
    assert one.metrics() == {}
