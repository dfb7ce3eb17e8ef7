"""A run that is broken off anywhere and started again ends with the bits of the unbroken run, and sees every example once an epoch."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from faultfs import without_syncing
from potstill.errors import IncompatibleError, RunFolderError
from potstill.run_folder import RunFolder
from small_runs import Run, digest, execute, make_distiller, opened, weights

# Two epochs of 6 steps, the last of each short; dropout, so that the random numbers must come back too.
RUN = Run(student="lora", dropout=0.1, num_examples=22, num_validation=5).but(save_steps=3, eval_steps=4)
STEPS, TURNS = 12, 2


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def in_child(action: Callable[[], None]) -> int:
    """Runs `action` in a fork (torch is imported already) and returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(method: str, call: int, run: Run, path: Path, *, after: bool = False) -> None:
    """Trains in a child that kills itself with SIGKILL at the `call`-th entry (or exit) of a method of the trainer."""
    from potstill.training.saving import Saver
    from potstill.training.seam import DistillationTrainer

    def action() -> None:
        owner = Saver if method in vars(Saver) else DistillationTrainer
        inner, calls = getattr(owner, method), 0

        def counted(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = inner(*arguments, **keywords)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, method, counted)
        execute(run, path)

    assert in_child(action) == -signal.SIGKILL


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with without_syncing():
        path = tmp_path_factory.mktemp("unbroken") / "run"
        distiller, summary = execute(RUN, path)
    return digest(weights(distiller)), summary, RunFolder.read(path)


def _assert_same_as_unbroken(path: Path, unbroken) -> None:
    expected, summary, folder = unbroken
    distiller, resumed = execute(RUN, path)
    assert digest(weights(distiller)) == expected
    assert (resumed.tokens, resumed.target_tokens, resumed.best_step, resumed.best_loss) == (
        summary.tokens, summary.target_tokens, summary.best_step, summary.best_loss,
    )  # fmt: skip
    here = RunFolder.read(path)
    assert here.read_samples() == folder.read_samples()
    losses = [[(line["step"], line.get("loss"), line.get("eval_loss")) for line in f.read_metrics()] for f in (here, folder)]
    assert losses[0] == losses[1]


def test_every_example_is_seen_once_an_epoch(unbroken):
    lines = unbroken[2].read_samples()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for epoch in range(2):
        assert sorted(index for line in lines if line["epoch"] == epoch for index in line["examples"]) == list(range(RUN.num_examples))


def test_a_run_moves_and_dropout_counts(unbroken, tmp_path):
    assert digest(weights(make_distiller(RUN))) != unbroken[0]
    assert digest(weights(execute(replace(RUN, dropout=0.0), tmp_path / "run")[0])) != unbroken[0]


@pytest.mark.parametrize("turn", range(1, STEPS * TURNS + 1))
def test_killed_in_any_micro_batch(turn, unbroken, tmp_path):
    killed_at("training_step", turn, RUN, tmp_path / "run")
    _assert_same_as_unbroken(tmp_path / "run", unbroken)


@pytest.mark.parametrize(
    ("method", "call", "after"), [("evaluate", 1, False), ("evaluate", 2, True), ("commit", 2, False), ("commit", 4, True)]
)
def test_killed_around_evaluation_and_commit(method, call, after, unbroken, tmp_path):
    killed_at(method, call, RUN, tmp_path / "run", after=after)
    _assert_same_as_unbroken(tmp_path / "run", unbroken)


def test_killed_again_and_again(unbroken, tmp_path):
    for turn in (9, 8, 3, 7):
        killed_at("training_step", turn, RUN, tmp_path / "run")
    _assert_same_as_unbroken(tmp_path / "run", unbroken)


