"""The studies of the package: each is read, its cells are built and checked, and a small twin stands beside each."""

import pytest

from potstill.objectives.catalogue import PARAMETERS
from potstill.studies.cells import make_before, make_cells
from potstill.studies.read import library, read_study

NAMES = ("distil-or-sft", "divergences", "qwen2-small-gap", "steps-to-accuracy", "torchtune-kd-ratio", "torchtune-learning-rate",
         "torchtune-student", "torchtune-teacher")  # fmt: skip


def test_every_published_study_has_its_small_twin():
    assert sorted(library()) == sorted([*NAMES, *(f"small-{name}" for name in NAMES)])


@pytest.mark.parametrize("name", [*NAMES, *(f"small-{name}" for name in NAMES)])
def test_a_study_can_be_run(name):
    study = read_study(name)
    cells = make_cells(study, make_before(study))
    twins = {cell.name for cell in cells if cell.is_sft}
    assert len(study.config.seeds) >= 3
    assert study.config.published
    assert study.config.folder == f"studies/{name}"
    assert library()[name].startswith("# ")
    assert twins
    assert all(cell.against in twins for cell in cells if not cell.is_sft)
    for cell in cells:
        twin = next(other for other in cells if other.name == (cell.against or cell.name))
        ours, theirs = cell.built.recipe, twin.built.recipe
        assert (ours.training, ours.data, ours.student.path) == (theirs.training, theirs.data, theirs.student.path)
    kinds = {task.kind for task in study.config.evaluation.tasks}
    assert kinds == ({"text", "questions"} if name.startswith("small-") else {"text", "harness"})


def test_what_is_varied_is_what_was_published():
    assert read_study("torchtune-kd-ratio").config.grid == {"objective.kd_ratio": [0, 0.25, 0.5, 0.75, 1]}
    assert read_study("torchtune-learning-rate").config.grid == {"training.learning_rate": [1e-3, 3e-4, 1e-4, 1e-5]}
    steps = read_study("steps-to-accuracy").config.grid["training.steps"]
    assert 0.7 * max(steps) in steps


@pytest.mark.parametrize("name", ["divergences", "small-divergences"])
def test_no_divergence_of_the_catalogue_is_left_out(name):
    assert set(read_study(name).config.grid["objective.divergence"]) == set(PARAMETERS) - {"cross_entropy"}


@pytest.mark.parametrize("name", NAMES)
def test_a_small_twin_asks_the_same(name):
    large, small = read_study(name).config, read_study(f"small-{name}").config
    assert (large.title, large.published) == (small.title, small.published)
    if name != "qwen2-small-gap":
        assert large.grid.keys() == small.grid.keys()
