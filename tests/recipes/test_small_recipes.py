"""The small recipes of the library as a user has them: on what a quickstart leaves behind, from the folder where it was started."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from potstill.recipes.quickstart import Plan, quickstart
from potstill.recipes.quickstart_models import Size
from potstill.run_folder import RunFolder
from small_recipe import potstill

PLAN = Plan(
    vocabulary_size=400, max_tokens=256, teacher=Size(32, 1, 2, 0.15), student=Size(24, 1, 2, 0.2), teacher_rows=120,
    transfer_rows=40, validation_rows=9, test_rows=18, teacher_steps=4, student_steps=4, batch_size=2, curve_points=2, seeds=(0,),
)  # fmt: skip
FEW = ("--quiet", *(f"training.{key}" for key in ("steps=2", "batch_size=4", "warmup_steps=0", "eval_steps=1", "logging_steps=1")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("small")
    quickstart(place / "runs" / "quickstart", quiet=True, plan=PLAN, console=Console(file=io.StringIO()))
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "streams"),
    [
        ("gkd", {"student", "dataset"}),
        ("minillm", {"student", "text"}),
        ("distillm", {"student", "dataset"}),
        ("distillm2", {"student", "teacher"}),
        ("on-policy-policy-gradient", {"student"}),
        ("self-distill", {"student"}),
    ],
)
def test_a_method_runs_on_what_the_quickstart_left(folder, monkeypatch, name, streams):
    monkeypatch.chdir(folder)
    assert potstill("check", f"small-{name}") == 0
    assert potstill("distill", f"small-{name}", *FEW) == 0
    lines = [line for line in RunFolder.read(Path("runs") / f"small-{name}").read_metrics() if "loss" in line]
    learned = {key.partition("/")[2] for line in lines for key in line if key.startswith("loss/")} - {"ce", "kd"}
    assert learned <= streams
    assert learned


@pytest.mark.slow
def test_sequence_level_distillation_is_two_commands(folder, monkeypatch):
    monkeypatch.chdir(folder)
    written = Path("runs/small-seqkd-text/answers.jsonl")
    # Four steps teach nobody to end; here such answers are kept as they are.
    assert potstill("generate", "small-seqkd", "--quiet", "generate.filters={cut: keep, same: keep}") == 0
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert {"instruction", "input", "output"} <= set(rows[0])
    for row in rows:
        row.pop("finish_reason")
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert potstill("finetune", "small-seqkd", "teacher=null", f"data.train={written}", *FEW) == 0
    assert RunFolder.read("runs/small-seqkd").read_summary()["command"] == "finetune"
