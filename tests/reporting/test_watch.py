"""What `potstill watch` shows of a run, while another process writes it, after it was killed, and with hostile text in it."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from potstill.errors import RunFolderError
from potstill.reporting.live import RunReader
from potstill.reporting.watch import Watched, frame, watch
from potstill.run_folder import RunFolder

RECIPE = {
    "student": {"path": "/somewhere/models/small"}, "teacher": {"kind": "local", "path": "org/large"},
    "training": {"epochs": 2, "eval_steps": 10},
    "rollouts": {"author": "student", "watch": {"min_length": 0.2, "min_entropy": 0.1, "max_repeated": 0.5, "max_cut": 0.9}},
    "run": {"seed": 0},
}  # fmt: skip


def line(step: int, **more) -> dict:
    return {
        "step": step, "loss": 3 / step, "loss/ce": 4 / step, "loss/kd": 2 / step, "learning_rate": 1e-4, "grad_norm": 0.5,
        "epoch": step / 20, "tokens_per_second": 1234.0, "seconds_per_step": 0.5, "peak_gib": 1.5, **more,
    }  # fmt: skip


def shown(*paths, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    watch(paths, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def make_run(path, lines, *, finish: bool = False, texts=()):
    with RunFolder.open(path, RECIPE) as folder:
        for values in lines:
            folder.append_metrics(values)
        folder.append_rollouts(lines[-1]["step"] if lines else 0, texts)
        if finish:
            folder.finish({"steps": 40, "seconds": 20.0})
    return path


def test_a_frame_says_how_far_a_run_is_and_how_long_it_needs(tmp_path):
    lines = [line(step) for step in range(1, 16)]
    lines.insert(10, {"step": 10, "eval_loss": 0.7, "eval_top1_agreement": 0.625, "eval_entropy": 1.5, "eval_seconds": 3.0})
    run = make_run(tmp_path / "run", lines)
    now = RunReader(run, "run").look()
    # 40 steps in two epochs of 20; 25 of half a second are left, and the evaluations of steps 20, 30 and 40.
    assert (now.step, now.total, now.seconds_left) == (15, 40, pytest.approx(25 * 0.5 + 3 * 3.0))
    text = shown(run)
    for part in ("run  not running", "models/small from org/large", "step 15 of 40, 38%, 22 s left", "loss (nats per target)",
                 "● divergence",
                 "total 0.2000, cross-entropy 0.2667, divergence 0.1333", "1,234 tokens/s, peak memory 1.500 GiB", "learning rate 0.0001",
                 "validation: total 0.7000, agreement with the teacher 0.6250, entropy 1.500 (step 10)"):  # fmt: skip
        assert part in text
    assert any("⠀" < sign <= "⣿" for sign in text)  # a picture of dots


def test_an_unusual_step_does_not_spoil_the_time_left(tmp_path):
    """The first one compiles; the one after a pause, such as a resume's, begins to count when training does."""
    lines = [line(1, seconds_per_step=600.0), *(line(step) for step in range(2, 11))]
    assert RunReader(make_run(tmp_path / "run", lines), "run").look().seconds_left == pytest.approx(15.0)


def test_a_run_without_a_line_a_torn_line_and_half_written_files(tmp_path):
    run = make_run(tmp_path / "run", [])
    text = shown(run)
    assert "no step is logged yet" in text
    assert "time left not known yet" in text
    (run / "metrics.jsonl").write_text(json.dumps(line(1)) + '\n[1]\nnot json\n{"step": 2, "lo')
    (run / "recipe.yaml").write_text("student: {path: [")
    (run / "environment.json").write_text('{"sess')
    text = shown(run)
    assert "step 1" in text
    assert "recipe.yaml: damaged or half-written" in text


def test_a_torn_line_is_read_once_it_is_whole_and_a_log_that_was_cut_back_is_read_anew(tmp_path):
    run = make_run(tmp_path / "run", [line(1)])
    reader = RunReader(run, "run")
    whole = json.dumps(line(2)) + "\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[:20])
    assert reader.look().step == 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(whole[20:] + json.dumps(line(3)) + "\n")
    assert reader.look().curves["loss"].steps == (1, 2, 3)
    with RunFolder.open(run, RECIPE) as folder:
        folder.cut_back(2)
        folder.append_metrics(line(3, loss=9.0))
    assert reader.look().curves["loss"].values == (3.0, 1.5, 9.0)


