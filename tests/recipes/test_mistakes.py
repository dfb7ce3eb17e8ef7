"""What is said of a wrong value: the place that is wrong, once, and what would be right there."""

import pytest

from potstill.errors import ConfigError
from potstill.recipes.read import recipe_from_values

MINIMAL = {"student": {"path": "a/b"}, "data": {"train": "x.jsonl"}, "training": {"steps": 1}, "run": {"folder": "runs/x"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"train": [{"path": "x", "weigth": 1}]}}, "data.train[0].weigth: unknown key; did you mean weight?"),
        ({"data": {"train": [{"path": "x", "weight": -1}]}}, "data.train[0].weight: must be above 0"),
        ({"data": {"train": "x", "validation": {"path": "y", "splt": "a"}}}, "data.validation.splt: unknown key; did you mean split?"),
        ({"data": {"train": "x", "on_bad_line": {"skip": 0}}}, "data.on_bad_line.skip: must be at least 1"),
        ({"data": {"train": "x", "on_bad_line": "skip"}}, "data.on_bad_line: must be stop or a mapping"),
        ({"data": {"train": []}}, "data.train: must not be empty"),
        ({"training": {"steps": 1, "non_finite": {"skip": 0}}}, "training.non_finite.skip: must be at least 1"),
        ({"student": [{"pth": "a"}]}, "student: must be a mapping"),
        ({"data": {"train": {"pth": "a"}}}, "data.train: must be text or a list"),
    ],
)
def test_of_a_key_with_several_kinds_only_the_kind_that_was_meant_complains(change, said):
    with pytest.raises(ConfigError) as caught:
        recipe_from_values(MINIMAL | change)
    lines = str(caught.value).splitlines()
    assert said in "\n".join(lines)
    assert len(lines) == (2 if "pth" in str(change) else 1), lines
