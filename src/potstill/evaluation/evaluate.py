"""`evaluate`: models down, tasks across. Prepares everything, measures what was not measured before, compares, and makes one record.

Whatever can be refused without weights is refused before any is read; a result is kept as soon as it is there. Models are loaded one
after another, the teacher once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from potstill import storage
from potstill.errors import ConfigError
from potstill.evaluation.config import EvaluationConfig, refuse_output
from potstill.evaluation.record import EvaluationRecord, ModelRecord, TaskRecord, compare_models
from potstill.evaluation.store import Store
from potstill.evaluation.task import Exam, Outcome, Subject, Task
from potstill.evaluation.tasks import make_tasks
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.identity import weights_digest
from potstill.models.loading import Precision, load_model, load_tokenizer
from potstill.models.proofs import refuse_not_finite
from potstill.models.tokenizers import vocabulary_size

VERSION = 1
"""Of what the numbers mean: raised when a change of code changes a number, so that no older result is taken for it."""
TEACHER = "teacher"


@dataclass(frozen=True)
class _Sitting:
    """One model that sits one task."""

    row: str
    seed: int
    model: LoadingConfig
    task: Task
    exam: Exam
    statement: Mapping[str, Any]
    with_teacher: bool


@dataclass
class _Rows:
    """What is known of each row of the table as it fills."""

    outcomes: dict[tuple[str, str], dict[int, Outcome]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)


def evaluate(
    config: EvaluationConfig, *, output: Path | str | None = None, console: Console | None = None, quiet: bool = False
) -> EvaluationRecord:
    """Measures every model of `config` on every task, compares each with the baseline, and writes the record to `output`.

    A bar is shown on `console` (by default stderr). Raises UsageError and its kinds for what cannot be measured.
    """
    refuse_output(output)
    tasks = make_tasks(config.tasks)
    device, precision = _where(config)
    sittings = _prepare(config, tasks, device, precision)
    rows = _measure(config, sittings, device, precision, console or Console(stderr=True), quiet)
    record = _record(config, tasks, rows, f"{device}, {precision}")
    if output is not None:
        storage.make_folder(Path(output).absolute().parent)
        storage.write_json(Path(output).absolute(), record.to_json())
    return record


def _where(config: EvaluationConfig) -> tuple[str, Precision]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device: {device!r} is no device; say cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device} is asked for, but torch sees no GPU; say cpu")
    return device, config.precision or ("bf16" if kind == "cuda" else "float32")


# ---------------------------------------------------------------- before any weights are loaded


def _prepare(config: EvaluationConfig, tasks: Sequence[Task], device: str, precision: Precision) -> list[_Sitting]:
    """Every model of the table with every task, prepared; models that share nothing but a name are told apart by their weights."""
    rows = {name: list(seeds) for name, seeds in config.models.items()}
    teacher = config.teacher
    if teacher is not None and len([name for name, seeds in rows.items() if teacher in seeds]) == 0:
        rows[_free_name(rows)] = [teacher]
    exams = {
        (row, seed, task.name): task.prepare(model, _beside(task, model, teacher))
        for row, seeds in rows.items() for seed, model in enumerate(seeds) for task in tasks
    }  # fmt: skip
    digests: dict[str, Mapping[str, str]] = {}

    def digest(model: LoadingConfig) -> Mapping[str, str]:
        return digests.setdefault(model.model_dump_json(), weights_digest(model))

    sittings = []
    for row, seeds in rows.items():
        for seed, model in enumerate(seeds):
            for task in tasks:
                exam, beside = exams[row, seed, task.name], _beside(task, model, teacher)
                if exam is None:
                    continue
                computed = [[one.dtype, one.attention] for one in (model, beside) if one is not None]
                statement = {
                    "version": VERSION, "kind": task.kind, "model": digest(model), "teacher": None if beside is None else digest(beside),
                    "task": dict(exam.identity), "precision": [precision, *computed], "device": _machine(device),
                }  # fmt: skip
                sittings.append(_Sitting(row, seed, model, task, exam, statement, beside is not None))
    return sittings


def _machine(device: str) -> str:
    """What computes, as far as numbers and times hang on it."""
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def _beside(task: Task, model: LoadingConfig, teacher: LoadingConfig | None) -> LoadingConfig | None:
    return teacher if task.uses_teacher and teacher != model else None


def _free_name(rows: Mapping[str, object]) -> str:
    name = TEACHER
    while name in rows:
        name = f"the {name}"
    return name


# ---------------------------------------------------------------- with weights


def _measure(
    config: EvaluationConfig, sittings: Sequence[_Sitting], device: str, precision: Precision, console: Console, quiet: bool
) -> _Rows:
    store, rows = Store(config.store) if config.store is not None else None, _Rows()
    missing: dict[tuple[str, int], list[_Sitting]] = {}
    for sitting in sittings:
        found = store.read(sitting.task.name, sitting.statement) if store is not None else None
        if found is None:
            missing.setdefault((sitting.row, sitting.seed), []).append(sitting)
        else:
            rows.outcomes.setdefault((sitting.row, sitting.task.name), {})[sitting.seed] = found
            rows.parameters.setdefault(sitting.row, int(found.data.get("parameters", 0)))

    def load(model: LoadingConfig, name: str) -> Subject:
        tokenizer = load_tokenizer(model)
        causal = CausalLM(load_model(model, precision=precision, device=device), vocabulary_size(tokenizer))
        refuse_not_finite(causal, model.path)
        return Subject(name, model, causal, tokenizer, config.batch_size)

    teacher: Subject | None = None
    with Progress(console=console, disable=quiet) as progress:
        whole = progress.add_task("Measuring", total=sum(map(len, missing.values())))
        for (row, seed), due in missing.items():
            if config.teacher is not None and teacher is None and (due[0].model == config.teacher or any(one.with_teacher for one in due)):
                teacher = load(config.teacher, TEACHER)
            subject = teacher if teacher is not None and due[0].model == config.teacher else load(due[0].model, row)
            rows.parameters[row] = subject.model.inner.num_parameters()
            for sitting in due:
                seeds = len(config.models.get(row, ()))
                bar = progress.add_task(f"{row}{f' {seed}' if seeds > 1 else ''}: {sitting.task.name}", total=sitting.exam.size)
                outcome = sitting.exam.measure(subject, teacher if sitting.with_teacher else None, _advancing(progress, bar))
                outcome = _stating(outcome, rows.parameters[row])
                if store is not None:
                    store.write(sitting.task.name, sitting.statement, outcome)
                rows.outcomes.setdefault((row, sitting.task.name), {})[seed] = outcome
                progress.remove_task(bar)
                progress.advance(whole)
    return rows


def _advancing(progress: Progress, bar: TaskID):
    return lambda count: progress.advance(bar, count)


def _stating(outcome: Outcome, parameters: int) -> Outcome:
    return Outcome(outcome.scores, outcome.samples, outcome.series, outcome.warnings, {**outcome.data, "parameters": parameters})


# ---------------------------------------------------------------- the table


def _record(config: EvaluationConfig, tasks: Sequence[Task], rows: _Rows, computed: str) -> EvaluationRecord:
    names = list(dict.fromkeys(row for row, _ in rows.outcomes))
    models = [
        ModelRecord(
            name,
            {task.name: [found[seed] for seed in sorted(found)] for task in tasks if (found := rows.outcomes.get((name, task.name)))},
            rows.parameters.get(name), is_teacher=name not in config.models or config.teacher in config.models[name],
        )
        for name in [*config.models, *(name for name in names if name not in config.models)]
    ]  # fmt: skip
    records = []
    for task in tasks:
        outcome = next(model.outcomes[task.name][0] for model in models if task.name in model.outcomes)
        facts = {key: value for key, value in outcome.data.items() if key != "parameters"}
        records.append(TaskRecord(task.name, task.kind, outcome.scores.primary, task.role, facts))
    students = [model for model in models if not model.is_teacher]
    baseline = _baseline(config, students)
    pairs = _pairs(config, students)
    # Where everything is compared with the student before training, that is the question itself.
    before = config.before if config.before != baseline else None
    return EvaluationRecord(
        title=_title(config), tasks=records, models=models, comparisons=compare_models(records, pairs, before=before),
        data={"computed": computed}, baseline=baseline, before=config.before,
        shown_samples=config.samples, with_items=config.items,
    )  # fmt: skip


def _baseline(config: EvaluationConfig, students: Sequence[ModelRecord]) -> str | None:
    return config.baseline or (students[0].name if len(students) > 1 and config.against is None else None)


def _pairs(config: EvaluationConfig, students: Sequence[ModelRecord]) -> list[tuple[ModelRecord, ModelRecord]]:
    """Each student against the baseline or the row of its own, and against the student as it was before."""
    by_name = {model.name: model for model in students}
    against = dict.fromkeys(name for name in (_baseline(config, students), config.before) if name is not None and name in by_name)
    own = [(first, second) for first, second in (config.against or {}).items() if first in by_name and second in by_name]
    pairs = [(by_name[first], by_name[second]) for first, second in own]
    seen = {frozenset(pair) for pair in own}
    for other in against:
        for model in students:
            pair = frozenset((model.name, other))
            if model.name == config.before and other != config.before:
                continue  # it is what others are measured from
            if model.name != other and pair not in seen:
                seen.add(pair)
                pairs.append((model, by_name[other]))
    return pairs


def _title(config: EvaluationConfig) -> str:
    names = [
        seeds[0].path if len(config.models) == 1 and len(seeds) == 1 and seeds[0].adapter is None else name
        for name, seeds in config.models.items()
    ]  # fmt: skip
    against = f" against {config.teacher.path}" if config.teacher is not None else ""
    return f"Evaluation of {', '.join(names)}{against}"
