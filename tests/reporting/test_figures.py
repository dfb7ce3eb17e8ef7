"""Pictures as data: seeds under their mean, extremes kept, points budgeted, a study drawn along its axes."""

import json

import pytest

import reported
from potstill.reporting.figures import LEAST_POINTS, MOST_POINTS, Figure, Line, curve_figures, mean_curve, series_figures
from potstill.reporting.pipeline import cells
from potstill.reporting.records import normalise
from potstill.reporting.study import Axis, read_study
from potstill.reporting.study_figures import study_figures
from potstill.reporting.summary import Curve, summarise_all


def test_seeds_of_one_cell_are_faint_under_their_mean(tmp_path):
    for seed in range(3):
        reported.write_run(tmp_path / f"kd-{seed}", reported.recipe(0.5, seed), level=0.1 * seed)
    reported.write_run(tmp_path / "sft-0", reported.recipe(0.0, 0))
    summaries = summarise_all([tmp_path])
    found = cells(summaries)
    assert [(cell.name, cell.members) for cell in found] == [("kd", (0, 1, 2)), ("sft-0", (3,))]
    figure = next(figure for figure in curve_figures(summaries, found) if figure.title.startswith("cross-entropy"))
    drawn = [(line.legend, line.kind, line.is_faint) for line in figure.lines]
    assert drawn.count(("kd", "validation", True)) == 3
    assert drawn.count(("kd", "validation", False)) == 1
    assert drawn.count(("sft-0", "training", False)) == 1
    mean = next(line for line in figure.lines if line.legend == "kd" and line.kind == "training" and not line.is_faint)
    seeds = [line for line in figure.lines if line.legend == "kd" and line.kind == "training" and line.is_faint]
    assert mean.y == pytest.approx([sum(values) / 3 for values in zip(*(line.y for line in seeds), strict=True)])


def test_a_mean_is_taken_where_every_seed_was_logged():
    assert mean_curve([Curve((1, 2, 3), (1.0, 2.0, 3.0)), Curve((2, 3, 4), (4.0, 6.0, 8.0))]) == Curve((2, 3), (3.0, 4.5))
    assert mean_curve([Curve((1, 2), (1.0, 2.0)), Curve((2, 3), (4.0, 6.0))]) is None


def test_all_points_of_a_page_have_a_budget_and_spikes_survive_it(tmp_path):
    path = reported.write_run(tmp_path / "kd", reported.recipe(0.5, 0), steps=2)
    lines = [{"step": step, "loss": 99.0 if step == 1234 else 1.0} for step in range(1, 3001)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summaries = summarise_all([path])
    for budget, most in ((10**9, MOST_POINTS), (100, 100), (1, LEAST_POINTS)):
        (figure,) = curve_figures(summaries, cells(summaries), all_points=budget)
        assert len(figure.lines[0].x) <= most
        assert max(figure.lines[0].y) == 99.0
        assert figure.left_out == 3000 - len(figure.lines[0].x)


def test_series_of_one_kind_share_a_picture_and_calibration_has_its_diagonal():
    drawn = series_figures([normalise(reported.evaluation())[0]])
    assert [(figure.title, len(figure.lines), figure.has_diagonal) for figure in drawn] == [
        ("calibration", 4, True), ("answer lengths", 4, False), ("divergence by position", 4, False),
    ]  # fmt: skip
    # A model keeps its colour through all of them.
    assert {figure.lines[2].colour for figure in drawn} == {2}


def test_a_study_is_drawn_along_its_axis_with_intervals_and_its_twin_as_a_level(tmp_path):
    folder = reported.write_study(tmp_path, ratios=(0.0, 0.5, 1.0), seeds=(0,))
    study, warnings = read_study(folder)
    assert warnings == []
    (summary,) = [summary for summary in summarise_all([folder]) if summary.study]
    drawn = study_figures(study, list(summary.evaluations.values()))
    assert [figure.title for figure in drawn] == [
        "exact-match accuracy · arithmetic along kd_ratio", "bits per byte · held-out along kd_ratio",
        "normalised accuracy · commonsense along kd_ratio",
    ]  # fmt: skip
    cells_line, twin = drawn[0].lines
    assert (cells_line.x, cells_line.y) == ((0.5, 1.0), pytest.approx((0.53, 0.56)))
    assert cells_line.low == pytest.approx((0.012, 0.012))
    assert (twin.legend, twin.style, twin.y) == ("sft", "level", (0.5, 0.5))


def test_an_axis_is_drawn_by_what_its_values_are():
    assert Axis("teacher", ("tuned", "plain")).kind == "category"
    assert Axis("objective.kd_ratio", ("a", "b"), (0.0, 1.0)).kind == "linear"
    assert Axis("training.learning_rate", ("a", "b"), (1e-5, 1e-3)).kind == "log"


def test_two_axes_give_a_line_for_each_label_of_the_other(tmp_path):
    names = ("a", "b", "c", "d")
    points = [{"lr": x, "teacher": y} for x in ("lr=1", "lr=2") for y in ("tuned", "plain")]
    axes = [{"name": "lr", "labels": ["lr=1", "lr=2"], "values": [1, 2]}, {"name": "teacher", "labels": ["tuned", "plain"], "values": None}]
    described = [{"name": name, "points": [point]} for name, point in zip(names, points, strict=True)]
    (tmp_path / "study.json").write_text(json.dumps({"kind": "study", "version": 1, "title": "t", "axes": axes, "cells": described}))
    study, _ = read_study(tmp_path)
    drawn = study_figures(study, [normalise(reported.evaluation(names))[0]])
    by_rate, by_teacher = drawn[:2]
    assert [(line.legend, line.x) for line in by_rate.lines] == [("tuned", (1.0, 2.0)), ("plain", (1.0, 2.0))]
    assert [(line.legend, line.x) for line in by_teacher.lines] == [("lr=1", (0.0, 1.0)), ("lr=2", (0.0, 1.0))]
    assert by_teacher.categories == ("tuned", "plain")
    assert [row[0] for row in by_teacher.table()["rows"]] == ["tuned", "plain"]


def test_names_are_escaped_for_plotly_and_numbers_short():
    line = Line("<b>x</b>", 0, "other", (1, 2.123456789), (None, 1 / 3))
    entry = Figure("t", "<i>", "y", (line,)).to_json()
    assert entry["lines"][0]["name"] == "&lt;b&gt;x&lt;/b&gt;"
    assert entry["x_label"] == "&lt;i&gt;"
    assert (entry["lines"][0]["x"], entry["lines"][0]["y"]) == ([1, 2.12346], [None, 0.333333])
