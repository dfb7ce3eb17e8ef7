"""Cells of a study: their names, what merges, their twins, the answers that they share, and every mistake at once."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from potstill.errors import ConfigError
from potstill.recipes.text import parse
from potstill.studies.captures import make_recordings
from potstill.studies.cells import comparable, make_axes, make_before, make_cells
from potstill.studies.read import library, read_study
from potstill.studies.references import real_paths, resolve
from potstill.studies.snapshot import _differences

BASE = {
    "student": {"path": "models/student"}, "teacher": {"path": "models/teacher"},
    "data": {"train": "rows.jsonl", "max_tokens": 96, "packing": False},
    "objective": {"divergence": "forward_kl", "kd_ratio": 0.5},
    "training": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3}, "run": {"folder": "elsewhere"},
}  # fmt: skip


def write(folder: Path, **study) -> str:
    said = {"title": "A question", "base": BASE, "folder": str(folder / "out"), **study}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(said)), sort_keys=False))
    return str(path)


def cells_of(name: str, *overrides: str):
    study = read_study(name, overrides)
    return {cell.name: cell for cell in make_cells(study, make_before(study))}


def test_every_combination_is_a_cell_and_the_twin_stands_beside_them(tmp_path):
    cells = cells_of(write(tmp_path, grid={
        "objective.kd_ratio": [0.5, 1], "teacher": {"large": {"teacher.path": "models/large"}, "small": {}},
    }))  # fmt: skip
    assert list(cells) == ["sft", "kd_ratio=0.5,large", "kd_ratio=0.5,small", "kd_ratio=1,large", "kd_ratio=1,small"]
    assert {cell.against for cell in cells.values()} == {None, "sft"}
    large = cells["kd_ratio=1,large"].built.recipe
    assert (large.teacher.path, large.objective.kd_ratio) == ("models/large", 1)


def test_the_twin_is_the_same_training_without_a_teacher(tmp_path):
    cells = cells_of(write(tmp_path, grid={"objective.divergence": ["jsd"]}, set={"objective.reduction": "seq_mean"}))
    twin, cell = (comparable(cells[name].built.recipe) for name in ("sft", "divergence=jsd"))
    assert {key: twin[key] for key in ("student", "data", "training")} == {key: cell[key] for key in ("student", "data", "training")}
    assert twin["teacher"] is None
    assert (twin["objective"]["divergence"], twin["objective"]["reduction"]) == ("cross_entropy", "seq_mean")


def test_a_weight_of_zero_is_the_twin_and_runs_once(tmp_path):
    cells = cells_of(write(tmp_path, grid={"objective.kd_ratio": [0, 1], "teacher.path": ["a", "b"]}))
    assert list(cells) == ["sft", "kd_ratio=1,path=a", "kd_ratio=1,path=b"]
    assert [dict(point) for point in cells["sft"].points] == [
        {"objective.kd_ratio": "kd_ratio=0", "teacher.path": "path=a"}, {"objective.kd_ratio": "kd_ratio=0", "teacher.path": "path=b"},
    ]  # fmt: skip


def test_twins_differ_where_the_training_does_and_nowhere_else(tmp_path):
    cells = cells_of(write(tmp_path, grid={"training.learning_rate": [1e-3, 1e-4], "objective.temperature": [1.0, 2.0]}))
    assert [name for name, cell in cells.items() if cell.is_sft] == ["sft,learning_rate=0.001", "sft,learning_rate=0.0001"]
    for name, cell in cells.items():
        if not cell.is_sft:
            assert cell.against == f"sft,{name.split(',')[0]}"
            assert cells[cell.against].built.recipe.training == cell.built.recipe.training


def test_equal_recipes_are_one_cell(tmp_path):
    cells = cells_of(write(tmp_path, grid={"way": {"said": {"objective.temperature": 1.0}, "unsaid": {}}}))
    assert list(cells) == ["sft", "said"]
    assert [point["way"] for point in cells["said"].points] == ["said", "unsaid"]


def test_a_student_that_writes_has_a_twin_on_the_rows_as_they_are_packed_for_it(tmp_path):
    base = copy.deepcopy(BASE)
    del base["data"]["packing"]
    rollouts = {"author": "student", "sampling": {"max_new_tokens": 8}}
    cells = cells_of(write(tmp_path, base=base, grid={"who": {"student": {"rollouts": rollouts, "objective.kd_ratio": 1.0}, "data": {}}}))
    packed = {name: cell.built.recipe.data.packing for name, cell in cells.items()}
    assert packed[cells["student"].against] is packed["student"] is False
    assert packed[cells["data"].against] is packed["data"]


def test_a_cell_can_be_the_baseline_of_all(tmp_path):
    cells = cells_of(write(tmp_path, baseline="kd_ratio=1", grid={"objective.kd_ratio": [0.5, 1]}))
    assert {name: cell.against for name, cell in cells.items()} == {"sft": "kd_ratio=1", "kd_ratio=0.5": "kd_ratio=1", "kd_ratio=1": None}
    with pytest.raises(ConfigError, match=r"study\.yaml:\d+: baseline: 'none' is no cell; there are sft, kd_ratio=0\.5"):
        cells_of(write(tmp_path, baseline="none", grid={"objective.kd_ratio": [0.5, 1]}))


def test_every_mistake_is_said_at_once_with_its_cell_and_line(tmp_path):
    path = write(tmp_path, grid={"objective.kd_ratio": [0.5, 7], "training.learning_rate": [1e-3, -1]})
    with pytest.raises(ConfigError) as raised:
        cells_of(path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert "kd_ratio=7,learning_rate=0.001" in lines[0] + lines[1]
    places = dict(enumerate(Path(path).read_text().splitlines(), start=1))
    for line, value in zip(sorted(lines, key=lambda said: "kd_ratio: must" not in said), ("7", "-1"), strict=True):
        number = int(line.split("study.yaml:")[1].split(":")[0])
        assert places[number].strip() == f"- {value}"


def test_what_is_wrong_in_every_cell_is_said_once(tmp_path):
    with pytest.raises(ConfigError) as raised:
        cells_of(write(tmp_path, grid={"objective.kd_ratio": [0.5, 1]}), "training.stepz=3")
    assert str(raised.value).startswith("command line: training.stepz: unknown key; did you mean steps?")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ({"grid": {"run.seed": [1]}}, "run.seed: the study gives every run its folder and its seed"),
        ({"set": {"run.folder": "x"}}, "run.folder: the study gives every run its folder"),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"seeds": []}, "seeds: must not be empty"),
        ({"grid": {"objective.kd_ratio": []}}, "grid.objective.kd_ratio: has no values"),
        ({"grid": {"a": {"x y": {}}}}, "grid.a: the name 'x y' becomes part of a folder's"),
        ({"grid": {"teacher.path": ["a/x", "b/x"]}}, "grid.teacher.path: two values would both be called path=x"),
        ({"grid": {"teacher": {"a": {"teacher.path": "x"}}, "teacher.path": ["y"]}}, "one would undo the other"),
        ({"grid": {"teacher.path": ["{tuned}"]}}, r"teacher.path: {tuned} names no run"),
        ({"tilte": "x"}, "tilte: unknown key; did you mean title?"),
        ({"base": "no-such-recipe"}, "no-such-recipe: no such file"),
        ({"capture": {"k": 8, "outcomes": "some"}}, "capture.outcomes: must be one of"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(tmp_path, study, said):
    with pytest.raises(ConfigError) as raised:
        cells_of(write(tmp_path, **study))
    assert said in str(raised.value)


def test_keys_on_the_command_line_are_the_studys_or_every_recipes(tmp_path):
    path = write(tmp_path, grid={"objective.kd_ratio": [0.5]})
    study = read_study(path, ["seeds=[3]", "training.steps=9", "grid.objective.kd_ratio=[0.25, 1]", "set.training.batch_size=7"])
    cells = make_cells(study, {})
    assert [cell.name for cell in cells] == ["sft", "kd_ratio=0.25", "kd_ratio=1"]
    assert {(cell.built.recipe.training.steps, cell.built.recipe.training.batch_size) for cell in cells} == {(9, 7)}
    assert study.config.seeds == [3]


def test_earlier_runs_are_named_by_their_students(tmp_path):
    study = read_study(write(
        tmp_path, before={"tuned": {"set": {"teacher": None, "objective": None, "student.path": "models/large"}}},
        grid={"teacher": {"tuned": {"teacher.path": "{tuned}"}, "plain": {}}},
    ))  # fmt: skip
    cells = {cell.name: cell for cell in make_cells(study, make_before(study))}
    tuned = cells["tuned"].built
    assert tuned.recipe.teacher.path == str(tmp_path / "out" / "before" / "tuned" / "student")
    assert tuned.checked.teacher.path == "models/large"
    assert {name: set(cell.built.uses) for name, cell in cells.items()} == {"sft": set(), "tuned": {"tuned"}, "plain": set()}


def test_braces_that_are_no_reference_stay_as_they_are():
    document = parse("data: {teacher_prompt: '{instruction}', train: '{tuned.adapter}', note: 'a {tuned} b'}", "x.yaml")
    assert resolve(document, {"tuned": 1}, real_paths(Path("f"))) == {"tuned"}
    assert document.values["data"] == {"teacher_prompt": "{instruction}", "train": "f/before/tuned/adapter", "note": "a {tuned} b"}


def test_answers_are_shared_where_the_record_serves_and_asked_live_elsewhere(tmp_path):
    study = read_study(write(tmp_path, capture={"k": 16}, grid={
        "objective": {
            "full": {}, "sparse": {"objective.support": "top_k_tail", "objective.top_k": 16},
            "fewer": {"objective.support": "top_k_tail", "objective.top_k": 4},
            "more": {"objective.support": "top_k_tail", "objective.top_k": 17},
            "hot": {"objective.support": "top_k_tail", "objective.temperature": 2.0},
            "written": {"objective.support": "top_k_tail", "rollouts": {"author": "student", "sampling": {"max_new_tokens": 4}},
                        "objective.kd_ratio": 1.0},
        },
        "teacher.path": ["a", "b"],
    }))  # fmt: skip
    found = make_recordings(study, make_cells(study, {}), tmp_path)
    assert set(found) == {"sparse,path=a", "sparse,path=b", "fewer,path=a", "fewer,path=b"}
    assert found["sparse,path=a"].name == found["fewer,path=a"].name != found["sparse,path=b"].name


def test_labels_of_two_axes_are_told_apart(tmp_path):
    bundles = {"tuned": {"student.path": "x"}, "plain": {}}
    study = read_study(write(tmp_path, grid={"student": bundles, "teacher": {name: {} for name in bundles}}))
    assert [list(axis.values) for axis in make_axes(study)] == [["student=tuned", "student=plain"], ["teacher=tuned", "teacher=plain"]]


def test_a_library_study_that_does_not_exist_names_the_nearest():
    if "divergences" in library():
        with pytest.raises(ConfigError, match="near it: divergences"):
            read_study("divergencs")
    with pytest.raises(ConfigError, match="`potstill studies` lists the library"):
        read_study("nothing-like-it")


def test_a_twin_differs_in_no_key_that_only_a_teacher_gives_a_meaning(tmp_path):
    cells = cells_of(write(tmp_path, grid={"objective.kd_ratio": [0.25, 1]}))
    found = _differences(list(cells.values()))
    assert {name: said["objective.kd_ratio"] for name, said in found.items()} == {"sft": None, "kd_ratio=0.25": 0.25, "kd_ratio=1": 1}
    assert found["sft"]["objective.divergence"] == "cross_entropy"
