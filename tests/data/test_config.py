"""What a recipe may say about data, and what it may not."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from potstill.data.config import OPTIONAL_COLUMNS, REQUIRED_COLUMNS, DataConfig


def test_the_contract_of_a_recipe():
    config = DataConfig.model_validate(
        {
            "train": "yahma/alpaca-cleaned",
            "validation": 0.02,
            "format": "instruct",
            "max_tokens": 2048,
            "too_long": "truncate_right",
            "packing": True,
        }
    )
    assert (config.validation, config.held_out, config.bad_lines_allowed) == (0.02, None, 0)
    mixture = DataConfig.model_validate(
        {
            "train": [{"path": "a.jsonl", "weight": 2}, {"path": "b.txt", "weight": 1, "format": "text"}],
            "validation": {"path": "name/set", "split": "test"},
            "on_bad_line": {"skip": 3},
        }
    )
    assert [item.path for item in mixture.sources] == ["a.jsonl", "b.txt"]
    assert (mixture.held_out and mixture.held_out.split, mixture.bad_lines_allowed) == ("test", 3)
    assert DataConfig(train="a.jsonl", validation="b.jsonl").held_out == DataConfig(train="b.jsonl").sources[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"validation": 0.0}, "no fraction between 0 and 1"),
        ({"validation": 1}, "no fraction"),
        ({"validation": 20}, "no fraction"),
        ({"validation": -0.1}, "no fraction"),
        ({"too_long": "cut"}, "truncate_right"),
        ({"max_tokens": 1}, "greater than or equal to 2"),
        ({"format": "sharegpt"}, "prompt_completion"),
        ({"on_bad_line": "skip"}, "on_bad_line"),
        ({"on_bad_line": {"skip": 0}}, "greater than or equal to 1"),
        ({"maxtokens": 5}, "maxtokens"),
        ({"columns": {"answer": "output"}}, "the format instruct reads instruction, input, output"),
        ({"columns": {"output": None}}, "cannot be null"),
        ({"train": []}, "at least 1"),
        ({"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "a weight, or none"),
        ({"train": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"train": [{"path": "a", "weight": float("inf")}]}, "finite"),
        ({"train": [{"path": "a", "format": "text", "columns": {"output": "o"}}]}, "the format text reads text"),
        ({"too_long": "split"}, "split is for the format text"),
        ({"limit": 0}, "greater than or equal"),
        ({"validation": {"path": "a", "weight": 1.0}}, "weight has no meaning"),
        ({"instruct_prompt": "alpaca", "chat_template": "alpaca"}, "twice"),
    ],
)
def test_what_is_refused(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        DataConfig.model_validate({"train": "a.jsonl", **changes})


def test_every_format_has_its_columns():
    assert REQUIRED_COLUMNS.keys() == OPTIONAL_COLUMNS.keys()


def test_reading_a_configuration_imports_neither_torch_nor_transformers():
    code = "import sys, potstill.data.config; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True)
