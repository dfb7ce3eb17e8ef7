"""What a recipe may say of a model, and that saying it costs no import of torch."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from potstill.models.config import LoadingConfig, LoraConfig, ModelConfig
from potstill.teachers.config import LocalTeacherConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_reading_a_configuration_imports_neither_torch_nor_transformers():
    program = (
        "import sys, potstill.models.config, potstill.teachers.config; "
        "sys.exit(', '.join(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "at least 1 character"),
        ({"path": "m", "trust_remote_code": True}, "40 hexadecimal digits"),
        ({"path": "m", "trust_remote_code": True, "revision": "main"}, "40 hexadecimal digits"),
        ({"path": "m", "trust_remote_code": True, "revision": COMMIT.upper()}, "40 hexadecimal digits"),
        ({"path": "m", "quantization": "4bit"}, "add lora"),
        ({"path": "m", "quantization": "3bit"}, "4bit"),
        ({"path": "m", "weights": "random", "quantization": "4bit", "lora": {}}, "trained weights"),
        ({"path": "m", "lora": {"targets": []}}, "targets is empty"),
        ({"path": "m", "lora": {"targets": ["lm_head"], "modules_to_save": ["lm_head"]}}, "adapted or trained whole"),
        ({"path": "m", "lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"path": "m", "lora": {"dropout": 1.0}}, "less than 1"),
        ({"path": "m", "dtyp": "float32"}, "dtyp"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**values)


def test_remote_code_is_accepted_with_a_pinned_commit_only():
    assert LoadingConfig(path="m", trust_remote_code=True, revision=COMMIT).trust_remote_code


def test_a_quantised_teacher_needs_no_adapter():
    assert LocalTeacherConfig(path="m", quantization="4bit").kind == "local"


@pytest.mark.parametrize(
    ("lora", "on_head"),
    [
        ({}, False), ({"targets": ["q_proj"]}, False), ({"targets": ["lm_head"]}, True),
        ({"targets": ["model.lm_head"]}, True), ({"modules_to_save": ["lm_head"]}, True), ({"modules_to_save": ["embed_tokens"]}, False),
    ],
)
def test_whether_the_head_learns(lora, on_head):
    assert LoraConfig(**lora).on_head is on_head