def test_a_torn_checkpoint_is_passed_over_and_named(unbroken, tmp_path, caplog):
    killed_at("training_step", 17, RUN, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    victim = next(newest.glob("optimizer-*"))
    victim.write_bytes(victim.read_bytes()[:-5])
    _assert_same_as_unbroken(tmp_path / "run", unbroken)
    assert newest.name in caplog.text


def test_a_finished_run_trains_no_further(tmp_path):
    first, summary = execute(RUN, tmp_path / "run")
    second, again = execute(RUN, tmp_path / "run")
    assert digest(weights(first)) == digest(weights(second))
    assert again.resumed_from == summary.steps == STEPS


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    """The constant schedule does not bend, so the longer run is the one that was never stopped."""
    run = RUN.but(scheduler="constant_with_warmup")
    execute(run.but(steps=7), tmp_path / "run")
    longer, summary = execute(run.but(steps=11), tmp_path / "run")
    assert summary.resumed_from == 7
    assert digest(weights(longer)) == digest(weights(execute(run.but(steps=11), tmp_path / "straight")[0]))


def test_the_schedule_bends_to_a_new_end(tmp_path, monkeypatch):
    from potstill.training.seam import DistillationTrainer

    execute(RUN.but(steps=6), tmp_path / "run")
    used, guard = {}, DistillationTrainer.refuse_non_finite

    def look(trainer):
        used[trainer.state.global_step + 1] = trainer.optimizer.param_groups[0]["lr"]
        guard(trainer)

    monkeypatch.setattr(DistillationTrainer, "refuse_non_finite", look)
    execute(RUN.but(steps=12), tmp_path / "run")
    assert [used[step] for step in (7, 12)] == pytest.approx([1e-2 * 6 / 11, 1e-2 / 11])
    rates = {line["step"]: line["learning_rate"] for line in RunFolder.read(tmp_path / "run").read_metrics() if "loss" in line}
    assert [rates[step] for step in (7, 12)] == pytest.approx([1e-2 * 6 / 11, 1e-2 / 11])


def _break_off(run: Run, path: Path) -> None:
    killed_at("training_step", 9, run, path)


@pytest.mark.parametrize("key", ["batch_size", "learning_rate", "scheduler", "precision"])
def test_a_changed_recipe_is_refused(key, tmp_path):
    _break_off(RUN, tmp_path / "run")
    changed = {"batch_size": 3, "learning_rate": 5e-3, "scheduler": "cosine", "precision": "bf16"}[key]
    with pytest.raises(RunFolderError, match=f"training.{key}"):
        execute(RUN.but(**{key: changed}), tmp_path / "run")


def test_another_cut_of_the_same_global_batch_is_allowed(tmp_path):
    run = replace(RUN, dropout=0.0)
    _break_off(run, tmp_path / "run")
    resumed, summary = execute(run.but(batch_size=4, accumulation=1), tmp_path / "run")
    straight, _ = execute(run, tmp_path / "straight")
    assert summary.resumed_from == 3
    from small_runs import furthest

    assert furthest(weights(resumed), weights(straight)) < 1e-6
    samples = [RunFolder.read(tmp_path / name).read_samples() for name in ("run", "straight")]
    assert samples[0] == samples[1]


def test_other_data_is_refused(tmp_path):
    _break_off(RUN, tmp_path / "run")
    with pytest.raises(IncompatibleError, match="training data"):
        execute(replace(RUN, num_examples=21), tmp_path / "run")


def test_another_adapter_is_refused(tmp_path):
    _break_off(RUN, tmp_path / "run")
    with pytest.raises(IncompatibleError, match="--fresh starts over"):
        execute(replace(RUN, student="lora_head"), tmp_path / "run")


def test_a_run_that_is_to_be_shorter_than_it_is_is_refused(tmp_path):
    execute(RUN.but(steps=6), tmp_path / "run")
    with pytest.raises(IncompatibleError, match="at least 6"):
        execute(RUN.but(steps=4), tmp_path / "run")


def test_only_what_is_trained_is_saved(tmp_path):
    from potstill.training.checkpoint import latest_checkpoint, load_checkpoint

    with opened(tmp_path / "other", RUN):
        pass
    distiller, _ = execute(RUN, tmp_path / "run")
    path = latest_checkpoint(tmp_path / "run" / "checkpoints").path
    assert path is not None
    names = set(load_checkpoint(path).tensors["weights"])
    assert names == {name for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in names)


def test_a_validation_loss_of_drawn_outcomes_does_not_hang_on_what_was_drawn_before(tmp_path, monkeypatch):
    from potstill.objectives.distribution import DistributionMatching
    from potstill.training.distiller import Distiller
    from potstill.training.seam import DistillationTrainer
    from small_runs import VOCABULARY, make_student

    run, evaluate, losses = replace(RUN, student="plain").but(epochs=None, steps=1), DistillationTrainer.evaluate, []
    for draws in (0, 1):
        monkeypatch.setattr(DistillationTrainer, "evaluate", lambda self, ignore_keys=None, n=draws: (torch.rand(n), evaluate(self))[1])
        objective = DistributionMatching(support="samples", parameters={"num_samples": 2}, vocabulary_size=VOCABULARY)
        _, summary = execute(run, tmp_path / str(draws), distiller=Distiller(make_student("plain"), objective))
        losses.append(summary.best_loss)
    assert losses[0] == losses[1]
