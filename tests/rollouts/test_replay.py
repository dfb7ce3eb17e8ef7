"""The replay buffer and its author: first in first out, alike on all ranks, pushed when a step is done, and back after a break."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from potstill.batch import Example
from potstill.rollouts.author import Alone
from potstill.rollouts.buffer import Record, ReplayBuffer, gathered, joined, parted
from potstill.rollouts.config import ReplayConfig
from potstill.rollouts.endings import Endings
from potstill.rollouts.prompts import Prompts
from potstill.rollouts.replay import ReplayAuthor
from potstill.rollouts.writer import Writer
from potstill.rollouts.writing import Sampling, uniform
from seeded_generator import END, SeededGenerator
from small_runs import examples

FULL = Example(
    [5, 1, 2**31 - 1, 0], [False, False, True, True], 17, "Ünïcödé 漢/data.jsonl:18", "röute", [0.0, 0.0, -1.25, -1e-30], -0.1, [9, 8, 7], 2
)
PLAIN = Example([4, 5], [False, True], 0)
VARIANTS = [
    FULL, PLAIN, replace(FULL, log_probs=None), replace(FULL, reward=None), replace(FULL, reward=0.0), replace(FULL, teacher_prompt=None),
    replace(PLAIN, log_probs=[0.0, -0.5]), replace(PLAIN, reward=1.5, origin="a"), replace(PLAIN, route="b"),
]  # fmt: skip


# ---------------------------------------------------------------- records and the buffer


@pytest.mark.parametrize("example", VARIANTS, ids=range(len(VARIANTS)))
def test_an_example_comes_back_from_its_record(example):
    record = Record.of(example, 12345678901, 99)
    assert (record.row, record.step, record.example()) == (12345678901, 99, example)


def test_records_come_apart_as_they_were_joined():
    records = [Record.of(example, row, row + 1) for row, example in enumerate(VARIANTS)]
    again = list(parted(*joined(records)))
    assert [(record.row, record.step, record.example()) for record in again] == [(r, r + 1, e) for r, e in enumerate(VARIANTS)]
    assert list(parted(*joined([]))) == []


def _records(rows, step=0):
    return [Record.of(replace(PLAIN, index=row), row, step) for row in rows]


def test_the_oldest_leave_first():
    buffer = ReplayBuffer(3)
    assert not buffer.full
    buffer.push(_records([1, 2]))
    assert not buffer.full
    buffer.push(_records([3, 4]))
    assert buffer.full
    assert [record.row for record in buffer] == [2, 3, 4]
    buffer.push(_records(range(5, 10)))
    assert [record.row for record in buffer] == [7, 8, 9]


def test_a_draw_repeats_nothing_and_is_a_function_of_seed_and_step():
    buffer = ReplayBuffer(50)
    buffer.push(_records(range(50)))
    drawn = {step: [record.row for record in buffer.draw(8, seed=1, step=step)] for step in range(400)}
    assert all(len(set(rows)) == 8 for rows in drawn.values())
    again, otherwise = ([record.row for record in buffer.draw(8, seed=seed, step=7)] for seed in (1, 2))
    assert drawn[7] == again != otherwise
    counts = np.bincount([row for rows in drawn.values() for row in rows], minlength=50)
    # 3,200 draws of 50: chi-square with 49 degrees of freedom is beyond 86 once in a thousand times.
    assert ((counts - 64.0) ** 2 / 64.0).sum() < 86


def test_of_a_small_buffer_each_is_drawn_before_any_again():
    buffer = ReplayBuffer(50)
    buffer.push(_records(range(3)))
    rows = [record.row for record in buffer.draw(7, seed=1, step=1)]
    assert sorted(rows.count(row) for row in range(3)) == [2, 2, 3]
    with pytest.raises(ValueError, match="empty buffer"):
        ReplayBuffer(3).draw(1, seed=1, step=1)


def test_a_buffer_comes_back_and_a_smaller_one_keeps_the_newest():
    buffer = ReplayBuffer(20)
    buffer.push([Record.of(example, row, row) for row, example in enumerate(VARIANTS)])
    tensors = buffer.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int64, torch.float64}
    same, smaller, new = ReplayBuffer(20), ReplayBuffer(4), ReplayBuffer(20)
    same.restore(tensors)
    smaller.restore(tensors)
    new.restore({})
    assert [record.example() for record in same] == VARIANTS
    assert [record.example() for record in smaller] == VARIANTS[-4:]
    assert len(new) == 0


def test_an_empty_buffer_comes_back_from_disk(tmp_path):
    from potstill import storage

    storage.write_tensors(tmp_path / "x.safetensors", ReplayBuffer(3).tensors())
    buffer = ReplayBuffer(3)
    buffer.push(_records([1]))
    from safetensors.torch import load_file

    buffer.restore(load_file(tmp_path / "x.safetensors"))
    assert len(buffer) == 0


# ---------------------------------------------------------------- ranks


class Threads:
    """Several ranks as threads of one process: what each gives is there for all once all have given it."""

    def __init__(self, world_size):
        self.world_size, self._given, self._barrier = world_size, [None] * world_size, threading.Barrier(world_size, timeout=20)

    def of(self, rank):
        return _Rank(self, rank)

    def exchange(self, rank, value):
        self._given[rank] = value
        self._barrier.wait()
        everything = list(self._given)
        self._barrier.wait()
        return everything


class _Rank:
    def __init__(self, threads, rank):
        self._threads, self.rank, self.world_size = threads, rank, threads.world_size

    def sum(self, numbers):
        return [sum(column) for column in zip(*self._threads.exchange(self.rank, list(numbers)), strict=True)]

    def gather(self, numbers):
        return self._threads.exchange(self.rank, np.array(numbers))


def test_what_ranks_gather_is_in_the_order_of_the_rows():
    group = Threads(2)
    shares, found = [[7, 1], [3]], [None, None]

    def work(rank):
        found[rank] = [record.row for record in gathered(_records(shares[rank]), group.of(rank).gather)]

    _on_threads(work, 2)
    assert found == [[1, 3, 7], [1, 3, 7]]


def _on_threads(work, count):
    errors = []

    def guarded(rank):
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


# ---------------------------------------------------------------- the author

ROWS = examples(40, seed=4)
STEPS = 30
CONFIG = ReplayConfig(capacity=20, start=0.7)


def _author(config=CONFIG, *, group=None, other=False, reward=None):
    prompts = Prompts(ROWS, max_tokens=64, max_new_tokens=8)
    group = group or Alone()

    def writer(by):
        return Writer(
            prompts, SeededGenerator(), Sampling(max_new_tokens=8), Endings([END], cut_answers="drop"), seed=3, by=by, group=group,
            reward=reward if by == "student" else None,
        )  # fmt: skip

    return ReplayAuthor(writer("student"), writer("teacher") if other else None, config, seed=3, num_steps=STEPS, group=group)


def _window(step):
    return [int(row) for row in np.random.default_rng(step).permutation(len(ROWS))[: 6 if step % 5 else 3]]


def _share(rows, rank, world_size):
    return rows[rank::world_size]


def _take(author, step, rows):
    """One whole step: what is learned from, by rows."""
    (stream, weight), = author.streams(step)
    assert weight == 1.0
    written = None if stream == "dataset" else author.write(stream, rows, step)
    author.step_done(step + 1)
    return stream, written


def test_a_run_is_the_naive_loop_of_the_paper():
    """Against a reference in lists: which text is learned at every step, fresh and replayed, and what lies in the buffer."""
    author, twin = _author(), _author()
    writer = twin._writers["student"]
    memory: list[Example] = []
    seen = []
    for step in range(STEPS):
        rows, r, phi = _window(step), uniform(3, step), CONFIG.start
        stream, written = _take(author, step, rows)
        if r >= phi:
            assert (stream, written) == ("dataset", None)
            seen.append("dataset")
        elif r < phi * (1 - step / STEPS) or len(memory) < CONFIG.capacity:
            expected = writer.write(rows, step)
            assert (stream, written) == ("student", expected)
            by_row = sorted(zip(rows, expected, strict=True), key=lambda pair: pair[0])
            memory = [*memory, *(example for _, example in by_row if any(example.is_target))][-CONFIG.capacity :]
            seen.append("fresh")
        else:
            assert stream == "student"
            assert all(example in memory for example in written)
            assert len({id_of(example) for example in written}) == len(rows)
            seen.append("replayed")
        assert [record.example() for record in author.buffer] == memory
    assert min(seen.count(branch) for branch in ("dataset", "fresh", "replayed")) >= 4


def id_of(example):
    return (tuple(example.tokens), tuple(example.log_probs))


def test_what_is_replayed_keeps_the_log_probabilities_that_it_was_drawn_with():
    author = _author(replace_config(start=1.0, capacity=6))
    first = author.write("student", [3, 1, 2, 5, 4, 6, 7, 8], 0)
    author.step_done(1)
    step = next(step for step in range(1, STEPS) if author.branch(step) == "replayed")
    again = author.write("student", [9, 10], step)
    assert all(example in first for example in again)
    assert all(any(value < 0 for value in example.log_probs) for example in again)


def replace_config(**changes):
    return ReplayConfig(**{**CONFIG.model_dump(), **changes})


def test_text_is_kept_once_its_step_is_done():
    author = _author(replace_config(start=1.0))
    author.write("student", [0, 1, 2], 0)
    state = author.state()
    assert len(author.buffer) == 0
    other = _author(replace_config(start=1.0))
    other.restore(*state)
    other.write("student", [0, 1, 2], 0)
    other.step_done(1)
    author.step_done(1)
    assert [record.example() for record in author.buffer] == [record.example() for record in other.buffer]
    assert len(author.buffer) > 0


def test_answers_without_a_target_are_not_kept():
    author = _author(replace_config(start=1.0, capacity=1000))
    written = [example for step in range(10) for example in author.write("student", _window(step), step) if not author.step_done(step + 1)]
    assert 0 < sum(example.num_targets > 0 for example in written) < len(written)
    for step in range(10):
        author.write("student", _window(step), step)
        author.step_done(step + 1)
    assert all(record.example().num_targets for record in author.buffer)


def test_the_teacher_writes_where_it_is_asked_to():
    author = _author(replace_config(start=0.0), other=True)
    (stream, _), = author.streams(0)
    written = author.write("teacher", [1, 2], 0)
    assert stream == "teacher"
    assert all(example.log_probs is None for example in written)
    author.step_done(1)
    assert len(author.buffer) == 0


def _validations(author, step):
    if step % 4 == 3:
        author.validated(2.0 + 0.3 * step)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_one_process(world_size):
    """The same text for the same rows at every step, the same buffer on every rank; a rank may have no row."""
    def reward(row, completion):
        return float(len(completion.tokens))

    config = replace_config(start=0.3)
    alone, expected = _author(config, reward=reward), []
    for step in range(STEPS):
        rows = _window(step)
        stream, written = _take(alone, step, rows)
        expected.append((stream, dict(zip(rows, written, strict=True)) if written else None))
        _validations(alone, step)
    threads, states = Threads(world_size), [None] * world_size

    def work(rank):
        author = _author(config, group=threads.of(rank), reward=reward)
        for step in range(STEPS):
            rows = _share(_window(step), rank, world_size)
            rows = [] if step == 5 and rank == 0 else rows if step != 5 else [*rows, *_share(_window(step), 0, world_size)]
            stream, written = _take(author, step, rows)
            assert (stream, written) == (expected[step][0], written and [expected[step][1][row] for row in rows]), step
            _validations(author, step)
        states[rank] = author.state()

    _on_threads(work, world_size)
    tensors, numbers = alone.state()
    for theirs, their_numbers in states:
        assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)
        assert {key: their_numbers[key] for key in ("schedule", "line")} == {key: numbers[key] for key in ("schedule", "line")}
    assert {stream for stream, _ in expected} == {"student", "dataset"}
    assert numbers["line"]["replayed"] > 1


@pytest.mark.parametrize("broken_at", range(0, STEPS, 3))
def test_an_author_comes_back_anywhere(broken_at):
    """Through JSON, as a checkpoint holds it; the text of a step that was written and not taken is written again."""
    import json

    config = replace_config(start=0.3)
    unbroken, broken = _author(config), _author(config)
    for step in range(STEPS):
        if step == broken_at:
            (stream, _), = broken.streams(step)
            if stream == "student":
                broken.write(stream, _window(step), step)
            tensors, numbers = broken.state()
            broken = _author(config)
            broken.restore(tensors, json.loads(json.dumps(numbers)))
            broken.begin(step)
        assert _take(broken, step, _window(step)) == _take(unbroken, step, _window(step))
        for author in (broken, unbroken):
            _validations(author, step)
    assert broken.metrics() == pytest.approx({**unbroken.metrics(), "rollouts/seconds": pytest.approx(0, abs=10)})


def test_the_log_says_what_was_learned_from():
    author = _author(replace_config(start=0.8, capacity=10))
    branches, ages = [], []
    for step in range(STEPS):
        branches.append(author.branch(step))
        if branches[-1] == "replayed":
            written = {record.example().origin + repr(id_of(record.example())): record.step for record in author.buffer}
            found = author.write("student", _window(step), step)
            ages += [step - written[example.origin + repr(id_of(example))] for example in found]
        elif branches[-1] == "fresh":
            author.write("student", _window(step), step)
        author.step_done(step + 1)
    metrics = author.metrics()
    assert metrics["rollouts/fresh"] == pytest.approx(branches.count("fresh") / STEPS)
    assert metrics["rollouts/replayed"] == pytest.approx(branches.count("replayed") / STEPS)
    assert metrics["rollouts/age"] == pytest.approx(sum(ages) / len(ages))
    assert (metrics["rollouts/threshold"], metrics["rollouts/buffer"]) == (0.8, 10.0)
    assert "rollouts/age" not in author.metrics()


def test_a_stream_that_nobody_writes_is_our_mistake():
    with pytest.raises(ValueError, match="nobody here writes the stream teacher"):
        _author().write("teacher", [1], 0)


def test_ratios_to_replayed_text_are_of_the_student_as_it_is_now():
    """One with the weights that wrote it; afterwards q_now(y) / q_then(y), by a forward pass that knows neither buffer nor loss."""
    from potstill.data.collation import collate
    from potstill.objectives.policy import PolicyGradient
    from potstill.rollouts.local import LocalGenerator
    from small_runs import STOPS, VOCABULARY, make_student, make_teacher

    student, teacher = make_student("plain"), make_teacher()
    writer = Writer(
        Prompts(ROWS, max_tokens=64, max_new_tokens=8), LocalGenerator(student, stop_ids=STOPS, pad_token=0), Sampling(max_new_tokens=8),
        Endings(STOPS), seed=3, by="student",
    )  # fmt: skip
    author = ReplayAuthor(writer, None, ReplayConfig(start=1.0, capacity=4), seed=3, num_steps=4, group=Alone())
    author.write("student", [0, 1, 2, 3], 0)
    author.step_done(1)
    step = next(step for step in range(1, 4) if author.branch(step) == "replayed")
    objective = PolicyGradient(support="written", ratio="truncate", ratio_limit=1e6, vocabulary_size=VOCABULARY)

    def ratios():
        batch = collate([[example] for example in author.write("student", [9, 5, 7, 6], step)], pad_token=0)
        signal = teacher.score(batch, objective.needs)
        with torch.no_grad():
            by_row = objective.total(student.rows(batch), student.head(), signal, batch).by_row
            logits = student.inner(batch.tokens).logits[..., :VOCABULARY].double().log_softmax(-1)
        rows, targets = batch.target_rows()
        now = logits.reshape(-1, VOCABULARY)[rows, targets]
        assert batch.log_probs is not None
        return by_row["importance"].double(), (now - batch.at_targets(batch.log_probs).double()).exp()

    found, _ = ratios()
    assert torch.allclose(found, torch.ones_like(found), atol=1e-4)
    with torch.no_grad():
        student.inner.lm_head.weight.add_(torch.randn(VOCABULARY, 32, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    found, expected = ratios()
    assert (found - 1).abs().max() > 0.05
    assert torch.allclose(found, expected, rtol=1e-4)
