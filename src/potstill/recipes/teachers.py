"""From a teacher section to a teacher that answers: the one place that knows every kind of it. It knows no student and no objective."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from potstill.models.causal_lm import CausalLM
from potstill.models.loading import load_model
from potstill.models.proofs import prove_head, refuse_leaking_packing
from potstill.recipes.fitting import Single, members
from potstill.recipes.preparation import Preparation
from potstill.recipes.provenance import measured
from potstill.recipes.schema import Recipe
from potstill.teachers.config import CacheTeacherConfig, EnsembleTeacherConfig, SelfTeacherConfig, ServerTeacherConfig
from potstill.teachers.ensemble import MixtureTeacher, RoutedTeacher
from potstill.teachers.local import LocalTeacher
from potstill.teachers.self_teacher import SelfTeacher
from potstill.teachers.teacher import Teacher


def make_teacher(recipe: Recipe, preparation: Preparation, *, refused_answers: Path | None = None) -> Teacher:
    """The teacher of a recipe. Raises ModelError, TeacherError and IncompatibleError naming it; where it raises nothing stays open.

    `refused_answers` is a folder for the first answers of a server that could not be believed.
    """
    section = recipe.teacher
    with ExitStack() as opened:
        made: dict[str, Teacher] = {}
        for key, member in members(section):
            teacher = made[key.removeprefix("teacher.teachers.")] = _single(recipe, preparation, key, member, refused_answers)
            opened.callback(teacher.close)
        if not isinstance(section, EnsembleTeacherConfig):
            whole = made["teacher"]
        elif section.column is not None:
            whole = RoutedTeacher(made, pad_token=preparation.pad_token)
        else:
            whole = MixtureTeacher(made, section.weights)
        opened.pop_all()
    return whole


def make_self_teacher(recipe: Recipe, student: CausalLM) -> SelfTeacher:
    """The student as its own teacher. Raises IncompatibleError where it has no adapter to be without."""
    config = recipe.teacher
    assert isinstance(config, SelfTeacherConfig)
    autocast = torch.bfloat16 if recipe.training.precision == "bf16" else None
    return SelfTeacher(student, config.weights, decay=config.decay, autocast=autocast)


def _single(recipe: Recipe, preparation: Preparation, key: str, teacher: Single, refused_answers: Path | None) -> Teacher:
    size = preparation.comparison.vocabulary_size
    if isinstance(teacher, CacheTeacherConfig):
        return preparation.cached[key]
    if isinstance(teacher, ServerTeacherConfig):
        from potstill.teachers.server import ServerTeacher

        return ServerTeacher(teacher, vocabulary_size=size, tokenizer=preparation.student.tokenizer, quarantine=refused_answers)
    loaded = load_model(
        teacher, precision=recipe.training.precision, trainable=False, device=own_device(), seed=recipe.run.seed, sharded=teacher.sharded
    )
    causal_lm = CausalLM(loaded, size)
    prove(causal_lm, packed=recipe.data.packing)
    return LocalTeacher(causal_lm)


def fingerprints_of(recipe: Recipe, teacher: Teacher) -> dict[str, Any]:
    """What must not change of the teacher under a run that is resumed. What a probe measured may drift as far as the recipe lets it."""
    tolerances = [member.probe_tolerance for _, member in members(recipe.teacher) if isinstance(member, ServerTeacherConfig)]
    return measured(teacher.identity, max(tolerances, default=0.0))


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
