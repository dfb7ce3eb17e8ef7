"""Numbers and pictures in a terminal: every estimate with its error, every verdict, curves where they belong."""

import io

import pytest
from rich.console import Console

from potstill.reporting.summary import Curve
from potstill.reporting.terminal import curves_picture, print_evaluation
from potstill.reporting.wording import interval, number, p_value, plus_minus, with_unit


def shown(renderable=None, record=None, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    if record is not None:
        print_evaluation(record, console)
    else:
        console.print(renderable)
    return console.file.getvalue()


def metric(value, error, **changes):
    described = {"label": "forward KL", "unit": "nats", "higher_is_better": False, "count": 1234, "counted": "targets", "num_clusters": 9}
    return described | {"value": value, "standard_error": error, "low": value - 2 * error, "high": value + 2 * error} | changes


def record(models, comparisons=()):
    return {"title": "Tasks [bold]", "data": {}, "warnings": ["odd [red]"], "models": models, "comparisons": list(comparisons)}


def model(name, **metrics):
    return {"name": name, "num_parameters": 12345, "num_seeds": 1, "metrics": metrics}


def test_one_model_shows_its_intervals():
    text = shown(record=record([model("KD", forward_kl=metric(0.1234567, 0.0123))]))
    for part in ("Tasks [bold]", "forward KL (nats) ↓", "0.123 ± 0.012", "0.099 to 0.148", "12,345", "1,234 targets", "warning: odd [red]"):
        assert part in text


def test_several_models_stand_side_by_side_and_a_missing_metric_is_left_empty():
    pair = {"verdict": "KD [b] is better.", "is_significant": True}
    teacher = model("teacher", accuracy=metric(0.9, 0.02, label="accuracy", unit="", higher_is_better=True))
    text = shown(record=record([teacher, model("KD [i]", forward_kl=metric(0.12, 0.03)) | {"num_seeds": 3}], [pair]))
    for part in ("teacher", "KD [i]", "3 seeds", "accuracy ↑", "0.900 ± 0.020", "• KD [b] is better."):
        assert part in text


def of_task(task: str, name: str, value: float, **changes):
    return {f"{task}/{name}": metric(value, 0.01, task=task, metric=name, label=name, unit="", **changes)}


def test_rows_stand_by_task_and_tasks_are_named_where_there_are_several():
    models = [model("a", **of_task("near", "acc", 0.11) | of_task("far", "acc", 0.22)), model("b", **of_task("near", "ece", 0.33))]
    lines = [line.strip("│ ") for line in shown(record=record(models) | {"tasks": [{}, {}]}).splitlines()]
    order = [next(place for place, line in enumerate(lines) if part in line) for part in ("near", "0.110", "0.330", "far", "0.220")]
    assert order == sorted(order)


def test_many_models_stand_below_one_another_with_each_tasks_own_metric():
    models = [model(f"cell {number}", **of_task("near", "acc", number / 10) | of_task("near", "ece", 0.77)) for number in range(6)]
    text = shown(record=record(models) | {"tasks": [{"primary": "near/acc"}]})
    assert all(f"cell {number}" in text and f"0.{number}00 ± 0.010" in text for number in range(1, 6))
    assert "0.770" not in text
    assert "other metrics are in the record" in " ".join(text.split())


def test_what_shows_nothing_in_a_secondary_metric_is_counted_and_not_told():
    told = {"verdict": "said", "is_significant": False, "family": "primary"}
    untold = {"verdict": "unsaid", "is_significant": False, "family": "secondary"}
    found = {"verdict": "found", "is_significant": True, "family": "secondary"}
    text = shown(record=record([model("KD", **of_task("near", "acc", 0.5))], [told, untold, untold, found]), width=200)
    assert "• said" in text
    assert "• found" in text
    assert "unsaid" not in text
    assert "2 further comparisons of secondary metrics find no difference that this test can see" in text


def test_the_picture_has_its_labels_and_its_curves_fall():
    curve = Curve(tuple(range(0, 101, 10)), tuple(4.0 - i * 0.3 for i in range(11)))
    text = shown(curves_picture({"KD [b]": curve}, title="validation [x]", width=30, height=6))
    lines = [line.split("│")[2] for line in text.splitlines() if line.count("│") == 3]
    assert len(lines) == 6
    assert all(part in text for part in ("4.000", "1.000", "step 0", "step 100", "● KD [b]", "validation [x]"))
    places = [next(i for i, character in enumerate(line) if character > "⠀") for line in lines]
    assert places == sorted(places)
    assert places[0] == 0
    assert lines[-1].rstrip()[-1] > "⠀"
    assert len(lines[-1].rstrip()) == 30


def test_every_point_of_a_curve_is_on_the_picture():
    spike = Curve((0, 1, 2), (0.0, 10.0, 0.0))
    text = shown(curves_picture({"one": spike}, title="t", width=21, height=4))
    top = next(line for line in text.splitlines() if "10.00 │" in line)
    assert any(character > "⠀" for character in top.split("│")[2])


@pytest.mark.parametrize("curve", [Curve((5,), (2.0,)), Curve((1, 2), (3.0, 3.0))])
def test_a_single_point_and_a_flat_line_are_drawn(curve):
    assert "●" in shown(curves_picture({"flat": curve}, title="t"))


def test_no_curve_is_said():
    assert "nothing was logged" in shown(curves_picture({"none": Curve((), ())}, title="loss"))


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (1.23456, 0.0123, "1.235"), (1234.5, 12.0, "1,234"), (0.00001234, None, "1.23e-05"), (0.0, None, "0"), (None, 0.1, "—"),
        (float("nan"), None, "—"), (12.3456, None, "12.35"), (0.5, 0.0, "0.5000"), (3e9, None, "3e+09"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_of_their_error(value, error, expected):
    assert number(value, error) == expected


def test_an_error_that_is_not_known_is_not_invented():
    assert plus_minus({"value": 1.5, "standard_error": None}) == "1.500"
    assert interval(None, None, None) == "—"
    assert (p_value(None), p_value(0.0004), p_value(0.04)) == ("—", "< 0.001", "0.040")


def test_a_unit_is_not_said_twice():
    assert with_unit("bits per byte", "bits") == "bits per byte"
    assert with_unit("entropy", "nats") == "entropy (nats)"