KILLED = """
import os, signal, sys
from potstill.run_folder import RunFolder
folder = RunFolder.open(sys.argv[1], {})
folder.append_metrics({"step": 1, "learning_rate": 1.0, "loss": 2.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_and_the_same_one_resumed(tmp_path):
    run = tmp_path / "run"
    subprocess.run([sys.executable, "-c", KILLED, str(run)], check=False, timeout=60)
    assert "not running  it was killed; the same command goes on with it" in shown(run)
    with RunFolder.open(run, {}) as folder:
        folder.append_metrics({"step": 2, "learning_rate": 1.0, "loss": 1.0})
        assert "run  under way" in shown(run)
    assert "run  not running  the same command goes on with it" in shown(run)


def test_text_of_a_model_cannot_command_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m‮gnirts\r[bold]x[/bold] very-secret-value\nnext"
    said = {"by": "student", "prompt": hostile, "answer": hostile * 100, "tokens": 9, "ended": False}
    run = make_run(tmp_path / "run", [line(1)], texts=[said])
    text = shown(run)
    assert not any(sign in text for sign in "\x1b\x07\x9b\r‮")
    assert "very-secret-value" not in text
    assert "\\x1b[2J" in text
    assert "[bold]x[/bold]" in text  # shown, not obeyed
    assert " ⏎ next" in text
    assert "…" in text
    assert "9 tokens, cut" in text


def test_refused_steps_and_a_collapse_are_said(tmp_path):
    health = {"rollouts/length": 20.0, "rollouts/entropy": 2.0, "rollouts/repeated": 0.1, "rollouts/cut": 0.0}
    run = make_run(tmp_path / "run", [line(1, **health), line(2, **{**health, "rollouts/repeated": 0.8}, non_finite_steps=3)])
    text = shown(run)
    assert "warning: 3 steps were not taken" in text
    assert "may be collapsing: 80% of the 4-grams" in text
    assert "collapsing" not in shown(make_run(tmp_path / "other", [line(1, **health), line(2, **health)]))


def test_several_runs_are_a_table_and_a_study_gains_runs(tmp_path):
    make_run(tmp_path / "study" / "runs" / "b", [line(1)], finish=True)
    watched = Watched([tmp_path / "study"])
    assert [now.name for now in watched.look()] == ["runs/b"]
    make_run(tmp_path / "study" / "runs" / "a", [line(4)])
    assert sorted((now.name, now.status) for now in watched.look()) == [("runs/a", "not running"), ("runs/b", "finished")]
    for width in (80, 140):
        console = Console(file=io.StringIO(), width=width)
        console.print(frame(watched.look(), width=width))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("divergence" in text) == (width == 140)
        for part in ("runs/a", "4/40", "took 20 s", "1 of 2 finished"):
            assert part in text


def test_where_there_is_no_run_it_is_said(tmp_path):
    with pytest.raises(RunFolderError, match="neither a run folder"):
        watch([tmp_path])


# ---------------------------------------------------------------- in a terminal, beside another process

WRITER = """
import sys
from potstill.run_folder import RunFolder
with RunFolder.open(sys.argv[1], {"training": {"steps": 8}}) as folder:
    for step in range(1, 9):
        folder.append_metrics({"step": step, "learning_rate": 1.0, "loss": 10.0 / step, "seconds_per_step": 0.3})
        print(step, flush=True)
        if step == 4:
            sys.stdin.readline()
    folder.finish({"steps": 8, "seconds": 3.0})
"""


class Terminal:
    """`potstill watch` behind a pseudo-terminal; everything that it draws is kept."""

    def __init__(self, *arguments: str):
        master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen([sys.executable, "-m", "potstill", *arguments], stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self._master, self.drawn = master, b""

    def until(self, text: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while text.encode() not in self.drawn:
            assert time.monotonic() < deadline, self.drawn.decode(errors="replace")
            try:
                self.drawn += os.read(self._master, 65536)
            except OSError:  # the other end is closed
                break

    def close(self) -> int:
        self.until("never drawn", 60.0)
        os.close(self._master)
        return self.process.wait(timeout=30)


def test_it_follows_a_run_that_another_process_writes_and_leaves_when_it_is_finished(tmp_path):
    script = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        terminal = Terminal("watch", str(tmp_path / "run"))
        terminal.until("step 4 of 8, 50%, 1 s left")
        writer.communicate("go on\n", timeout=60)
    assert terminal.close() == 0
    text = terminal.drawn.decode()
    assert "under way" in text
    assert "step 8 of 8, 100%, took 3 s" in text


def test_ctrl_c_leaves_with_130(tmp_path):
    terminal = Terminal("watch", str(make_run(tmp_path / "run", [line(1)])))
    terminal.until("step 1")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.close() == 130


def test_one_frame_for_scripts_without_torch(tmp_path):
    run = make_run(tmp_path / "run", [line(1)])
    script = (
        "import sys\nfrom potstill.cli import main\ntry:\n    main(['watch', '--once', sys.argv[1]])\nexcept SystemExit as left:\n"
        "    print(left.code, sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, check=False, timeout=60)
    assert "step 1 of 40" in done.stdout
    assert done.stdout.endswith("0 []\n")
    assert done.stderr == ""
