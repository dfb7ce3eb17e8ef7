"""When a run is long enough to compile its loss: by its steps, whether the recipe counts them or epochs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from potstill.data.examples import ExampleSetBuilder
from potstill.recipes import assemble, objectives
from potstill.recipes.schema import Recipe

ON_CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="about processors")


def _recipe(packing: bool = False, **training: Any) -> Recipe:
    return Recipe.model_validate({
        "student": {"path": "student"}, "data": {"train": "rows.jsonl", "max_tokens": 100, "packing": packing},
        "training": {"batch_size": 2, "accumulation": 2, **training}, "run": {"folder": "run"},
    })  # fmt: skip


def _preparation(count: int, length: int) -> Any:
    """What is asked of one: `data.train`, `count` examples of `length` tokens."""
    builder = ExampleSetBuilder(np.zeros(9, np.int64))
    for number in range(count):
        builder.add([3] * length, [(0, length)], "rows.jsonl", number)
    return SimpleNamespace(data=SimpleNamespace(train=builder.build()))


@ON_CPU
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (_recipe(epochs=100), "on"),                    # 10 steps an epoch
        (_recipe(epochs=99), "off"),
        (_recipe(steps=1000), "on"),
        (_recipe(steps=999), "off"),
        (_recipe(epochs=100, packing=True), "off"),     # a quarter of the rows
        (_recipe(epochs=400, packing=True), "on"),
        (_recipe(epochs=1, compile="on"), "on"),
        (_recipe(steps=9000, compile="off"), "off"),
    ],
)
def test_long_runs_compile_whether_they_count_steps_or_epochs(recipe, expected, monkeypatch):
    monkeypatch.setattr(objectives, "which", lambda name: f"/usr/bin/{name}")
    steps = assemble._about_steps(recipe, _preparation(40, 25))
    assert objectives.make_objective(recipe, 9, num_steps=steps).execution.compile == expected


@ON_CPU
def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(objectives, "which", lambda name: None)
    assert objectives.make_objective(_recipe(steps=9000), 9, num_steps=9000).execution.compile == "off"
