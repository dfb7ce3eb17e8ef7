"""The run folder: its status, the verdict on each change at resume, logs that count nothing twice, secrets, and one run at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faultfs import without_syncing
from potstill.environment import redact
from potstill.errors import RunFolderError
from potstill.recipe_changes import ALLOWED_CHANGES, recipe_changes
from potstill.run_folder import ROLLOUT_WEIGHTS, RunFolder

RECIPE = {
    "student": {"path": "student", "lora": None},
    "teacher": {"kind": "local", "path": "teacher"},
    "data": {"train": "rows.jsonl", "validation": 0.02, "max_tokens": 128},
    "objective": {"divergence": "forward_kl", "kd_ratio": 0.5, "parameters": {"beta": 0.5}},
    "training": {"epochs": 1, "batch_size": 4, "accumulation": 2, "learning_rate": 1e-5, "save_steps": 10, "early_stopping": None},
    "run": {"folder": "runs/a", "seed": 0, "trackers": ["tensorboard"]},
}


@pytest.fixture(autouse=True)
def _unsynced():
    with without_syncing():
        yield


def _with(changes: dict) -> dict:
    recipe = json.loads(json.dumps(RECIPE))
    for key, value in changes.items():
        section, name = key.split(".")
        recipe[section][name] = value
    return recipe


def test_new_interrupted_finished(tmp_path):
    with RunFolder.open(tmp_path / "runs" / "a", RECIPE) as folder:
        assert folder.status == "new"
        assert folder.checkpoints.is_dir()
    with RunFolder.open(tmp_path / "runs" / "a", RECIPE) as folder:
        assert folder.status == "interrupted"
        assert folder.read_recipe() == RECIPE
        folder.finish({"steps": 3})
        assert folder.status == "finished"
    with RunFolder.open(tmp_path / "runs" / "a", RECIPE) as folder:
        assert folder.status == "finished"
        assert folder.read_summary() == {"steps": 3}
    assert len(RunFolder.read(tmp_path / "runs" / "a").read_sessions()) == 2


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RunFolderError, match=r"thesis\.tex"):
            RunFolder.open(tmp_path, RECIPE, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="a file"):
        RunFolder.open(tmp_path / "thesis.tex", RECIPE)
    with pytest.raises(RunFolderError, match="no run here"):
        RunFolder.read(tmp_path)


def test_fresh_removes_the_run_and_nothing_else(tmp_path):
    with RunFolder.open(tmp_path, RECIPE) as folder:
        folder.append_metrics({"step": 1})
        folder.write_json("evaluation/held_out.json", {"perplexity": 2.0})
        (folder.checkpoints / "step-00000001").mkdir()
        (tmp_path / ROLLOUT_WEIGHTS / "student").mkdir(parents=True)  # of a run that was killed while a server read them
        folder.finish({})
    (tmp_path / "notes.md").write_text("mine")
    with RunFolder.open(tmp_path, _with({"training.learning_rate": 1}), fresh=True) as folder:
        assert folder.status == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "environment.json", "notes.md", "recipe.yaml"]
        assert list(folder.checkpoints.iterdir()) == []


REFUSED = {
    "student.path": "other", "teacher.path": "other", "data.train": "other.jsonl", "objective.divergence": "jsd",
    "objective.kd_ratio": 0.4, "objective.parameters": {"beta": 0.1}, "training.learning_rate": 2e-5, "student.lora": {"rank": 4},
    "data.validation": 0.03,
}  # fmt: skip
REFUSED_ALWAYS = {"training.batch_size": 8, "training.accumulation": 4, "run.seed": 1, "data.max_tokens": 64, "data.packing": False}
ALLOWED = {
    "training.epochs": 2, "training.save_steps": 5, "run.folder": "runs/b", "run.trackers": [], "training.early_stopping": {"patience": 1},
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_a_change_of_what_is_computed_is_refused_and_can_be_overridden(key, tmp_path):
    """F28."""
    RunFolder.open(tmp_path, RECIPE).close()
    with pytest.raises(RunFolderError) as refusal:
        RunFolder.open(tmp_path, _with({key: REFUSED[key]}))
    leaf = {"objective.parameters": "objective.parameters.beta", "student.lora": "student.lora.rank"}.get(key, key)
    assert leaf in str(refusal.value)
    assert f"--override-resume {leaf}" in str(refusal.value)
    with RunFolder.open(tmp_path, _with({key: REFUSED[key]}), override_resume=[leaf]) as folder:
        assert folder.status == "interrupted"
        assert any(leaf in note for note in folder.notes)
    RunFolder.open(tmp_path, _with({key: REFUSED[key]})).close()


@pytest.mark.parametrize("key", REFUSED_ALWAYS)
def test_a_change_that_loses_the_place_in_the_data_cannot_be_overridden(key, tmp_path):
    RunFolder.open(tmp_path, RECIPE).close()
    with pytest.raises(RunFolderError, match=r"(?s)" + key + ".*place in the data"):
        RunFolder.open(tmp_path, _with({key: REFUSED_ALWAYS[key]}), override_resume=[key])


@pytest.mark.parametrize("key", ALLOWED)
def test_a_change_of_how_long_or_how_watched_is_allowed_and_said(key, tmp_path):
    RunFolder.open(tmp_path, RECIPE).close()
    with RunFolder.open(tmp_path, _with({key: ALLOWED[key]})) as folder:
        assert any(key in note for note in folder.notes)
        assert any(key in change for change in folder.read_sessions()[-1]["recipe_changes"])


def test_the_global_batch_may_be_split_otherwise(tmp_path):
    changes = recipe_changes(RECIPE, _with({"training.batch_size": 2, "training.accumulation": 4}))
    assert [change.allowed for change in changes] == ["the same rows in every optimizer step"] * 2


def test_an_absent_key_equals_null_and_an_unknown_override_is_refused(tmp_path):
    older = json.loads(json.dumps(RECIPE))
    del older["student"]["lora"]
    assert recipe_changes(older, RECIPE) == []
    with pytest.raises(RunFolderError, match=r"training\.lr"):
        recipe_changes(RECIPE, RECIPE, ["training.lr"])


def test_every_allowed_change_is_a_key_of_the_recipe():
    from pydantic import BaseModel

    from potstill.models.config import ModelConfig
    from potstill.rollouts.config import LocalGeneratorConfig, RolloutsConfig, VllmGeneratorConfig
    from potstill.teachers.config import LocalTeacherConfig
    from potstill.training.config import TrainingConfig

    sections: dict[str, list[type[BaseModel]]] = {
        "training": [TrainingConfig], "student": [ModelConfig], "teacher": [LocalTeacherConfig], "rollouts": [RolloutsConfig],
        "rollouts.generator": [LocalGeneratorConfig, VllmGeneratorConfig],
    }  # fmt: skip
    for key in ALLOWED_CHANGES.keys() - {"capture", "generate"}:
        section, _, name = key.rpartition(".")
        assert section == "run" or any(name in config.model_fields for config in sections[section]), key


@pytest.mark.parametrize(
    ("teacher", "key", "value", "allowed"),
    [
        ({"kind": "cache", "path": "a"}, "path", "/another/mount/a", True),
        ({"kind": "local", "path": "a"}, "path", "b", False),
        ({"kind": "server", "url": "http://a", "model": "m", "top_k": 20}, "url", "http://b", True),
        ({"kind": "server", "url": "http://a", "model": "m", "top_k": 20}, "top_k", 10, False),
        ({"kind": "cache", "path": "a"}, "kind", "local", False),
    ],
)
def test_what_may_change_of_a_teacher_depends_on_its_kind(teacher, key, value, allowed):
    for wrap in (lambda it: it, lambda it: {"kind": "ensemble", "teachers": {"one": it}}):
        before, after = {"teacher": wrap(teacher)}, {"teacher": wrap(teacher | {key: value})}
        (change,) = recipe_changes(before, after)
        assert (change.allowed is not None) == allowed, change


def test_more_epochs_open_a_finished_run_again(tmp_path):
    with RunFolder.open(tmp_path, RECIPE) as folder:
        folder.finish({})
    before = sorted(path.name for path in tmp_path.iterdir())
    assert RunFolder.look(tmp_path, _with({"run.trackers": []})) == "finished"
    assert RunFolder.look(tmp_path, _with({"training.epochs": 2})) == "interrupted"
    with pytest.raises(RunFolderError, match="kd_ratio"):
        RunFolder.look(tmp_path, _with({"objective.kd_ratio": 0.1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert RunFolder.look(tmp_path / "absent", RECIPE) == "new"
    with RunFolder.open(tmp_path, _with({"run.trackers": []})) as folder:
        assert folder.status == "finished"
    with RunFolder.open(tmp_path, _with({"run.trackers": [], "training.epochs": 2})) as folder:
        assert folder.status == "interrupted"


def test_lines_after_the_committed_step_are_cut_back(tmp_path):
    """N4: a step that is done again is counted once."""
    with RunFolder.open(tmp_path, RECIPE) as folder:
        for step in (1, 2, 3, 4):
            folder.append_samples(step, 0, [step])
            folder.append_metrics({"step": step, "loss": float("nan") if step == 1 else 1.0})
        with (tmp_path / "samples.jsonl").open("a") as file:
            file.write('{"step": 5, "ep')
    with RunFolder.open(tmp_path, RECIPE) as folder:
        assert folder.cut_back(2) == 2
        assert [line["step"] for line in folder.read_samples()] == [1, 2]
        assert folder.read_metrics() == [{"step": 1, "loss": None}, {"step": 2, "loss": 1.0}]
        folder.append_samples(3, 0, [3])
        assert [line["step"] for line in folder.read_samples()] == [1, 2, 3]
        assert folder.cut_back(None) == 3
        assert folder.read_samples() == []


def test_other_ranks_write_nothing(tmp_path):
    with RunFolder.open(tmp_path, RECIPE) as first:
        other = RunFolder.open(tmp_path, RECIPE, writer=False)
        before = sorted(path.name for path in tmp_path.rglob("*"))
        other.append_metrics({"step": 1})
        other.append_samples(1, 0, [1])
        other.write_json("evaluation/x.json", {})
        other.sync_logs()
        other.cut_back(None)
        other.finish({})
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
        assert first.status == "new"


# ---------------------------------------------------------------- one run, one folder (F29)


def test_a_second_run_is_refused_at_once_and_told_by_whom(tmp_path):
    with RunFolder.open(tmp_path, RECIPE), pytest.raises(RunFolderError, match=f"process {os.getpid()}, since 20"):
        RunFolder.open(tmp_path, RECIPE, fresh=True)
    RunFolder.open(tmp_path, RECIPE).close()


RACE = """
import json, os, signal, sys
from potstill import storage
from potstill.errors import RunFolderError
from potstill.run_folder import RunFolder
storage.OPERATIONS.fsync = lambda descriptor: None
storage.OPERATIONS.sync_folder = lambda path: None
root = sys.argv[1]
RunFolder.open(root, {"a": 1}).close()
for trial in range(60):
    start, go = os.pipe()
    told, tell = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(start, 1)                       # both begin when the parent closes its end
            try:
                folder = RunFolder.open(root, {"a": 1})
                os.write(tell, b"w")
                if os.fork() == 0:                  # a data worker that outlives its run
                    os.close(tell); os.close(told)
                    import time; time.sleep(0.5)
                    os._exit(0)
                signal.pause()                      # the winner is killed while it holds the lock
            except RunFolderError:
                os.write(tell, b"l")
            os._exit(0)
        children.append(child)
    os.close(go); os.close(start)
    answers = sorted(os.read(told, 1) for _ in children)
    assert answers == [b"l", b"w"], (trial, answers)
    for child in children:
        try: os.kill(child, signal.SIGKILL)
        except ProcessLookupError: pass
        os.waitpid(child, 0)
    os.close(told); os.close(tell)
    third = RunFolder.open(root, {"a": 1})          # takes over at once
    assert any("ended without a word" in note for note in third.notes), third.notes
    third.close()
