"""Steps to an accuracy: where curves cross, and how sure that is."""

import numpy as np
import pytest

from potstill.studies.steps import first_reached, steps_to_accuracy

STEPS = (100, 200, 300, 400)


def study(names=("training.steps",)):
    cells = [
        {"name": f"{'sft,' if is_sft else ''}steps={steps}", "is_sft": is_sft, "budget": {"steps": steps}}
        for is_sft in (True, False)
        for steps in STEPS
    ]
    return {"axes": [{"name": name} for name in names], "cells": cells}


def record(curve, final, *, noise=0.0, higher_is_better=True, num_items=60, seeds=(0, 1, 2)):
    """Scores by item whose means are `curve` at STEPS for the distilled student, and `final` for fine-tuning at the last."""
    generator = np.random.default_rng(0)
    hard = generator.normal(0, noise, num_items)
    models, items = [], []
    for cell in study()["cells"]:
        mean = final if cell["is_sft"] else curve[STEPS.index(cell["budget"]["steps"])]
        metric = {"value": mean, "higher_is_better": higher_is_better, "counted": "questions", "label": "accuracy"}
        models.append({"name": cell["name"], "metrics": {"t/right": metric}})
        items += [
            {
                "task": "t",
                "model": cell["name"],
                "seed": seed,
                "item": str(item),
                "questions": 1,
                "right": mean + hard[item] + generator.normal(0, noise),
            }
            for seed in seeds
            for item in range(num_items)
        ]
    return {"tasks": [{"name": "t", "primary": "t/right"}], "models": models, "items": items}


@pytest.mark.parametrize(
    ("scores", "target", "expected"),
    [((1, 2, 3, 4), 2.5, 250), ((1, 2, 3, 4), 3, 300), ((1, 2, 3, 4), 0.5, 100), ((1, 2, 3, 4), 5, np.inf), ((1, 3, 2, 4), 2.5, 175)],
)
def test_a_target_is_reached_where_the_line_first_crosses_it(scores, target, expected):
    assert first_reached(STEPS, scores, target) == expected


def test_without_noise_the_share_is_exact_and_certain():
    (found,) = steps_to_accuracy(study(), record((0.1, 0.3, 0.5, 0.6), 0.4))
    assert (found.share, found.low, found.high) == pytest.approx((250 / 400,) * 3)
    assert "62% of its 400 steps" in found.sentence or "63% of its 400 steps" in found.sentence
    assert "fewer than the 70 percent" in found.sentence


def test_less_is_better_where_the_metric_says_so():
    (found,) = steps_to_accuracy(study(), record((5.0, 4.0, 3.0, 2.0), 2.5, higher_is_better=False))
    assert found.share == pytest.approx(350 / 400)
    assert "more than the 70 percent" in found.sentence


def test_a_score_that_is_not_reached_is_said_so():
    (found,) = steps_to_accuracy(study(), record((0.1, 0.2, 0.3, 0.4), 0.6))
    assert "after more than 100 % of its 400 steps" in found.sentence


def test_noise_widens_the_interval_about_the_share():
    (found,) = steps_to_accuracy(study(), record((0.1, 0.3, 0.5, 0.6), 0.4, noise=0.3))
    assert found.low < found.share < found.high
    assert found.high - found.low > 0.05


def test_other_studies_have_no_such_answer():
    whole = record((0.1, 0.2, 0.3, 0.4), 0.3)
    assert steps_to_accuracy(study(("objective.kd_ratio",)), whole) == []
    assert steps_to_accuracy(study(), {key: value for key, value in whole.items() if key != "items"}) == []
    whole["items"] = [item for item in whole["items"] if (item["item"], item["seed"]) != ("0", 0)]
    assert steps_to_accuracy(study(), whole) == []
