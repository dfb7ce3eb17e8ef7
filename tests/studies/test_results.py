"""What a study says of itself: tables, one sentence for all comparisons, and pictures, from the two files that it leaves."""

import json
from io import StringIO
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from potstill.errors import DataError
from potstill.evaluation.record import EvaluationRecord, ModelRecord, TaskRecord, compare_models
from potstill.evaluation.scores import Scores, mean
from potstill.evaluation.task import Outcome
from potstill.studies.results import conclusion, read_results, show

GAINS = {"sft": 0.0, "kd_ratio=0.5": 0.0, "kd_ratio=1": 1.0, "<b>_plain_|": 0.05}


def evaluation(gains):
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 1, 80)

    def outcomes(gain, seeds=3):
        tables = []
        for _ in range(seeds):
            values = np.stack([hard + gain + generator.normal(0, 0.3, 80), np.ones(80)], axis=-1)
            tables.append(Outcome(Scores(tuple(map(str, range(80))), ("sum", "questions"), values, {"score": mean("score", "sum")})))
        return {"t": tables}

    students = [ModelRecord(name, outcomes(gain)) for name, gain in gains.items()]
    teacher = ModelRecord("teacher", outcomes(2.0, 1), is_teacher=True)
    task = TaskRecord("t", "questions", "score")
    pairs = compare_models([task], [(student, students[0]) for student in students[1:]])
    return EvaluationRecord("A study", [task], [*students, teacher], pairs, baseline=students[0].name).to_json()


def study(names):
    cells = [
        {
            "name": name, "is_sft": name == "sft", "against": None if name == "sft" else "sft", "points": [], "teacher_answers": "live",
            "differences": {"objective.kd_ratio": 0.5}, "budget": {"steps": 400, "epochs": None, "global_batch": 2},
            "runs": [{"seed": seed, "status": "finished", "costs": {"seconds": 10.0 + seed}} for seed in range(3)],
        }
        for name in names
    ]  # fmt: skip
    return {"kind": "study", "version": 1, "title": "How much <teacher>?", "published": "More was *better*.", "axes": [], "cells": cells,
            "warnings": ["a seed is missing"]}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "study.json").write_text(json.dumps(study(GAINS)))
    (tmp_path / "evaluation" / "study.json").write_text(json.dumps(evaluation(GAINS)))
    return tmp_path


def test_every_cell_has_its_difference_to_its_twin_and_a_mark_where_it_is_significant(folder):
    (table,) = read_results(folder).tables
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [*GAINS, "teacher"]
    assert rows["sft"].pair is None
    assert (rows["sft"].difference, rows["sft"].mark) == ("", "")
    assert rows["kd_ratio=1"].pair["difference"] == pytest.approx(1.0, abs=0.1)
    assert (rows["kd_ratio=1"].mark, rows["kd_ratio=0.5"].mark) == ("*", "")
    assert rows["kd_ratio=1"].difference.startswith("+")
    assert rows["kd_ratio=1"].seconds == pytest.approx(11.0)


def test_the_terminal_the_text_and_the_picture_say_the_same(folder):
    console = Console(width=200, record=True, file=StringIO())
    show(folder, console=console)
    said = console.export_text()
    text = (folder / "results.md").read_text()
    for name in ("kd_ratio=0.5", "kd_ratio=1"):
        assert name in said
        assert name.replace("_", "\\_") in text
    assert "1 of 3 comparisons finds a difference larger than its uncertainty after Holm's correction" in said
    assert "1 of 3 comparisons" in text
    assert "&lt;b&gt;\\_plain\\_\\|" in text
    assert "<b>" not in text
    assert "Published: More was \\*better\\*." in text
    assert "a seed is missing" in text
    assert "steps: 400" in text
    assert "every key of the recipe but objective.kd\\_ratio" in text
    assert "of the gap (95 % interval" in text
    picture = ElementTree.parse(folder / "plots" / "t.svg").getroot()
    labels = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"kd_ratio=0.5", "kd_ratio=1", "<b>_plain_|", "sft"} <= set(labels)
    filled = [element.get("fill") for element in picture.iter("{http://www.w3.org/2000/svg}circle")]
    assert filled.count("white") == 2
    assert len(filled) == 3


def test_the_tables_do_not_change_when_they_are_written_again(folder):
    show(folder, console=Console(quiet=True))
    first = (folder / "results.md").read_bytes()
    show(folder, console=Console(quiet=True))
    assert (folder / "results.md").read_bytes() == first


def test_nothing_found_is_said_with_what_could_have_been_seen():
    pairs = evaluation({"a": 0.0, "b": 0.0, "c": 0.01})["comparisons"]
    assert not any(pair["is_significant"] for pair in pairs)
    said = conclusion(pairs)
    assert said.startswith("No difference that this test can see, in any of 2 comparisons after Holm's correction.")
    assert "four times in five: score: 0." in said
    assert conclusion([]) == "Nothing was compared."


def test_a_study_that_was_not_measured_still_has_its_page(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(study(["sft"])))
    show(tmp_path, console=Console(quiet=True))
    assert "Nothing was compared." in (tmp_path / "results.md").read_text()


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no study\.json"):
        read_results(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(DataError, match=r"study\.json"):
        read_results(tmp_path)


def test_one_comparison_is_not_corrected_and_sizes_of_one_kind_are_a_range():
    def pair(visible, significant=True):
        return {"is_significant": significant, "smallest_visible": visible, "label": "score", "unit": ""}

    assert "Holm" not in conclusion([pair(0.1)])
    assert "the one comparison" in conclusion([pair(0.1, significant=False)])
    both = conclusion([pair(0.1), pair(0.4, significant=False)])
    assert "1 of 2 comparisons finds" in both
    assert "after Holm's correction" in both
    assert "score: 0.100 to 0.400" in both


def test_the_cost_of_a_cell_goes_from_its_fastest_to_its_slowest_run(folder):
    show(folder, console=Console(file=StringIO()))
    assert "sft: 3 runs, 10 to 12 s each" in (folder / "results.md").read_text()
