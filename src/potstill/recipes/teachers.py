"""From a teacher section to a teacher that answers: the one place that knows every kind of it. It knows no student and no objective."""

import os

import torch

from potstill.models.causal_lm import CausalLM
from potstill.models.loading import load_model
from potstill.models.proofs import prove_head, refuse_leaking_packing
from potstill.recipes.fitting import Single
from potstill.recipes.preparation import Preparation
from potstill.recipes.schema import Recipe
from potstill.teachers.config import LocalTeacherConfig
from potstill.teachers.local import LocalTeacher
from potstill.teachers.teacher import Teacher


def make_teacher(recipe: Recipe, preparation: Preparation) -> Teacher:
    """The teacher of a recipe. Raises ModelError and IncompatibleError naming it; nothing stays open where it raises."""
    teacher = recipe.teacher
    assert isinstance(teacher, LocalTeacherConfig)
    return _single(recipe, preparation, teacher)


def _single(recipe: Recipe, preparation: Preparation, teacher: Single) -> Teacher:
    assert isinstance(teacher, LocalTeacherConfig)
    loaded = load_model(
        teacher, precision=recipe.training.precision, trainable=False, device=own_device(), seed=recipe.run.seed, sharded=teacher.sharded
    )
    causal_lm = CausalLM(loaded, preparation.comparison.vocabulary_size)
    prove(causal_lm, packed=recipe.data.packing)
    return LocalTeacher(causal_lm)


def own_device() -> str:
    """The device of this process: its rank's accelerator, where there is one."""
    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    return f"{kind.type if kind else 'cuda'}:{os.environ.get('LOCAL_RANK', '0')}"


def prove(model: CausalLM, *, packed: bool) -> None:
    """What is assumed of a loaded model, asked of it. Raises ModelError where it is not so."""
    prove_head(model)
    if packed:
        refuse_leaking_packing(model)
