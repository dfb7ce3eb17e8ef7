"""What goes wrong in a run: numbers that are not finite, signals in every phase; what evaluation measures, what is refused."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from faultfs import without_syncing
from potstill.errors import DataError, InterruptedRun, NonFiniteError
from potstill.run_folder import RunFolder
from potstill.training.checkpoint import latest_checkpoint, load_checkpoint
from potstill.training.seam import DistillationTrainer
from small_runs import Run, digest, execute, furthest, make_distiller, weights

RUN = Run(num_examples=22, num_validation=5).but(epochs=2, save_steps=100, eval_steps=3)


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _inject(monkeypatch, where: str, step: int) -> None:
    """Makes the loss, or a single gradient, not finite in the step after `step`."""
    guard = DistillationTrainer.refuse_non_finite

    def before(trainer):
        if trainer.state.global_step == step:
            if where == "loss":
                trainer.measures.add(*[torch.tensor(float("nan"))] * 3)
            else:
                trainer.grad_norm = float("inf")
        guard(trainer)

    monkeypatch.setattr(DistillationTrainer, "refuse_non_finite", before)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_never_stepped(where, tmp_path, monkeypatch):
    expected = digest(weights(execute(replace(RUN).but(epochs=None, steps=4, scheduler="constant"), tmp_path / "until")[0]))
    run = RUN.but(epochs=None, steps=12, scheduler="constant")
    _inject(monkeypatch, where, 4)
    distiller = make_distiller(run)
    with pytest.raises(NonFiniteError, match=r"step 5.*weights are those of step 4"):
        execute(run, tmp_path / "run", distiller=distiller)
    assert digest(weights(distiller)) == expected
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.step == 4
    assert found.path is not None
    assert digest(load_checkpoint(found.path).tensors["weights"]) == expected
    incident = json.loads((tmp_path / "run" / "non_finite.json").read_text())[0]
    monkeypatch.undo()
    execute(run, tmp_path / "run")
    fifth = RunFolder.read(tmp_path / "run").read_samples()[4]
    assert (incident["step"], incident["examples"]) == (5, fifth["examples"])


def test_a_real_gradient_that_is_not_finite_is_found(tmp_path):
    """Not injected: weights so large that the softmax of attention gives no number."""
    distiller = make_distiller(RUN)
    with torch.no_grad():
        distiller.student.inner.get_output_embeddings().weight.mul_(float("inf"))
    before = {name: tensor.clone() for name, tensor in weights(distiller).items()}
    with pytest.raises(NonFiniteError, match="step 1"):
        execute(RUN, tmp_path / "run", distiller=distiller)
    for name, tensor in weights(distiller).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


def test_steps_may_be_skipped_and_are_counted(tmp_path, monkeypatch):
    """The optimizer does not see a skipped step at all: its weights, moments and step count are those of a run without it."""
    _inject(monkeypatch, "gradient", 4)
    run = RUN.but(epochs=None, steps=5, scheduler="constant", non_finite={"skip": 1})
    skipped, summary = execute(run, tmp_path / "run")
    monkeypatch.undo()
    four, _ = execute(run.but(steps=4), tmp_path / "four")
    assert summary.non_finite_steps == 1
    assert digest(weights(skipped)) == digest(weights(four))
    states = [load_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints").path).tensors["optimizer"] for name in ("run", "four")]
    assert digest(states[0]) == digest(states[1])
    assert RunFolder.read(tmp_path / "run").read_metrics()[-2]["non_finite_steps"] == 1


def test_one_more_than_may_be_skipped_stops_the_run(tmp_path, monkeypatch):
    guard = DistillationTrainer.refuse_non_finite

    def before(trainer):
        trainer.grad_norm = float("nan")
        guard(trainer)

    monkeypatch.setattr(DistillationTrainer, "refuse_non_finite", before)
    with pytest.raises(NonFiniteError, match="step 3"):
        execute(RUN.but(non_finite={"skip": 2}), tmp_path / "run")
    assert [incident["step"] for incident in json.loads((tmp_path / "run" / "non_finite.json").read_text())] == [1, 2, 3]
    with pytest.raises(NonFiniteError, match="step 3"):  # a resumed run does not begin to count anew
        execute(RUN.but(non_finite={"skip": 2}), tmp_path / "run")


# ---------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with without_syncing():
        path = tmp_path_factory.mktemp("unbroken") / "run"
        distiller, summary = execute(RUN, path)
    return digest(weights(distiller)), summary, RunFolder.read(path).read_metrics()


PHASES = {
    "before the first step": ("begin", 1, 0),
    "between micro-batches": ("training_step", 6, 2),
    "before a step": ("refuse_non_finite", 5, 5),
    "in evaluation": ("answer", 6 * 1 + 1, 3),
    "at the last step": ("step_done", 12, 12),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_commits_and_the_run_goes_on_from_there(phase, number, unbroken, tmp_path, monkeypatch):
    method, call, step = PHASES[phase]
    inner, calls = getattr(DistillationTrainer, method), 0

    def counted(trainer, *arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return inner(trainer, *arguments, **keywords)

    monkeypatch.setattr(DistillationTrainer, method, counted)
    former = signal.getsignal(number)
    with pytest.raises(InterruptedRun, match=f"interrupted at step {step} of 12") as raised:
        execute(RUN, tmp_path / "run")
    monkeypatch.undo()
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) == former
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").step == step
    resumed, summary = execute(RUN, tmp_path / "run")
    assert digest(weights(resumed)) == unbroken[0]
    assert (summary.best_step, summary.best_loss) == (unbroken[1].best_step, unbroken[1].best_loss)
    evaluations = [[(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line] for lines in (
        unbroken[2], RunFolder.read(tmp_path / "run").read_metrics())]  # fmt: skip
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("num_examples", [22, 24])
def test_a_signal_in_the_last_evaluation_leaves_no_step_to_take(num_examples, tmp_path, monkeypatch):
    """At the end of an epoch and inside of one: the run that goes on evaluates, and trains no further."""
    steps = 8 if num_examples == 22 else 6
    run = replace(RUN, num_examples=num_examples).but(epochs=None, steps=steps, eval_steps=100, scheduler="constant")
    straight, _ = execute(run, tmp_path / "straight")
    answer = DistillationTrainer.answer

    def asked(trainer, batch, needs):
        if not trainer.distiller.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(trainer, batch, needs)

    monkeypatch.setattr(DistillationTrainer, "answer", asked)
    with pytest.raises(InterruptedRun):
        execute(run, tmp_path / "run")
    monkeypatch.undo()
    resumed, summary = execute(run, tmp_path / "run")
    assert digest(weights(resumed)) == digest(weights(straight))
    assert summary.steps == steps
    lines = [RunFolder.read(tmp_path / name).read_metrics() for name in ("run", "straight")]
    evaluations = [[line["eval_loss"] for line in part if "eval_loss" in line] for part in lines]
    assert evaluations[0] == evaluations[1] != []


STUBBORN = """
import os, signal, sys
from potstill.interruption import SignalWatch
with SignalWatch() as watch:
    os.kill(os.getpid(), signal.SIGTERM)
    print(watch.received, flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
print("still here")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(number):
    done = subprocess.run([sys.executable, "-c", STUBBORN, str(int(number))], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + number
    assert done.stdout == "15\n"
    assert "again to leave at once" in done.stderr


# ---------------------------------------------------------------- evaluation


def test_the_validation_loss_does_not_depend_on_its_batches(tmp_path):
    metrics = []
    for name, keys in {"one": {"batch_size": 1, "accumulation": 4}, "five": {"batch_size": 4, "accumulation": 1}}.items():
        execute(RUN.but(epochs=None, steps=1, **keys), tmp_path / name)
        metrics.append([line for line in RunFolder.read(tmp_path / name).read_metrics() if "eval_loss" in line])
    for key in ("eval_loss", "eval_loss/ce", "eval_loss/kd"):
        assert metrics[0][0][key] == pytest.approx(metrics[1][0][key], abs=1e-6)
    line = metrics[0][0]
    assert line["eval_loss"] == pytest.approx(0.5 * line["eval_loss/ce"] + 0.5 * line["eval_loss/kd"], abs=1e-6)


def test_what_a_line_of_metrics_holds(tmp_path):
    execute(RUN, tmp_path / "run")
    lines = RunFolder.read(tmp_path / "run").read_metrics()
    wanted = {"step", "epoch", "loss", "loss/ce", "loss/kd", "learning_rate", "grad_norm", "tokens_per_second", "target_tokens", "peak_gib"}
    assert all(wanted <= line.keys() for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 12]
    for line in (line for line in lines if "loss" in line):
        assert line["loss"] == pytest.approx(0.5 * line["loss/ce"] + 0.5 * line["loss/kd"], abs=1e-5)


def test_trackers_write_into_the_run_folder(tmp_path):
    from potstill.training.trainer import train
    from small_runs import examples, make_teacher, opened

    pytest.importorskip("tensorboard")
    with opened(tmp_path / "run", RUN) as folder:
        train(
            make_distiller(RUN), make_teacher(), examples(8), None, RUN.config(), folder, seed=0, pad_token=0,
            trackers=["tensorboard"], quiet=True,
        )  # fmt: skip
    assert list(Path(folder.trackers).rglob("events.out.tfevents*"))


# ---------------------------------------------------------------- what is refused, and what is not there


def test_an_empty_training_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="the training set is empty"):
        execute(replace(RUN, num_examples=0), tmp_path / "run")


def test_examples_without_a_target_add_nothing(tmp_path):
    """Neither to the numerator nor to the denominator: the same weights as without them."""
    from potstill.batch import Example
    from potstill.training.trainer import train
    from small_runs import examples, make_teacher, opened

    clean = examples(6, seed=4)
    mute = [Example([7, 8, 9, 10], [False] * 4, index) for index in (6, 7)]
    results = []
    for name, rows, size in (("clean", clean, 6), ("mixed", [*clean, *mute], 8)):
        run = RUN.but(batch_size=size, accumulation=1, epochs=None, steps=3)
        distiller = make_distiller(run)
        with opened(tmp_path / name, run) as folder:
            train(distiller, make_teacher(), rows, None, run.config(), folder, seed=0, pad_token=0, quiet=True)
        results.append(weights(distiller))
    assert furthest(*results) < 1e-6


def test_no_pickle_is_read_or_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    execute(RUN.but(epochs=None, steps=3, save_steps=1), tmp_path / "run")
    execute(RUN.but(epochs=None, steps=5, save_steps=1), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_one_process_opens_no_socket(tmp_path, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a listening socket")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    execute(RUN.but(epochs=None, steps=2), tmp_path / "run")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("student", ["plain", "lora"])
def test_bfloat16_computes_in_bfloat16_and_learns_in_float32(student, tmp_path):
    run = replace(RUN, student=student).but(precision="bf16")
    distiller, _ = execute(run, tmp_path / "run")
    exact, _ = execute(run.but(precision="float32"), tmp_path / "exact")
    assert {tensor.dtype for tensor in weights(distiller).values()} == {torch.float32}
    distance = furthest(weights(distiller), weights(exact))
    moved = furthest(weights(exact), weights(make_distiller(run)))
    assert 0 < distance < 0.2 * moved
