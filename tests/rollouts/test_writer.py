"""From row numbers to examples: what is drawn hangs on (seed, step, row) and the weights alone, and every number goes where it belongs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from potstill.batch import Example
from potstill.errors import NonFiniteError
from potstill.rollouts.config import WatchConfig
from potstill.rollouts.endings import Endings
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.watch import Watch
from potstill.rollouts.writer import Writer
from potstill.rollouts.writing import Sampling
from seeded_generator import END, SeededGenerator
from small_runs import NEW_TOKENS, STOPS, examples, make_student

ROWS = examples(9, shortest=6)


def writer(generator=None, *, by="student", rows: Sequence[Example] = ROWS, cut="keep", seed=3, **more) -> Writer:
    prompts = Prompts(rows, max_tokens=64, max_new_tokens=NEW_TOKENS)
    return Writer(
        prompts, generator or SeededGenerator(), Sampling(max_new_tokens=NEW_TOKENS), Endings([END, *STOPS], cut_answers=cut), seed=seed,
        by=by, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return LocalGenerator(make_student("plain"), stop_ids=STOPS, pad_token=0)


def test_an_example_is_the_prompt_and_the_answer():
    made = writer(cut="drop")
    for row, example in zip(range(9), made.write(range(9), 4), strict=True):
        prompt = made.prompts[row]
        length = len(prompt.tokens)
        assert tuple(example.tokens[:length]) == prompt.tokens
        assert example.prompt_length == length
        assert (example.index, example.origin, example.route, example.reward) == (row, ROWS[row].origin, "", None)
        assert example.log_probs is not None
        assert example.log_probs[:length] == [0.0] * length
        assert all(value < 0 for value in example.log_probs[length:])
        ended = example.tokens[-1] == END
        assert example.is_target == [False] * length + [ended] * (len(example.tokens) - length)


def test_what_is_drawn_for_a_row_does_not_hang_on_who_is_beside(real):
    every = writer(real).write(range(9), 5)
    assert [writer(real).write([row], 5)[0].tokens for row in (7, 2)] == [every[row].tokens for row in (7, 2)]
    assert [example.tokens for example in writer(real).write([4, 8, 0], 5)] == [every[row].tokens for row in (4, 8, 0)]
    for other in (writer(real).write(range(9), 6), writer(real, seed=4).write(range(9), 5)):
        assert sum(left.tokens == right.tokens for left, right in zip(every, other, strict=True)) < 3


def test_all_rows_of_a_step_are_one_call_also_none():
    generator = SeededGenerator()
    made = writer(generator)
    assert len(made.write(range(9), 0)) == 9
    assert made.write([], 1) == []
    assert generator.calls == 2


def test_weights_are_asked_for_where_something_will_be_written():
    """A step on other text needs none; a served student is not sent weights that it will not use."""
    generator = SeededGenerator()
    made = writer(generator)
    made.write([0], 3)
    assert generator.version == 3
    for _ in range(4):
        made.step_done()
    assert generator.version == 3
    made.write([0], 7)
    assert generator.version == 7


def test_teacher_and_student_do_not_draw_alike_from_one_row():
    ours, theirs = (writer(by=by).write(range(9), 2) for by in ("student", "teacher"))
    assert all(example.log_probs is None for example in theirs)
    assert sum(left.tokens == right.tokens for left, right in zip(ours, theirs, strict=True)) < 3


def test_a_row_with_a_prompt_of_the_teachers_own():
    rows = [replace(ROWS[0], teacher_prompt=[91, 92, 93], prompt_length=1)]
    length = len(Prompts(ROWS, max_tokens=64, max_new_tokens=8)[0].tokens)
    read = []

    class Reading(SeededGenerator):
        def generate(self, prompts, sampling):
            read.extend(prompts)
            return super().generate(prompts, sampling)

    for by in ("student", "teacher"):
        example = writer(Reading(), by=by, rows=rows).write([0], 0)[0]
        assert example.tokens[:length] == ROWS[0].tokens[:length]
        seen = example.for_teacher()
        assert seen.tokens == [91, 92, 93, *ROWS[0].tokens[1:length], *example.tokens[length:]]
        assert seen.num_targets == example.num_targets > 0
    assert read[0].tokens == tuple(ROWS[0].tokens[:length])
    assert read[0].teacher_tokens == read[1].tokens == (91, 92, 93, *ROWS[0].tokens[1:length])


# ---------------------------------------------------------------- rewards


def _by_length(row: int, completion) -> float:
    return float(row + len(completion.tokens))


def test_a_reward_counts_against_those_of_the_other_answers():
    rewards = np.array([_by_length(row, c) for row, c in enumerate(_completions(range(9)))])
    found = [example.reward for example in writer(reward=_by_length).write(range(9), 0)]
    expected = [reward - np.delete(rewards, place).mean() for place, reward in enumerate(rewards)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    assert writer(reward=_by_length).write([5], 0)[0].reward == 0
    assert writer(reward=_by_length).write([], 0) == []


def _completions(rows):
    kept = []

    class Keeping(SeededGenerator):
        def generate(self, prompts, sampling):
            kept.extend(super().generate(prompts, sampling))
            return kept

    writer(Keeping()).write(rows, 0)
    return kept


@dataclass
class Half:
    """One of two ranks; what the other has is known."""

    rank: int
    other: np.ndarray
    world_size: int = 2

    def sum(self, numbers):
        return list(numbers)

    def gather(self, numbers):
        return [self.other, numbers] if self.rank else [numbers, self.other]


def test_ranks_share_the_baseline():
    alone = [example.reward for example in writer(reward=_by_length).write(range(9), 0)]
    rewards = np.array([_by_length(row, c) for row, c in enumerate(_completions(range(9)))])
    first = writer(reward=_by_length, group=Half(0, rewards[4:])).write(range(4), 0)
    second = writer(reward=_by_length, group=Half(1, rewards[:4])).write(range(4, 9), 0)
    assert [example.reward for example in (*first, *second)] == alone


# ---------------------------------------------------------------- faults, numbers, state


@pytest.mark.parametrize("broken", [float("nan"), float("-inf"), None])
def test_an_answer_without_finite_numbers_is_refused_by_its_row(broken):
    class Breaking(SeededGenerator):
        def generate(self, prompts, sampling):
            made = super().generate(prompts, sampling)
            made[2] = replace(made[2], log_probs=(broken, *made[2].log_probs[1:]) if broken is not None else ())
            return made

    rows = [replace(example, origin=f"rows.jsonl:{example.index}") for example in ROWS]
    with pytest.raises(NonFiniteError, match=r"rows\.jsonl:2: the answer of a seeded generator"):
        writer(Breaking(), rows=rows).write(range(4), 0)


def test_numbers_are_of_steps_that_were_taken():
    made = writer(watch=Watch(WatchConfig()), keep_texts=2, decode=str)
    made.write([8, 7, 6], 0)  # never taken
    assert made.metrics() == {}
    first = made.write(range(9), 1)
    made.step_done()
    assert [text["example"] for text in made.texts()] == [0, 1]
    assert made.texts()[0]["answer"] == str(tuple(first[0].tokens[first[0].prompt_length :]))
    found = made.metrics()
    answers = [len(example.tokens) - example.prompt_length for example in first]
    assert found["rollouts/length"] == pytest.approx(sum(answers) / 9)
    assert set(found) == {f"rollouts/{name}" for name in (
        "length", "cut", "empty", "entropy", "repeated", "staleness", "foreign_ends", "seconds",
    )}  # fmt: skip
    assert made.metrics() == {}
    made.step_done()
    assert made.texts() == []  # taken on other text


def test_the_state_is_that_of_the_last_step_and_goes_on_elsewhere():
    made, through = (writer(watch=Watch(WatchConfig()), reward=_by_length) for _ in range(2))
    for each in (made, through):
        each.write(range(5), 0)
        each.step_done()
    state = json.loads(json.dumps(made.state()))
    made.write(range(9), 1)  # never taken
    assert json.loads(json.dumps(made.state())) == state
    resumed = writer(watch=Watch(WatchConfig()), reward=_by_length)
    resumed.restore(state)
    for each in (resumed, through):
        each.write(range(3, 9), 1)
        each.step_done()
    left, right = resumed.metrics(), through.metrics()
    assert {**left, "rollouts/seconds": 0} == {**right, "rollouts/seconds": 0}
    assert left["rollouts/reward"] == pytest.approx(mean_reward(), abs=1e-12)
    fresh = writer()
    fresh.restore({})
    assert fresh.metrics() == {}


def mean_reward() -> float:
    """The mean reward over both writings of the test above."""
    kept = []
    made = writer(reward=lambda row, completion: kept.append(_by_length(row, completion)) or kept[-1])
    made.write(range(5), 0)
    made.write(range(3, 9), 1)
    return sum(kept) / len(kept)


def test_the_teachers_numbers_have_names_of_their_own():
    made = writer(by="teacher")
    made.write(range(3), 0)
    made.step_done()
    assert all(name.startswith("rollouts/teacher/") for name in made.metrics())
