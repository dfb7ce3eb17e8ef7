"""Runs of the real command line in forked children, on small models, with something done to them at a chosen moment."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tiny import save_pair

ROWS, STEPS_AN_EPOCH, EPOCHS, MICRO_BATCHES = 13, 4, 2, 2
STEPS = STEPS_AN_EPOCH * EPOCHS
SAVED_EVERY = 3


class Server:
    """The fork server, and what a run left behind."""

    def __init__(self, folder: Path):
        self.folder = folder
        script = Path(__file__).with_name("fork_server.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            self.close()
            raise AssertionError("the fork server did not start; its reason stands above")

    def run(self, run: Path, *changes: str, at: str | None = None, number: int = 1, action: int | str = signal.SIGKILL, **more) -> int:
        """`potstill distill` of the recipe into `run`; see `command`."""
        arguments = ["distill", str(self.folder / "recipe.yaml"), f"run.folder={run}", "--quiet", *changes]
        return self.command(run, arguments, at=at, number=number, action=action, **more)

    def command(
        self, run: Path, arguments: list[str], *, at: str | None = None, number: int = 1, action: int | str = signal.SIGKILL,
        environment: dict[str, str] | None = None, file_bytes: int | None = None,
    ) -> int:  # fmt: skip
        """Runs a command line in a child and returns its exit status; a death by signal n is -n. What it says goes to `log(run)`.

        `action` (a signal, "vanish" or "say_sockets") is done at the n-th passage through the point `at`. `file_bytes` is the limit on
        a file's size that the child gets from the kernel.
        """
        request = {
            "arguments": arguments, "run": str(run), "log": str(self.log(run)), "at": at, "number": number,
            "action": action if isinstance(action, str) else int(action), "environment": environment or {}, "file_bytes": file_bytes,
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def finish(self, run: Path, *changes: str) -> str:
        """The same command again, to the end; returns what it said."""
        self.log(run).unlink(missing_ok=True)
        assert self.run(run, *changes) == 0, self.log(run).read_text()
        return self.log(run).read_text()

    def log(self, run: Path) -> Path:
        return run.with_suffix(".log")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def write_recipe(folder: Path) -> None:
    save_pair(folder / "student", seed=0, attention_dropout=0.2)
    save_pair(folder / "teacher", seed=1)
    with (folder / "train.jsonl").open("w") as file:
        for row in range(ROWS):
            answer = f"{row} + {row + 1} = {2 * row + 1}." * (1 + row % 3)
            file.write(json.dumps({"instruction": f"Add {row} and {row + 1}.", "input": "", "output": answer}) + "\n")
    shutil.copy(folder / "train.jsonl", folder / "validation.jsonl")
    (folder / "recipe.yaml").write_text(f"""
student: {{path: {folder}/student, lora: {{rank: 4, alpha: 8, dropout: 0.1, targets: [q_proj, down_proj]}}}}
teacher: {{kind: local, path: {folder}/teacher}}
data: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl, format: instruct, max_tokens: 128, packing: false}}
objective: {{divergence: jsd, kd_ratio: 0.5, beta: 0.3}}
training: {{epochs: {EPOCHS}, batch_size: 2, accumulation: 2, learning_rate: 1.0e-2, warmup_steps: 2, precision: float32,
            save_steps: {SAVED_EVERY}, eval_steps: 4, logging_steps: 1, keep_checkpoints: 2}}
run: {{folder: {folder}/run, seed: 0}}
""")
