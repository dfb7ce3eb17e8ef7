"""What is counted of written answers, and the one warning that each sign of a collapse gets."""

import json
import logging

import pytest

from potstill.rollouts.config import WatchConfig
from potstill.rollouts.watch import Tally, Watch, repeated
from potstill.rollouts.writing import Completion

HEALTHY = {"length": 20.0, "entropy": 2.0, "repeated": 0.1, "cut": 0.2}


@pytest.mark.parametrize(
    ("tokens", "again", "grams"),
    [([], 0, 0), ([1, 2, 3], 0, 0), ([1, 2, 3, 4], 0, 1), ([7] * 10, 6, 7), ([1, 2, 3, 4, 1, 2, 3, 4], 1, 5), (list(range(9)), 0, 6)],
)
def test_4_grams_that_stood_there_before(tokens, again, grams):
    assert repeated(tokens) == (again, grams)
    before = [tokens[place : place + 4] in [tokens[other : other + 4] for other in range(place)] for place in range(grams)]
    assert sum(before) == again


def test_means_over_answers():
    tally = Tally(writings=2.0, seconds=1.0)
    tally.count(Completion((1, 2, 9), (-1.0, -2.0, -3.0), True, version=4), foreign=True, step=6, reward=1.0)
    tally.count(Completion((5,), (-0.5,), False, version=6), foreign=False, step=6, reward=2.0)
    tally.count(Completion((9,), (-0.5,), True, version=6), foreign=False, step=6, reward=None)
    tally.count(Completion((), (), False, version=6), foreign=False, step=6, reward=None)
    assert tally.means() == {
        "length": 5 / 4, "cut": 0.5, "empty": 0.5, "entropy": 7 / 5, "repeated": 0.0, "staleness": 0.5, "foreign_ends": 0.25,
        "seconds": 0.5, "reward": 1.5,
    }  # fmt: skip
    assert Tally.of(tally.numbers) == tally
    assert tally.plus(tally).means() == tally.means()
    assert all(value == 0 for value in Tally().means().values())


@pytest.mark.parametrize(
    ("sign", "value", "says"),
    [("length", 3.9, "3.9 tokens on average, and had 20.0"), ("entropy", 0.19, "0.190 nats a token, and was 2.000"),
     ("repeated", 0.51, "51% of the 4-grams"), ("cut", 0.91, "91% of its answers are cut")],
)  # fmt: skip
def test_each_sign_is_said_once_with_the_way_out(sign, value, says, caplog):
    watch = Watch(WatchConfig())
    assert watch.look(HEALTHY) == []
    with caplog.at_level(logging.WARNING, "potstill"):
        assert watch.look({**HEALTHY, sign: value}) == [sign]
        assert watch.look({**HEALTHY, sign: value}) == []
    assert len(caplog.records) == 1
    for part in (says, "rollouts.jsonl", "learning_rate", f"rollouts.watch.{'max' if value < 1 and sign != 'entropy' else 'min'}_{sign}"):
        assert part in caplog.text


def test_nothing_is_said_of_the_first_line_or_where_it_is_switched_off():
    off = Watch(WatchConfig(min_length=0, min_entropy=0, max_repeated=0, max_cut=0))
    off.look(HEALTHY)
    assert off.look({"length": 0.0, "entropy": 0.0, "repeated": 1.0, "cut": 1.0}) == []
    assert Watch(WatchConfig()).look({"length": 0.5, "entropy": 0.01, "repeated": 0.1, "cut": 0.1}) == []


def test_it_remembers_over_a_break(caplog):
    watch = Watch(WatchConfig())
    watch.look(HEALTHY)
    watch.look({**HEALTHY, "cut": 1.0})
    resumed = Watch(WatchConfig())
    resumed.restore(json.loads(json.dumps(watch.state())))
    caplog.clear()
    assert resumed.look({**HEALTHY, "length": 1.0, "cut": 1.0}, say=False) == ["length"]
    assert not caplog.records
    fresh = Watch(WatchConfig())
    fresh.restore({})
    assert fresh.look({**HEALTHY, "length": 1.0}) == []
