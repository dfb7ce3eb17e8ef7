"""The command line as a user meets it: bad input gets one line and exit code 2 before torch is imported; nothing secret is shown."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Runs the real command line and tells on its way out whether torch was imported.
PROBE = """
import atexit, sys
atexit.register(lambda: open(sys.argv[-1], "w").write(str("torch" in sys.modules)))
from potstill.cli import main
main(sys.argv[1:-1])
"""
RECIPE = """student: {{path: {folder}/model}}
data: {{train: {folder}/rows.jsonl}}
training: {{steps: 1}}
run: {{folder: {folder}/run}}
"""
ROWS = [{"instruction": "Add 1 and 2", "input": "", "output": "3"}, {"instruction": "Add 2 and 2", "input": "", "output": "4"}]


def potstill(*arguments: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    told = Path(cwd or "/tmp") / f"told-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments, str(told)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100", **(environment or {})},
    )
    done.imported_torch = told.read_text() == "True"  # type: ignore[attr-defined]
    told.unlink()
    return done


@pytest.fixture
def place(tmp_path) -> Path:
    """A recipe, rows, and a folder that looks like a model as far as can be seen without torch."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def recipe(place: Path, old: str, new: str) -> None:
    text = (place / "r.yaml").read_text()
    assert old in text
    (place / "r.yaml").write_text(text.replace(old, new))


ABSENT = next((name for name in ("mlflow", "trackio", "wandb", "tensorboard") if find_spec(name) is None), "")
MISTAKES = {
    "unknown key": (lambda p: recipe(p, "steps: 1", "stps: 1, steps: 1"), ":3: training.stps: unknown key; did you mean steps?"),
    "duplicate key": (lambda p: recipe(p, "steps: 1", "steps: 1, steps: 2"), ":3: training.steps stands twice"),
    "wrong type": (lambda p: recipe(p, "steps: 1", "steps: few"), ':3: training.steps: must be a whole number; found "few"'),
    "no YAML": (lambda p: recipe(p, "steps: 1}", "steps: 1"), ":4: not YAML"),
    "missing recipe": (lambda p: (p / "r.yaml").unlink(), "no such file"),
    "missing data": (lambda p: (p / "rows.jsonl").unlink(), "rows.jsonl: no such file"),
    "malformed line": (lambda p: (p / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{oops\n"), "rows.jsonl:2: "),
    "missing column": (lambda p: (p / "rows.jsonl").write_text('{"instruction": "x", "input": ""}\n'), "output"),
    "missing student": (lambda p: recipe(p, "/model", "/modle"), "student.path: "),
    "no model": (lambda p: (p / "model" / "config.json").unlink(), "no config.json there"),
    "missing teacher": (lambda p: recipe(p, "data:", f"teacher: {{path: {p}/teacher}}\ndata:"), "teacher.path: "),
    "missing adapter": (
        lambda p: recipe(p, "data:", f"teacher: {{path: {p}/model, adapter: {p}/nothing}}\ndata:"),
        "potstill finetune",
    ),
    "missing tracker": (lambda p: recipe(p, "/run}", f"/run, trackers: [{ABSENT}]}}"), f"pip install 'potstill[{ABSENT}]'"),
    "teacher not wanted": (lambda p: recipe(p, "data:", f"teacher: {{path: {p}/model}}\ndata:"), "potstill distill"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_before_torch(place, mistake):
    if mistake == "missing tracker" and not ABSENT:
        pytest.skip("every tracker is installed here")
    make, said = MISTAKES[mistake]
    make(place)
    command = "finetune" if mistake == "teacher not wanted" else "check"
    done = potstill(command, "r.yaml", cwd=place)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("potstill: ")
    assert "Traceback" not in done.stderr
    assert not done.imported_torch
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command"),
        (["distill"], "Missing argument"),
        (["distill", "x", "--frsh"], "No such option"),
        (["distill", "qwen2-0.5b-sft"], "potstill finetune"),
        (["evaluate", "nowhere/at/all", "--data", "x.jsonl"], "no such folder"),
        (["evaluate", ".", "--data", "x.jsonl", "--format", "instrct"], "data.format: must be one of instruct"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere", "--output", "x"], "no run here"),
        (["recipes", "show", "qwen2"], "near it"),
        (["capture", "qwen2-0.5b-sft"], "capture: missing; say where the answers go"),
        (["capture", "qwen2-0.5b-from-top100", "capture={path: c}"], "a cache holds answers already"),
        (["capture", "qwen2-7b-top100-capture", "--shard", "0/2"], "--shard 0/2"),
        (["distill", "qwen2-0.5b-from-top100"], "teacher.path: caches/qwen2-7b-top100: no such folder"),
        (["distill", "qwen2-0.5b-sft", "teacher={kind: cach, path: x}"], "teacher.kind: must be one of local, cache, server"),
        (["cache", "mend", "x"], "No such command"),
        (["generate", "qwen2-0.5b-sft"], "generate: missing; say where the answers go"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    done = potstill(*arguments, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert said in done.stderr
    assert not done.imported_torch


def test_help_and_the_library_are_quick_and_import_no_torch(tmp_path):
    for arguments in (["--help"], ["distill", "--help"], ["recipes"], ["recipes", "show", "llama3.2-1b-from-8b"]):
        before = os.times()
        done = potstill(*arguments, cwd=tmp_path)
        after = os.times()
        assert done.returncode == 0, done.stderr
        assert not done.imported_torch
        assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert "kd_ratio: 0.5" in done.stdout
    for command in ("quickstart", "distill", "finetune", "evaluate", "check", "capture", "cache", "recipes", "report", "export"):
        assert command in potstill("--help", cwd=tmp_path).stdout


def test_a_terminal_command_in_a_name_is_written_as_an_escape(place):
    recipe(place, "steps: 1", '"\\e]0;owned\\a\\e[2J": 1, steps: 1')
    done = potstill("check", "r.yaml", cwd=place)
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "\\x1b]0;owned" in done.stderr


def test_a_mistake_of_ours_keeps_its_traceback_and_no_secret(place):
    environment = {"HF_TOKEN": "hf_canaryCANARYcanary0123456789"}
    code = PROBE.replace(
        "main(sys.argv[1:-1])",
        "import potstill.recipes.read as r\ndef broken(*_): raise RuntimeError('x hf_canaryCANARYcanary0123456789')\n"
        "r.read_recipe = broken\nmain(sys.argv[1:-1])",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "r.yaml", str(place / "told")],
        capture_output=True,
        text=True,
        cwd=place,
        env=os.environ | environment,
        timeout=60,
    )
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "canary" not in done.stderr
    assert "***" in done.stderr


def test_an_interrupt_is_exit_code_130(place):
    code = PROBE.replace(
        "main(sys.argv[1:-1])",
        "import potstill.recipes.read as r\ndef broken(*_): raise KeyboardInterrupt\nr.read_recipe = broken\nmain(sys.argv[1:-1])",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "r.yaml", str(place / "told")], capture_output=True, text=True, cwd=place, timeout=60
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
