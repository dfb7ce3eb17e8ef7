"""A run whose validation loss no longer falls ends, gives back its best weights, and goes on where it is asked to."""

import math
from dataclasses import replace

import pytest

from faultfs import without_syncing
from potstill.errors import ConfigError
from small_runs import Run, digest, execute, weights

RUN = Run(num_examples=22, num_validation=5).but(epochs=2, save_steps=100, eval_steps=3)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _with_losses(monkeypatch, losses: list[float]) -> None:
    """Evaluations that find these losses, one after the other."""
    from potstill.training.validation import Validation

    found = iter(losses)
    monkeypatch.setattr(Validation, "means", lambda self, measure, after_batch: [next(found), 0.0, 0.0, 1.0, *[math.nan] * 3])


def test_early_stopping_ends_the_run_and_gives_back_the_best_weights(tmp_path, monkeypatch):
    run = RUN.but(eval_steps=2, early_stopping={"patience": 2}, scheduler="constant", epochs=None, steps=20, keep_checkpoints=1)
    _with_losses(monkeypatch, [5.0, 4.0, 4.5, 4.2, 1.0])
    stopped, summary = execute(run, tmp_path / "run")
    monkeypatch.undo()
    assert (summary.steps, summary.best_step, summary.best_loss, summary.stopped_early) == (8, 4, 4.0, True)
    best, _ = execute(run.but(steps=4, early_stopping=None), tmp_path / "best")
    assert digest(weights(stopped)) == digest(weights(best))
    again, summary = execute(run, tmp_path / "run")
    assert (summary.steps, summary.stopped_early) == (8, True)
    assert digest(weights(again)) == digest(weights(best))


def test_more_patience_lets_a_stopped_run_go_on(tmp_path, monkeypatch):
    run = RUN.but(eval_steps=2, scheduler="constant", epochs=None, steps=10)
    _with_losses(monkeypatch, [5.0, 6.0, 4.0, 6.0, 6.0])
    _, summary = execute(run.but(early_stopping={"patience": 1}), tmp_path / "run")
    assert (summary.steps, summary.best_step, summary.stopped_early) == (4, 2, True)
    _, summary = execute(run.but(early_stopping={"patience": 2}), tmp_path / "run")
    assert (summary.steps, summary.best_step, summary.stopped_early) == (10, 6, True)


def test_a_best_whose_weights_were_not_kept_is_forgotten(tmp_path, monkeypatch):
    """Without early stopping nobody keeps them, and it may be asked for later."""
    run = RUN.but(eval_steps=1, save_steps=3, keep_checkpoints=1, scheduler="constant", epochs=None, steps=3)
    _with_losses(monkeypatch, [1.0, 2.0, 3.0, 2.5, 2.6])
    execute(run, tmp_path / "run")
    _, summary = execute(run.but(steps=5, early_stopping={"patience": 9}), tmp_path / "run")
    assert (summary.steps, summary.best_step, summary.best_loss) == (5, 4, 2.5)


def test_an_improvement_smaller_than_min_delta_is_none(tmp_path, monkeypatch):
    run = RUN.but(eval_steps=2, early_stopping={"patience": 2, "min_delta": 0.3}, epochs=None, steps=20)
    _with_losses(monkeypatch, [5.0, 4.8, 4.75, 4.0])
    _, summary = execute(run, tmp_path / "run")
    assert (summary.steps, summary.best_step) == (6, 2)


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch):
    run = RUN.but(eval_steps=2, early_stopping={"patience": 2}, epochs=None, steps=6)
    _with_losses(monkeypatch, [math.nan, 4.0, math.inf])
    _, summary = execute(run, tmp_path / "run")
    assert (summary.steps, summary.best_step, summary.best_loss) == (6, 4, 4.0)


def test_early_stopping_without_validation_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs a validation set"):
        execute(replace(RUN, num_validation=0).but(early_stopping={"patience": 1}), tmp_path / "run")
