"""What run folders say: curves, evaluations, and what should worry a reader."""

import json
import subprocess
import sys

import pytest

from potstill.errors import RunFolderError
from potstill.reporting.summary import Curve, quantities, read_curves, summarise, summarise_all
from potstill.run_folder import RunFolder


def make_run(path, *, finish=True, lines=None, **recipe):
    lines = lines if lines is not None else [{"step": step, "loss": 1 / step, "eval_loss/ce": 2 / step} for step in (1, 2, 3)]
    with RunFolder.open(path, {"student": {"path": "some/student"}, "run": {"seed": 0}} | recipe) as folder:
        for line in lines:
            folder.append_metrics(line)
        if finish:
            folder.finish({"steps": 3})
    return path


def record(**changes):
    return {"kind": "evaluation", "version": 1, "title": "Tasks", "data": {}, "warnings": [], "models": [], "comparisons": []} | changes


def write_evaluation(run, name, value):
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def test_a_finished_run_reads_back_whole(tmp_path):
    run = make_run(tmp_path / "run")
    write_evaluation(run, "test", record(warnings=["too few"]))
    found = summarise(run)
    assert (found.name, found.status, found.finished) == ("run", "finished", {"steps": 3})
    assert found.recipe == {"student.path": "some/student", "run.seed": 0}
    assert found.curves["loss"] == Curve((1, 2, 3), (1.0, 0.5, 1 / 3))
    assert list(found.evaluations) == ["test"]
    assert found.warnings == ["test: too few"]
    assert found.sessions[0]["versions"]["potstill"]


def test_a_run_that_is_not_finished_says_so(tmp_path):
    assert "not finished" in summarise(make_run(tmp_path / "run", finish=False)).warnings[0]


def test_what_is_not_finite_is_left_out_of_the_curve_and_named():
    curves = read_curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}])
    assert curves["loss"] == Curve((1, 3), (1.0, 0.5), missing=1)


def test_steps_that_were_refused_and_logs_that_are_torn_are_named(tmp_path):
    run = make_run(tmp_path / "run", lines=[{"step": 1, "loss": None, "non_finite_steps": 2}])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    found = summarise(run)
    assert "non_finite_steps" not in found.curves
    text = " ".join(found.warnings)
    assert "loss: not finite in 1 logged steps" in text
    assert "2 steps were not taken" in text
    assert "torn line" in text


def test_a_resume_and_its_changes_are_named(tmp_path):
    run = make_run(tmp_path / "run", finish=False, training={"epochs": 1})
    make_run(run, lines=[], training={"epochs": 2})
    warnings = summarise(run).warnings
    assert any(warning.startswith("resumed ") for warning in warnings)
    assert "changed at that resume: training.epochs: 1 -> 2" in warnings


def test_of_a_step_that_was_logged_twice_the_last_counts():
    assert read_curves([{"step": 5, "loss": 3.0}, {"step": 5, "loss": 2.0}])["loss"] == Curve((5,), (2.0,))


def test_words_and_flags_are_no_curves():
    assert read_curves([{"step": 1, "epoch": 0.5, "note": "x", "flag": True, "loss": 1}]) == {"loss": Curve((1,), (1.0,))}


def test_training_and_validation_are_one_quantity_and_losses_come_first(tmp_path):
    lines = [{"step": step, "zeal": 1.0, "loss": 2.0, "eval_loss": 2.0, "loss/ce": 1.0, "once": 1.0} for step in (1, 2)]
    del lines[0]["once"]
    assert quantities([summarise(make_run(tmp_path / "run", lines=lines))]) == ["loss/ce", "loss", "zeal"]


@pytest.mark.parametrize("most", [4, 10, 101])
def test_thinning_keeps_ends_and_extremes(most):
    values = [float(i % 7) for i in range(1000)]
    values[613], values[614] = 99.0, -99.0
    thin = Curve(tuple(range(1000)), tuple(values)).thinned(most)
    assert len(thin.steps) <= most
    assert (thin.steps[0], thin.steps[-1]) == (0, 999)
    assert {99.0, -99.0} <= set(thin.values)
    assert list(thin.steps) == sorted(thin.steps)


def test_a_short_curve_is_left_as_it_is():
    curve = Curve((1, 2, 3), (1.0, 2.0, 3.0))
    assert curve.thinned(3) is curve


def test_a_folder_of_runs_stands_for_them_and_shows_its_own_evaluations_first(tmp_path):
    for name in ("kd", "sft"):
        make_run(tmp_path / "study" / name)
    write_evaluation(tmp_path / "study", "all", record())
    assert [one.name for one in summarise_all([tmp_path / "study"])] == ["study", "kd", "sft"]
    assert [one.name for one in summarise_all([tmp_path / "study" / "sft"])] == ["sft"]


def test_where_there_is_no_run_nothing_is_reported(tmp_path):
    with pytest.raises(RunFolderError, match="neither a run folder"):
        summarise_all([tmp_path])


def test_foreign_and_broken_evaluations_are_named_and_the_rest_is_read(tmp_path):
    run = make_run(tmp_path / "run")
    write_evaluation(run, "good", record())
    write_evaluation(run, "other", {"results": {}})
    (run / "evaluation" / "cut.json").write_text('{"kind": "eval', encoding="utf-8")
    found = summarise(run)
    assert list(found.evaluations) == ["good"]
    assert any("cut.json" in line and "half-written" in line for line in found.warnings)
    assert any("other.json" in line and "not one of" in line for line in found.warnings)


def test_reporting_needs_no_torch():
    code = "import sys, potstill.reporting.page, potstill.reporting.terminal; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
