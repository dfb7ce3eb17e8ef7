"""What a recipe may say of training, and what is refused before anything is loaded."""

import subprocess
import sys
from typing import get_args

import pytest
from pydantic import ValidationError

from potstill.training.config import Scheduler, TrainingConfig


def test_it_reads_without_torch():
    code = "import sys, potstill.training.config; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({}, "neither"),
        ({"epochs": 1, "steps": 5}, "both"),
        ({"steps": 0}, "steps"),
        ({"epochs": 0}, "epochs"),
        ({"steps": 5, "batch_size": 0}, "batch_size"),
        ({"steps": 5, "learning_rate": -1.0}, "learning_rate"),
        ({"steps": 5, "scheduler": "cosin"}, "scheduler"),
        ({"steps": 5, "scheduler": "reduce_lr_on_plateau"}, "scheduler"),
        ({"steps": 5, "scheduler": "cosine_with_min_lr"}, "min_lr"),
        ({"steps": 5, "scheduler": "warmup_stable_decay"}, "num_decay_steps"),
        ({"steps": 5, "non_finite": "skip"}, "non_finite"),
        ({"steps": 5, "non_finite": {"skip": 0}}, "skip"),
        ({"steps": 5, "early_stopping": {"patience": 0}}, "patience"),
        ({"steps": 5, "precision": "fp16"}, "precision"),
        ({"steps": 5, "learning_rat": 1.0}, "learning_rat"),
    ],
)
def test_what_has_no_meaning_is_refused(keys, found):
    with pytest.raises(ValidationError) as raised:
        TrainingConfig(**keys)
    assert found in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "steps"), [({"epochs": 2}, 14), ({"epochs": 0.5}, 4), ({"epochs": 1.1}, 8), ({"steps": 3}, 3), ({"epochs": 0.01}, 1)]
)
def test_the_length_of_a_run(keys, steps):
    assert TrainingConfig(**keys).num_steps(steps_per_epoch=7) == steps


def test_every_schedule_is_one_of_transformers_and_a_function_of_the_step():
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    lowest = {"min_lr": 1e-5}
    options = {"cosine_with_min_lr": lowest, "cosine_warmup_with_min_lr": lowest, "warmup_stable_decay": {"num_decay_steps": 3}}
    for name in get_args(Scheduler):
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.1)
        schedule = get_scheduler(name, optimizer, 2, 10, scheduler_specific_kwargs=options.get(name))
        assert isinstance(schedule, LambdaLR)