print("ok")
"""


def test_of_two_runs_one_wins_and_a_killed_winner_is_succeeded(tmp_path):
    finished = subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert finished.stdout == "ok\n", finished.stderr


# ---------------------------------------------------------------- secrets (F35)


def test_no_secret_reaches_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanary")
    monkeypatch.setenv("AN_INNOCENT_VALUE", "innocent-canary")
    monkeypatch.setattr(sys, "argv", ["/home/someone/bin/potstill", "distill", "teacher.url=https://name:canary@host/v1"])
    recipe = _with({"teacher.path": "https://name:canary@host/canary-0123456789", "data.train": "hf_canarycanarycanary/x"})
    with RunFolder.open(tmp_path, recipe) as folder:
        folder.append_metrics({"step": 1, "note": "canary-0123456789"})
        folder.write_json("evaluation/x.json", {"model": "https://u:canary@h"})
        folder.finish({"url": "https://u:canary@h"})
    RunFolder.open(tmp_path, recipe).close()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or "canary" not in path.read_text(), path.name
    assert "innocent" not in (tmp_path / "environment.json").read_text()
    assert "someone" not in (tmp_path / "environment.json").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:word@host/path@x", "https://***@host/path@x"),
        ("a@b.c and runs/a", "a@b.c and runs/a"),
        ("key sk-abcdefghijklmnopqrstuvwx.", "key ***."),
    ],
)
def test_redaction(text, expected):
    assert redact({"a": [text, 1, None]}) == {"a": [expected, 1, None]}


def test_reading_a_run_needs_no_torch(tmp_path):
    RunFolder.open(tmp_path, RECIPE).close()
    script = f"import sys; from potstill.run_folder import RunFolder; RunFolder.read({str(tmp_path)!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60).stdout == "False\n"


def test_a_damaged_recipe_says_what_to_do(tmp_path):
    RunFolder.open(tmp_path, RECIPE).close()
    Path(tmp_path / "recipe.yaml").write_text("{")
    with pytest.raises(RunFolderError, match="--fresh"):
        RunFolder.open(tmp_path, RECIPE)
    RunFolder.open(tmp_path, RECIPE, fresh=True).close()


def test_what_was_written_for_steps_that_are_done_again_is_cut_back_too(tmp_path):
    """Several lines a step, beside the other logs; a reader sees them, `--fresh` takes them away."""
    with RunFolder.open(tmp_path / "run", RECIPE) as folder:
        for step in (1, 2, 3):
            folder.append_rollouts(step, [{"answer": f"{step}{place}", "log_prob": -float("inf")} for place in "ab"])
        folder.append_rollouts(4, [])
        folder.sync_logs()
        assert folder.cut_back(2) == 1
        assert [line["answer"] for line in folder.read_rollouts()] == ["1a", "1b", "2a", "2b"]
        assert folder.read_rollouts()[0] == {"step": 1, "answer": "1a", "log_prob": None}
    RunFolder.read(tmp_path / "run").append_rollouts(3, [{"answer": "of a reader"}])
    assert len(RunFolder.read(tmp_path / "run").read_rollouts()) == 4
    with RunFolder.open(tmp_path / "run", RECIPE, fresh=True) as folder:
        assert folder.read_rollouts() == []
