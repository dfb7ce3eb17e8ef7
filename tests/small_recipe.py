"""A recipe over a tiny pair of models and 36 sums, and the command line in this process: what tests of whole runs share."""

import json
from pathlib import Path

import pytest

from potstill.cli import main
from tiny import save_pair

RECIPE = """student: {{path: {folder}/student}}
teacher: {{path: {folder}/teacher}}
data: {{train: {folder}/rows.jsonl, validation: 0.1, max_tokens: 96, too_long: truncate_right}}
objective: {{divergence: forward_kl, kd_ratio: 0.5}}
training: {{steps: 4, batch_size: 2, accumulation: 2, learning_rate: 1e-3, precision: float32, logging_steps: 1, save_steps: 2}}
run: {{folder: {folder}/run}}
"""
LORA = "student.lora={rank: 2, alpha: 4, targets: [q_proj, v_proj]}"


def potstill(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code if isinstance(left.value.code, int) else 0


def write_small_recipe(folder: Path) -> Path:
    """`r.yaml`, its models and its rows, in `folder`."""
    save_pair(folder / "student", 0)
    save_pair(folder / "teacher", 1, width=64)
    rows = [{"instruction": f"Add {a} and {b}", "input": "", "output": f"{a} + {b} = {a + b}"} for a in range(6) for b in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "r.yaml").write_text(RECIPE.format(folder=folder))
    return folder
