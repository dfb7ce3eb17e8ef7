"""What trackers are shown, with the real packages: one run over a resume, nothing secret, and no failure that ends a run."""

import json
import logging
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest

from faultfs import without_syncing
from potstill.run_folder import RunFolder
from potstill.training import trackers
from potstill.training.trainer import train
from small_runs import Run, digest, examples, make_distiller, make_teacher, weights

RUN = Run(num_examples=8, num_validation=4).but(epochs=None, steps=4, save_steps=2, eval_steps=2)
WANTED = {"loss", "loss/ce", "loss/kd", "learning_rate", "grad_norm", "tokens_per_second", "peak_gib"}
EVALUATED = {"loss", "loss/ce", "loss/kd", "top1_agreement", "entropy", "teacher_entropy"}
SECRET = "a-value-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    for name in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # so that what is set on the way goes back
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    with without_syncing():
        yield


def run(path: Path, names: list[str], *, steps: int = 4):
    """Trains to `steps`, from where the folder stands."""
    config, distiller = RUN.but(steps=steps).config(), make_distiller(RUN)
    recipe = {"run": {"folder": str(path), "note": SECRET}, "training": config.model_dump(mode="json")}
    with RunFolder.open(path, recipe) as folder:
        train(
            distiller, make_teacher(), examples(8), examples(4, seed=77), config, folder, seed=3, pad_token=0, quiet=True, trackers=names,
        )  # fmt: skip
    return distiller


def holds_secret(folder: Path) -> bool:
    return any(SECRET.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_tensorboard_shows_everything_as_one_run_over_a_resume(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", ["tensorboard"], steps=2)
    run(tmp_path / "run", ["tensorboard"], steps=4)
    places = {file.parent for file in (tmp_path / "run" / "trackers").rglob("events.out.tfevents*")}
    assert places == {tmp_path / "run" / "trackers" / "tensorboard"}
    found = EventAccumulator(str(places.pop())).Reload()
    tags = set(found.Tags()["scalars"])
    assert {f"train/{name}" for name in WANTED} | {f"eval/{name}" for name in EVALUATED} <= tags
    lines = {line["step"]: line["loss/kd"] for line in RunFolder.read(tmp_path / "run").read_metrics() if "learning_rate" in line}
    shown = {event.step: event.value for event in found.Scalars("train/loss/kd")}
    assert shown == {step: pytest.approx(value, rel=1e-6) for step, value in lines.items()}
    assert list(shown) == [1, 2, 3, 4]
    assert not holds_secret(tmp_path / "run" / "trackers")
    assert capsys.readouterr().out == ""


def test_wandb_offline_keeps_its_run(tmp_path, capsys):
    pytest.importorskip("wandb")
    run(tmp_path / "run", ["wandb"], steps=2)
    run(tmp_path / "run", ["wandb"], steps=4)
    logs = list((tmp_path / "run" / "trackers").rglob("*.wandb"))
    assert len({file.name for file in logs}) == 1  # run-ID.wandb, once a session
    assert any(b"eval/top1_agreement" in file.read_bytes() for file in logs)
    assert all(b"tokens_per_second" in file.read_bytes() for file in logs)
    assert not holds_secret(tmp_path / "run" / "trackers")
    assert capsys.readouterr().out == ""


def test_mlflow_keeps_its_run_in_a_store_of_files(tmp_path, capsys):
    pytest.importorskip("mlflow")
    run(tmp_path / "run", ["mlflow"], steps=2)
    run(tmp_path / "run", ["mlflow"], steps=4)
    store = tmp_path / "run" / "trackers" / "mlflow"
    shown = {file.name: file.read_text().splitlines() for file in store.rglob("metrics/*")}
    assert {name.replace("/", "_") for name in WANTED} | {f"eval_{name.replace('/', '_')}" for name in EVALUATED} <= shown.keys()
    assert [line.split()[2] for line in shown["loss_kd"]] == ["1", "2", "3", "4"]
    assert [file.read_text() for file in store.rglob("params/training.learning_rate")] == ["0.01"]
    assert not holds_secret(store)
    assert capsys.readouterr().out == ""


def test_trackio_keeps_its_run_on_this_machine(tmp_path, capsys):
    if find_spec("trackio") is None:  # not imported here: it reads where to write when it is
        pytest.skip("trackio is not installed")
    run(tmp_path / "run", ["trackio"], steps=2)
    run(tmp_path / "run", ["trackio"], steps=4)
    (database,) = (tmp_path / "run" / "trackers" / "trackio").glob("potstill*.db")
    with sqlite3.connect(database) as store:
        rows = store.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {"run"}
    assert "eval/top1_agreement" in {key for _, _, metrics in rows for key in json.loads(metrics)}
    assert not holds_secret(tmp_path / "run" / "trackers")
    assert capsys.readouterr().out == ""


class Broken:
    """A tracker's callback that fails at one of its events."""

    def __init__(self, at: str):
        self._at = at

    def _event(self, name: str) -> None:
        if name == self._at:
            raise OSError(28, f"No space left on device, says {SECRET}")

    def on_train_begin(self, *_, **__):
        self._event("begin")

    def on_log(self, *_, **__):
        self._event("log")

    def on_train_end(self, *_, **__):
        self._event("end")


@pytest.mark.parametrize("at", ["make", "begin", "log", "end"])
def test_a_tracker_that_fails_costs_one_warning_and_never_the_run(at, tmp_path, monkeypatch, caplog):
    def make(folder, step):
        if at == "make":
            raise RuntimeError(f"no network, says {SECRET}")
        return Broken(at)

    monkeypatch.setitem(trackers._MAKERS, "tensorboard", make)
    with caplog.at_level(logging.WARNING, "potstill"):
        watched = run(tmp_path / "run", ["tensorboard"])
    assert len(caplog.records) == 1
    assert "tensorboard failed" in caplog.text
    assert SECRET not in caplog.text
    assert digest(weights(watched)) == digest(weights(run(tmp_path / "other", [])))
    assert len([line for line in RunFolder.read(tmp_path / "run").read_metrics() if "learning_rate" in line]) == 4


def test_a_folder_of_trackers_that_cannot_be_written_does_not_end_a_run(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", [], steps=2)
    (tmp_path / "run" / "trackers").write_text("in the way")
    with caplog.at_level(logging.WARNING, "potstill"):
        run(tmp_path / "run", ["tensorboard"], steps=4)
    assert "tensorboard failed" in caplog.text
    assert RunFolder.read(tmp_path / "run").read_metrics()[-1]["step"] == 4
