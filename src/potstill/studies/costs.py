"""What a study would take, before it runs: steps, tokens, floating-point operations, time from runs that were measured, disk.

An operation count says the order of magnitude: 6 a parameter and token for a student that learns, 2 for a teacher that answers. Text
that a model writes first is not counted. Seconds are said only where a run of the study has been measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from potstill.errors import PotstillError
from potstill.models.footprint import Workload, predict_teacher
from potstill.recipes.check import Findings, examine, predict
from potstill.recipes.fitting import members
from potstill.recipes.preparation import Preparation
from potstill.recipes.schema import Recipe
from potstill.recipes.words import gib, in_words, printable
from potstill.storage import free_bytes
from potstill.studies.plan import Job, Plan
from potstill.studies.progress import Pace, in_time
from potstill.studies.snapshot import budget_warnings
from potstill.teachers.config import LocalTeacherConfig

_CHECKPOINT_BYTES = 12  # of a parameter that learns: itself and two moments, in float32


@dataclass(frozen=True)
class RunCost:
    """What one run takes."""

    steps: int
    targets: int
    operations: float
    disk_bytes: int


class CostReader:
    """Costs of recipes. Those with the same student and text share one reading of it."""

    def __init__(self) -> None:
        self._read: dict[str, Preparation] = {}
        self.problems: list[str] = []

    def cost(self, recipe: Recipe, *, asks_teacher: bool) -> RunCost | None:
        """What a run takes, its teacher asked live or not at all; None where its data or models cannot be looked at here."""
        alone = recipe.model_copy(update={"teacher": None, "rollouts": None, "capture": None, "generate": None})
        key = alone.model_dump_json(include={"student", "data", "run"})
        try:
            preparation = self._read[key] if key in self._read else examine(alone, {}, Findings())
            self._read[key] = preparation
            found = predict(alone, preparation, Findings())
            answering = _teacher_parameters(recipe) if asks_teacher else 0
        except PotstillError as error:
            self.problems.append(str(error).splitlines()[0])
            return None
        if found.student is None or not found.steps_per_epoch:
            return None
        data, epochs = preparation.data.train, found.steps / found.steps_per_epoch
        kept = recipe.training.keep_checkpoints + (recipe.training.early_stopping is not None)
        return RunCost(
            found.steps, round(data.num_targets * epochs),
            (6.0 * found.student.parameters + 2.0 * answering) * data.num_tokens * epochs,
            found.student.weights + kept * _CHECKPOINT_BYTES * found.student.trainable,
        )  # fmt: skip


def _teacher_parameters(recipe: Recipe) -> int:
    """Of the teachers in this process; one behind a server computes elsewhere."""
    local = [member for _, member in members(recipe.teacher) if isinstance(member, LocalTeacherConfig)]
    return sum(predict_teacher(member, Workload(1, 2)).parameters for member in local)


def show_costs(plan: Plan, due: Mapping[str, Job], console: Console) -> None:
    """Prints the cells and what is left to run of each. Loads no weights."""
    reader = CostReader()
    costs = {name: reader.cost(built.checked, asks_teacher=built.checked.uses_teacher) for name, built in plan.before.items()}
    for cell in plan.cells:
        recipe = cell.built.checked
        costs[cell.name] = reader.cost(recipe, asks_teacher=recipe.uses_teacher and cell.name not in plan.recordings)
    rows = {name: [plan.jobs[name]] for name in plan.before}
    rows |= {cell.name: [plan.run_of(cell.name, seed) for seed in plan.study.config.seeds] for cell in plan.cells}
    pace = Pace(list(plan.jobs.values()))
    rate = _seconds_an_operation(rows, costs, pace)
    table = Table(box=None, pad_edge=False, title=Text(printable(plan.study.config.title)), title_justify="left")
    for column in ("run", "left", "teacher", "steps", "target tokens", "operations", "time", "disk"):
        table.add_column(column, justify="left" if column in ("run", "teacher") else "right", overflow="fold")
    seconds: list[float | None] = []
    disk = 0
    for name, jobs in rows.items():
        left = [job for job in jobs if job.name in due and not job.is_finished]
        cost = costs[name]
        times = [_seconds(job, cost, pace, rate) for job in left]
        seconds += times
        disk += len(left) * (cost.disk_bytes if cost is not None else 0)
        table.add_row(Text(printable(name)), f"{len(left)} of {len(jobs)}", _teacher_words(plan, name), *_cost_words(cost, times))
    console.print(table)
    _show_total(plan, seconds, disk, console)
    for note in dict.fromkeys([*budget_warnings(plan.cells), *reader.problems]):
        console.print(Text(f"note: {printable(note)}", style="yellow"))


def _seconds_an_operation(rows: Mapping[str, list[Job]], costs: Mapping[str, RunCost | None], pace: Pace) -> float | None:
    """From the runs of this study that are finished; None where there is none."""
    measured = [
        (seconds, cost.operations) for name, jobs in rows.items() if (cost := costs[name]) is not None
        for job in jobs if (seconds := pace.measured(job)) is not None
    ]  # fmt: skip
    return sum(seconds for seconds, _ in measured) / sum(operations for _, operations in measured) if measured else None


def _seconds(job: Job, cost: RunCost | None, pace: Pace, rate: float | None) -> float | None:
    alike = pace.of_cell(job)
    if alike is not None:
        return alike
    return None if cost is None or rate is None else cost.operations * rate


def _teacher_words(plan: Plan, name: str) -> str:
    built = plan.before.get(name) or next(cell.built for cell in plan.cells if cell.name == name)
    return "recorded" if name in plan.recordings else "asked live" if built.recipe.uses_teacher else "none"


def _cost_words(cost: RunCost | None, times: list[float | None]) -> list[str]:
    time = _sum_words(times)
    if cost is None:
        return ["unknown", "unknown", "unknown", time, "unknown"]
    return [f"{cost.steps:,}", f"{cost.targets:,}", f"{cost.operations:.1e}", time, gib(cost.disk_bytes)]


def _sum_words(times: Iterable[float | None]) -> str:
    known = list(times)
    return "unknown" if any(time is None for time in known) else in_time(sum(time for time in known if time is not None))


def _show_total(plan: Plan, seconds: list[float | None], disk: int, console: Console) -> None:
    unknown = any(time is None for time in seconds)
    hint = "; no run of this study has been measured yet, so its speed here is unknown: train one cell with --only" if unknown else ""
    free = free_bytes(plan.folder.absolute())
    said = [
        f"{in_words(len(seconds), 'run')} to train, one after another: {_sum_words(seconds)}{hint}",
        f"on disk about {gib(disk)}, {gib(free)} free in {plan.folder.absolute().parent}",
        *(f"teachers' answers are recorded once, in {job.folder}" for job in plan.jobs.values() if job.kind == "capture"),
    ]  # fmt: skip
    for line in said:
        console.print(Text(printable(line)))
