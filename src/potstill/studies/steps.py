"""In how many steps a student of a teacher reaches what its twin without one reaches in the end.

Each point is a training of its own, with its own schedule, so that no unfinished run stands for a short one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CLAIM = 0.7
"""The share of the steps that is claimed for distillation from recorded answers."""
_DRAWS = 2000
_FEWEST_POINTS = 3


@dataclass(frozen=True)
class StepsFound:
    """The share of the twin's steps at which its final score is reached. 1.0 times `above` is more than was trained, inf; a value at
    the first point means that point or less."""

    task: str
    label: str
    share: float
    low: float
    high: float
    first: float
    steps: int

    @property
    def sentence(self) -> str:
        head = f"{self.task}: the distilled student reaches the {self.label} that fine-tuning ends with after {self._words(self.share)}"
        interval = f"(95 % interval {self._words(self.low)} to {self._words(self.high)}, items and seeds drawn again)"
        if self.high < CLAIM:
            verdict = "that is fewer than the 70 percent that are claimed"
        elif self.low > CLAIM:
            verdict = "that is more than the 70 percent that are claimed"
        else:
            verdict = "these data do not contradict the 70 percent that are claimed"
        return f"{head} of its {self.steps:,} steps {interval}: {verdict}."

    def _words(self, share: float) -> str:
        if not np.isfinite(share):
            return "more than 100 %"
        return f"{share:.0%} or less" if share <= self.first else f"{share:.0%}"


def steps_to_accuracy(study: Mapping[str, Any], record: Mapping[str, Any], *, seed: int = 0) -> list[StepsFound]:
    """One answer for each task that a study over `training.steps` recorded item by item (`evaluation.items: true`); else none."""
    cells = {True: _by_steps(study, is_sft=True), False: _by_steps(study, is_sft=False)}
    if len(cells[False]) < _FEWEST_POINTS or not cells[True] or max(cells[True]) != max(cells[False]) or "items" not in record:
        return []
    final, steps = cells[True][max(cells[True])], sorted(cells[False])
    found = []
    for task in record["tasks"]:
        columns = [_columns(record, task, name) for name in (final, *(cells[False][step] for step in steps))]
        metric = next((model["metrics"][task["primary"]] for model in record["models"] if model["name"] == final), None)
        if metric is None or metric["higher_is_better"] is None or any(one is None for one in columns):
            continue
        sign = 1.0 if metric["higher_is_better"] else -1.0
        stacked = np.stack([one for one in columns if one is not None])
        values = _drawn(stacked, np.random.default_rng(seed)) * sign
        shares = np.array([first_reached(steps, row[1:], row[0]) for row in values]) / max(steps)
        low, high = np.quantile(shares[1:], [0.025, 0.975], method="nearest")
        found.append(
            StepsFound(task["name"], metric["label"], float(shares[0]), float(low), float(high), min(steps) / max(steps), max(steps))
        )
    return found


def first_reached(steps: Sequence[int], scores: Sequence[float] | np.ndarray, target: float) -> float:
    """The number of steps at which scores, joined by straight lines, first reach the target; inf where they do not."""
    if scores[0] >= target:
        return float(steps[0])
    for place in range(1, len(steps)):
        before, after = scores[place - 1], scores[place]
        if after >= target:
            return float(steps[place - 1] + (target - before) / (after - before) * (steps[place] - steps[place - 1]))
    return float("inf")


def _by_steps(study: Mapping[str, Any], *, is_sft: bool) -> dict[int, str]:
    """Steps -> cell, of the twins or of the others; empty unless the study varies the steps and nothing else."""
    if [axis["name"] for axis in study.get("axes", ())] != ["training.steps"]:
        return {}
    return {cell["budget"]["steps"]: cell["name"] for cell in study["cells"] if cell["is_sft"] == is_sft and cell["budget"].get("steps")}


def _columns(record: Mapping[str, Any], task: Mapping[str, Any], model: str) -> np.ndarray | None:
    """A model's primary metric by seed and item as sums and counts, [S, I, 2], items in one order; None where it was not recorded."""
    name = task["primary"].removeprefix(f"{task['name']}/")
    counted = next((one["metrics"][task["primary"]]["counted"] for one in record["models"] if task["primary"] in one["metrics"]), "")
    seeds: dict[int, dict[str, tuple[float, float]]] = {}
    for item in record["items"]:
        if item["task"] == task["name"] and item["model"] == model and item.get(name) is not None and item.get(counted):
            seeds.setdefault(item["seed"], {})[item["item"]] = (item[name] * item[counted], item[counted])
    if not seeds or any(items.keys() != seeds[min(seeds)].keys() for items in seeds.values()):
        return None
    return np.array([[seeds[seed][item] for item in sorted(seeds[seed])] for seed in sorted(seeds)])


def _drawn(columns: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means over seeds of sums over counts [1 + draws, models], the first as observed; items and seeds drawn alike for all models."""
    _, num_seeds, num_items, _ = columns.shape
    rows = []
    for draw in range(_DRAWS + 1):
        items = np.ones(num_items) if draw == 0 else generator.multinomial(num_items, np.full(num_items, 1 / num_items))
        seeds = np.arange(num_seeds) if draw == 0 else generator.integers(0, num_seeds, num_seeds)
        totals = np.einsum("i,msik->msk", items, columns)
        rows.append((totals[..., 0] / totals[..., 1])[:, seeds].mean(axis=1))
    return np.array(rows)
