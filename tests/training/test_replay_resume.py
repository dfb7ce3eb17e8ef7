"""A run on replayed text, broken off anywhere, ends with the bits of the unbroken one: weights, buffer, threshold and log. Two ranks
keep the same buffer as one process, and plain text beside is learned in an order of its own.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faultfs import without_syncing
from potstill.errors import ConfigError, DataError, InterruptedRun
from potstill.rollouts.author import Alone
from potstill.run_folder import RunFolder
from replayed_runs import RANKS, REPLAY, RUN, execute, make_parts, plain
from small_runs import digest, examples, furthest, weights

WORKER = Path(__file__).resolve().parents[1] / "replayed_runs.py"
STEPS, TURNS = 12, 4  # two streams of two micro-batches


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "run"
    with without_syncing():
        distiller, author, _ = execute(path)
    return weights(distiller), plain(author), RunFolder.read(path)


def _log(folder: RunFolder) -> list[dict]:
    clocks = ("tokens_per_second", "seconds_per_step", "peak_gib", "rollouts/seconds", "eval_seconds")
    return [{key: value for key, value in line.items() if key not in clocks} for line in folder.read_metrics()]


def _timeless(state: dict) -> dict:
    """Without the seconds that writing took."""
    state = json.loads(json.dumps(state))
    from potstill.rollouts.watch import Tally

    for writer in state["writers"].values():
        tally = Tally.of(writer["line"])
        tally.seconds = 0.0
        writer["line"] = tally.numbers
    return state


def _assert_as_unbroken(path: Path, unbroken) -> None:
    distiller, author, summary = execute(path)
    assert digest(weights(distiller)) == digest(unbroken[0])
    assert _timeless(plain(author)) == _timeless(unbroken[1])
    here = RunFolder.read(path)
    assert _log(here) == _log(unbroken[2])
    assert here.read_samples() == unbroken[2].read_samples()
    assert here.read_rollouts() == unbroken[2].read_rollouts()
    assert summary.resumed_from is not None


def _killed(path: Path, owner, method: str, call: int, signal_number: int = signal.SIGKILL) -> int:
    """Trains in a child that sends itself a signal at the `call`-th entry of a method; returns how the child ended."""
    child = os.fork()
    if child == 0:
        code, inner, calls = 1, getattr(owner, method), 0

        def counted(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal_number)
            return inner(*arguments, **keywords)

        try:
            torch.set_num_threads(1)
            setattr(owner, method, counted)
            execute(path)
            code = 0
        except InterruptedRun as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---------------------------------------------------------------- what the run is


def test_the_run_takes_every_branch_and_the_threshold_moves(unbroken):
    """The other tests are worth something: all three kinds of step come before and after the commits at 3, 6 and 9."""
    lines = [line for line in _log(unbroken[2]) if "loss" in line]
    kinds = "".join("f" if line["rollouts/fresh"] else "r" if line["rollouts/replayed"] else "d" for line in lines)
    assert set(kinds) == set("frd")
    assert "f" in kinds[6:]
    assert "r" in kinds[6:9]
    thresholds = [line["rollouts/threshold"] for line in lines]
    assert thresholds[0] == REPLAY["start"] < thresholds[6] < thresholds[-1]
    assert unbroken[1]["line"] == {}
    assert lines[-1]["rollouts/buffer"] == REPLAY["capacity"]


def test_the_threshold_is_what_the_validation_losses_make_of_it(unbroken):
    """Replayed from the log: the cross-entropy counts, not the divergence, which a choice of objective scales."""
    level, threshold, found = None, REPLAY["start"], []
    for line in _log(unbroken[2]):
        if "eval_loss/ce" in line:
            loss = line["eval_loss/ce"]
            if level is None:
                level = loss
            elif loss >= level + REPLAY["margin"]:
                level, threshold = loss, min(threshold + REPLAY["rise"], 1.0)
        elif "loss" in line:
            found.append((line["rollouts/threshold"], threshold))
    assert all(logged == expected for logged, expected in found)


def test_the_loss_is_what_is_written_and_the_weighted_text(unbroken):
    for line in _log(unbroken[2]):
        if "loss" in line:
            own = line["loss/student"] if "loss/student" in line else line["loss/dataset"]
            assert line["loss"] == pytest.approx(own + 0.25 * line["loss/text"], rel=1e-5)


# ---------------------------------------------------------------- broken off


_TURNS = [14, 27, 39]
_OTHER_TURNS = [turn for turn in range(13, STEPS * TURNS + 1) if turn not in _TURNS]


@pytest.mark.parametrize("turn", [*_TURNS, *(pytest.param(turn, marks=pytest.mark.slow) for turn in _OTHER_TURNS)])
def test_killed_in_a_micro_batch(turn, unbroken, tmp_path):
    from potstill.training.seam import DistillationTrainer

    assert _killed(tmp_path / "run", DistillationTrainer, "training_step", turn) == -signal.SIGKILL
    assert max((tmp_path / "run" / "checkpoints").glob("step-*")).name == f"step-{(turn - 1) // TURNS // 3 * 3:08d}"
    _assert_as_unbroken(tmp_path / "run", unbroken)


def test_killed_while_the_student_writes(unbroken, tmp_path):
    """In the middle of an answer of the fourth step, whose text is then written again."""
    from potstill.rollouts.local import LocalGenerator

    assert _killed(tmp_path / "run", LocalGenerator, "_step", 50) == -signal.SIGKILL
    _assert_as_unbroken(tmp_path / "run", unbroken)


@pytest.mark.parametrize("method", ["write", "step_done", "validated"])
def test_killed_in_the_author(method, unbroken, tmp_path):
    from potstill.rollouts.replay import ReplayAuthor

    call = {"write": 5, "step_done": 8, "validated": 4}[method]
    assert _killed(tmp_path / "run", ReplayAuthor, method, call) == -signal.SIGKILL
    _assert_as_unbroken(tmp_path / "run", unbroken)


def test_a_signal_while_the_student_writes_commits_the_step_before(unbroken, tmp_path):
    from potstill.rollouts.writer import Writer

    assert _killed(tmp_path / "run", Writer, "write", 3, signal.SIGTERM) == 128 + signal.SIGTERM
    assert max((tmp_path / "run" / "checkpoints").glob("step-*")).name == "step-00000002"
    _assert_as_unbroken(tmp_path / "run", unbroken)


@pytest.mark.parametrize("part", ["buffer", "schedule"])
def test_without_what_the_checkpoint_holds_the_run_is_another(part, unbroken, tmp_path, monkeypatch):
    """The law has teeth: a resumed run that forgets the buffer or the threshold ends elsewhere."""
    from potstill.rollouts.buffer import ReplayBuffer
    from potstill.rollouts.schedule import Schedule
    from potstill.training.seam import DistillationTrainer

    assert _killed(tmp_path / "run", DistillationTrainer, "training_step", 25) == -signal.SIGKILL
    monkeypatch.setattr({"buffer": ReplayBuffer, "schedule": Schedule}[part], "restore", lambda self, given: None)
    distiller, _, _ = execute(tmp_path / "run")
    assert digest(weights(distiller)) != digest(unbroken[0])


# ---------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """The folder in which two ranks have left their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_are_one_process(name, ranks, unbroken):
    states = [json.loads((ranks / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert states[0]["integers"] == states[1]["integers"] == unbroken[1]["integers"]
    assert states[0]["floats"] == states[1]["floats"] == pytest.approx(unbroken[1]["floats"], abs=1e-4)
    assert states[0]["schedule"] == states[1]["schedule"]
    assert states[0]["schedule"] == pytest.approx(unbroken[1]["schedule"], abs=1e-4)
    # Twelve steps of 0.05 blow up what the ranks' sums differ by in their last bits.
    assert furthest(load_file(ranks / f"{name}.safetensors"), unbroken[0]) < 5e-5
    assert furthest(unbroken[0], weights(make_parts(RUN, Alone())[0])) > 0.1


# ---------------------------------------------------------------- plain text beside


def test_the_order_of_the_text_is_its_own_and_a_function_of_the_step(tmp_path):
    from potstill.training.turns import Feed

    _, _, rows, _, beside = make_parts(RUN, Alone())
    seen = [beside.order.window(step).rows for step in range(3)]
    assert sorted(row for window in seen for row in window) == list(range(9))
    assert beside.order.seed != RUN.seed
    from potstill.training.feeding import Rows
    from potstill.training.order import GlobalOrder

    training = Rows(rows, pad_token=0, seed=3, max_tokens=None)
    feed = Feed(GlobalOrder(training.lengths, seed=3, batch_size=2, accumulation=2), training, None, None, beside)
    for step in range(4):
        turns = [turn for rank in range(2) for turn in feed.turns(feed.order.window(step), rank, 2)]
        texts = [index for turn in turns if turn.stream == "text" for index in turn.batch.examples]
        assert sorted(texts) == sorted(beside.order.window(step).rows)
        assert {turn.weight for turn in turns if turn.stream == "text" and turn.batch.examples} == {0.25}
        assert len({turn.number for turn in turns if turn.batch.examples}) == sum(bool(turn.batch.examples) for turn in turns)


def test_text_beside_is_the_sum_of_two_runs_gradients(tmp_path):
    """One step of plain SGD-like size: with and without the text the loss differs by its weighted cross-entropy alone."""
    run = RUN.but(steps=1)
    found = {}
    for text in (True, False):
        execute(tmp_path / str(text), run=run, text=text)
        found[text] = next(line for line in _log(RunFolder.read(tmp_path / str(text))) if "loss" in line)
    assert found[True]["loss"] - 0.25 * found[True]["loss/text"] == pytest.approx(found[False]["loss"], abs=1e-6)
    assert "loss/text" not in found[False]
    assert found[True]["grad_norm"] != found[False]["grad_norm"]


def _beside(texts=None, **config):
    from potstill.rollouts.config import TextConfig
    from potstill.training.beside import make_beside

    return make_beside(examples(4) if texts is None else texts, TextConfig(path="texts.txt", **config), RUN.config(), seed=3, pad_token=0)


def test_its_micro_batches_may_have_another_size():
    beside = _beside(batch_size=1)
    assert (beside.order.batch_size, beside.order.accumulation, beside.weight) == (1, 2, 1.0)
    assert _beside().order.batch_size == 2


def test_without_text_there_is_nothing_to_learn_beside():
    for texts in ([], [example for example in examples(3) if not example.tokens]):
        with pytest.raises(DataError, match=r"rollouts\.text\.path: texts\.txt holds no text"):
            _beside(texts)


def test_ranks_that_cannot_share_it_are_told_the_key(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"rollouts\.text\.batch_size is 1: .*make accumulation a multiple of 4"):
        _beside(batch_size=1)


def test_other_text_is_known_by_its_fingerprint():
    assert _beside().rows.fingerprint != _beside(examples(4, seed=9)).rows.fingerprint
    assert _beside().rows.fingerprint == _beside().rows.fingerprint


def test_text_of_a_step_that_was_refused_is_not_replayed(tmp_path, monkeypatch):
    """What broke one step would break each in which it came again."""
    from potstill.training.seam import DistillationTrainer

    guard = DistillationTrainer.refuse_non_finite

    def broken(trainer):
        if trainer.state.global_step == 2:
            trainer.grad_norm = float("nan")
        guard(trainer)

    monkeypatch.setattr(DistillationTrainer, "refuse_non_finite", broken)
    run = RUN.but(steps=5, eval_steps=100, non_finite={"skip": 1})
    _, author, summary = execute(tmp_path / "run", run=run, replay={"capacity": 1000, "start": 1.0, "schedule": "constant"}, text=False)
    assert summary.non_finite_steps == 1
    assert {record.step for record in author.buffer} == {0, 1, 3, 4}
