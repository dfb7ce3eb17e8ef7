"""`potstill quickstart`: the main job on data that the package makes itself, offline, on two cores, in minutes.

It trains a teacher on many tasks, then students on few of them: by cross-entropy alone, and by cross-entropy with forward KL to the
teacher; everything else of a pair is the same. All are ordinary runs of ordinary recipes, so a broken quickstart is resumed by the
same command. What it measures and says stands in quickstart_results.py; it expects no outcome.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from potstill import storage
from potstill.data import tasks
from potstill.errors import UsageError
from potstill.recipes.assemble import run
from potstill.recipes.quickstart_models import Size, scramble, train_tokenizer, write_start
from potstill.recipes.quickstart_results import Contestants, measure, show
from potstill.recipes.schema import Recipe
from potstill.reporting.page import write_report

MARK = "quickstart.json"
_OWN = ("data", "start", "teacher", "scrambled", "evaluation", "report.html", MARK)


_TEACHER = Size(width=128, layers=3, heads=4, initializer_range=0.08)
_STUDENT = Size(width=96, layers=2, heads=4, initializer_range=0.1)


@dataclass(frozen=True)
class Plan:
    """How large everything is. Chosen on the validation tasks for five minutes on two cores; see docs/lab_log.md."""

    vocabulary_size: int = 768
    max_tokens: int = 256
    teacher: Size = _TEACHER
    student: Size = _STUDENT
    teacher_rows: int = 30_000
    transfer_rows: int = 2_000
    validation_rows: int = 180
    test_rows: int = 450
    teacher_steps: int = 2_400
    student_steps: int = 800
    batch_size: int = 2
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    curve_points: int = 8
    seeds: tuple[int, ...] = (0, 1, 2, 3)


def quickstart(
    folder: Path | str = "runs/quickstart", *, fresh: bool = False, scramble_teacher: bool = False, plan: Plan | None = None,
    quiet: bool = False, console: Console | None = None,
) -> Path:  # fmt: skip
    """Runs what is not finished yet, prints a table and a picture, writes report.html, and returns the folder.

    `fresh` removes what an earlier quickstart left in the folder. `scramble_teacher` lets the students learn from the teacher with its
    weights shuffled, beside the honest ones: there is nothing left to learn from it, so a gain that remains is a mistake of ours.
    """
    with _one_thread():
        return _quickstart(Path(folder), plan or Plan(), console or Console(), fresh, scramble_teacher, quiet)


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a shared machine threads that wait for one another make products this small slower; and on one thread a run repeats bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quickstart(folder: Path, plan: Plan, console: Console, fresh: bool, scramble_teacher: bool, quiet: bool) -> Path:
    began = time.monotonic()
    _claim(folder, plan, fresh)
    trainings = len(plan.seeds) * 2 + 1
    console.print(
        f"A teacher learns {plan.teacher_rows:,} tasks; then students learn {plan.transfer_rows:,} other ones, alone and from the "
        f"teacher, with {len(plan.seeds)} seeds. {trainings} short trainings; everything goes to {folder}.", highlight=False, markup=False,
    )  # fmt: skip
    _write_tasks(folder, plan, console, quiet)
    runs = _recipes(folder, plan, scramble_teacher)
    for number, (name, recipe) in enumerate(runs.items(), 1):
        console.print(f"[bold]{number}/{len(runs)}[/] {name}: {_described(name)}", highlight=False)
        run(recipe, command="distill" if recipe.teacher else "finetune", quiet=quiet)
        if name == "teacher" and scramble_teacher:
            scramble(folder / "teacher" / "student", folder / "scrambled")
    contestants = Contestants(
        teacher=folder / "scrambled" if scramble_teacher else folder / "teacher" / "student",
        without={seed: folder / f"sft-{seed}" for seed in plan.seeds},
        taught={seed: folder / f"{_taught(scramble_teacher)}-{seed}" for seed in plan.seeds},
        is_scrambled=scramble_teacher,
    )
    record = measure(contestants, folder, max_tokens=plan.max_tokens, console=console, quiet=quiet)
    storage.make_folder(folder / "evaluation")
    storage.write_json(folder / "evaluation" / f"{'scrambled' if scramble_teacher else 'quickstart'}.json", record)
    show(record, contestants, console)
    page = write_report([folder])
    console.print(f"{time.monotonic() - began:.0f} s. The loss curves are in {page}", highlight=False, markup=False)
    return folder


def _taught(scrambled: bool) -> str:
    return "kd-scrambled" if scrambled else "kd"


def _described(name: str) -> str:
    kind = name.rpartition("-")[0] or name
    return {
        "teacher": "the teacher, on many tasks",
        "sft": "a student by cross-entropy alone",
        "kd": "the same student by cross-entropy and forward KL to the teacher",
        "kd-scrambled": "the same student, from the teacher with its weights shuffled",
    }[kind]


# ---------------------------------------------------------------- what is written before the trainings


def _claim(folder: Path, plan: Plan, fresh: bool) -> None:
    """Makes the folder a quickstart of this plan. Raises UsageError where it holds another or something else."""
    mark, stated = folder / MARK, json.loads(json.dumps(asdict(plan)))
    if mark.is_file() and fresh:
        runs = [entry.name for entry in folder.iterdir() if entry.name.startswith(("sft-", "kd-"))]
        for name in (*runs, *_OWN):
            storage.remove(folder / name)
    if mark.is_file() and json.loads(mark.read_bytes()) != stated:
        raise UsageError(f"{folder}: holds a quickstart of other sizes; start over with --fresh, or choose another folder")
    if not mark.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder}: is neither empty nor a quickstart; choose another folder")
        storage.make_folder(folder)
        storage.write_json(mark, stated)


def _write_tasks(folder: Path, plan: Plan, console: Console, quiet: bool) -> None:
    """data/*.jsonl of the four splits, and start/: tokenizer and configuration of a teacher and a student without weights."""
    if (folder / "start").is_dir():
        return
    storage.make_folder(folder / "data")
    splits: dict[tasks.Split, int] = {
        "train": plan.teacher_rows, "transfer": plan.transfer_rows, "validation": plan.validation_rows, "test": plan.test_rows,
    }  # fmt: skip
    with Progress(console=console, disable=quiet, transient=True) as progress:
        bar = progress.add_task("Tasks and tokenizer", total=len(splits) + 1)
        for split, num in splits.items():
            rows = tasks.make(split, num, seed=0)
            storage.write_text(_data(folder, split), "".join(json.dumps(row) + "\n" for row in rows))
            if split == "train":
                tokenizer = train_tokenizer(rows, plan.vocabulary_size)
            progress.advance(bar)
        write_start(folder / "start", tokenizer, {"teacher": plan.teacher, "student": plan.student}, longest=plan.max_tokens)
        progress.advance(bar)


def _data(folder: Path, split: tasks.Split) -> Path:
    return folder / "data" / f"{split}.jsonl"


# ---------------------------------------------------------------- the recipes


def _recipes(folder: Path, plan: Plan, scrambled: bool) -> dict[str, Recipe]:
    """Run names and recipes, in the order in which they run. A pair of students differs in its teacher and in nothing else."""
    chosen = {"teacher": _recipe(folder, plan, "teacher", "teacher", "train", plan.teacher_steps, seed=0)}
    source = folder / "scrambled" if scrambled else folder / "teacher" / "student"
    for seed in plan.seeds:
        names: dict[str, Path | None] = {f"sft-{seed}": None, f"{_taught(scrambled)}-{seed}": source}
        for name, teacher in names.items():
            chosen[name] = _recipe(folder, plan, name, "student", "transfer", plan.student_steps, seed=seed, teacher=teacher)
    return chosen


def _recipe(
    folder: Path, plan: Plan, name: str, model: str, split: tasks.Split, steps: int, *, seed: int, teacher: Path | None = None
) -> Recipe:
    said: dict[str, Any] = {
        "student": {"path": str(folder / "start" / model), "weights": "random"},
        "data": {
            "train": str(_data(folder, split)), "validation": str(_data(folder, "validation")), "format": "instruct",
            "max_tokens": plan.max_tokens, "packing": True,
        },
        "training": {
            "steps": steps, "batch_size": plan.batch_size, "learning_rate": plan.learning_rate, "scheduler": "cosine",
            "warmup_steps": min(plan.warmup_steps, steps // 4), "weight_decay": 0.01, "adam_beta2": 0.98, "precision": "float32",
            "save_steps": max(1, steps // 2), "eval_steps": max(1, steps // plan.curve_points), "keep_checkpoints": 1,
            "logging_steps": max(1, steps // 25), "compile": "off",  # nothing to win at this size, and compilers differ
        },
        "run": {"folder": str(folder / name), "seed": seed},
    }  # fmt: skip
    if teacher is not None:
        said |= {
            "teacher": {"kind": "local", "path": str(teacher)},
            "objective": {"divergence": "forward_kl", "kd_ratio": 0.5, "temperature": 1.0},
        }
    return Recipe.model_validate(said)
