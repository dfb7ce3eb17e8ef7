"""What a cache states of where its answers came from: the text that was read, and who answered. Compared field by field elsewhere."""

import json
from collections.abc import Mapping
from typing import Any

from potstill.cache.codec import VERSION
from potstill.cache.provenance import Provenance
from potstill.environment import environment
from potstill.errors import ConfigError
from potstill.models.config import LoadingConfig
from potstill.models.identity import template_digest, tokenizer_digest, weights_digest
from potstill.models.loading import choose_dtype
from potstill.recipes.fitting import Single
from potstill.recipes.preparation import Preparation
from potstill.recipes.schema import Recipe
from potstill.teachers.config import EnsembleTeacherConfig, LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig
from potstill.teachers.teacher import Teacher

_WITH_A_TEMPLATE = ("instruct", "chat")


def reading_fields(recipe: Recipe, preparation: Preparation) -> dict[str, Any]:
    """How rows become tokens: what decides which sequences there are. The data must have been prepared: that settles the template."""
    data, tokenizer = recipe.data, preparation.student.tokenizer
    sources = [*data.sources, *([data.held_out] if data.held_out else [])]
    templated = any((item.format or data.format) in _WITH_A_TEMPLATE for item in sources)
    return {
        "tokenizer": tokenizer_digest(tokenizer), "template": template_digest(tokenizer) if templated else "none is used",
        "truncation": {"max_tokens": data.max_tokens, "too_long": data.too_long},
        "vocabulary size": preparation.comparison.vocabulary_size,
    }  # fmt: skip


def provenance_of(recipe: Recipe, preparation: Preparation, teacher: Teacher) -> Provenance:
    """Everything that the answers of this teacher to this text depend on. Reads every weight of a local teacher once."""
    section = recipe.teacher
    if isinstance(section, EnsembleTeacherConfig):
        single = {name: _answering(recipe, member, _of_member(teacher, name)) for name, member in section.teachers.items()}
        answering: dict[str, Any] = {"teachers": single, "ensemble": str(teacher.identity.get("ensemble"))}
    else:
        assert section is not None
        if isinstance(section, SelfTeacherConfig):
            raise ConfigError("teacher.kind: self is the student, which changes at every step, so that nothing of it can be recorded")
        answering = _answering(recipe, section, teacher.identity)
    fields = {**answering, **reading_fields(recipe, preparation), "codec version": VERSION, "notes": _notes(recipe)}
    return Provenance(fields)


def _of_member(teacher: Teacher, name: str) -> dict[str, str]:
    return {key.removeprefix(f"{name}: "): value for key, value in teacher.identity.items() if key.startswith(f"{name}: ")}


def _answering(recipe: Recipe, config: Single, identity: Mapping[str, str]) -> dict[str, Any]:
    """Who answers: weights for a model in this process, the probe for a server, the cache's own provenance for a cache."""
    if isinstance(config, LocalTeacherConfig):
        return weights_of(config, seed=recipe.run.seed) | {"teacher dtype": _dtype(recipe, config)}
    if isinstance(config, ServerTeacherConfig):
        return measured(identity, config.probe_tolerance)
    return dict(identity)


def weights_of(config: LoadingConfig, *, seed: int) -> dict[str, str]:
    """Who a model in this process is, by its weights."""
    return weights_digest(config, seed=seed)


def _dtype(recipe: Recipe, config: LoadingConfig) -> str:
    return str(choose_dtype(config, recipe.training.precision, trainable=False)).removeprefix("torch.")


def measured(identity: Mapping[str, str], tolerance: float) -> dict[str, Any]:
    """An identity in which a probe's log-probabilities are numbers that may drift by `tolerance` nats."""
    return {
        name: {"values": json.loads(value), "tolerance": tolerance} if name.rpartition(": ")[2] == "probe" else value
        for name, value in identity.items()
    }  # fmt: skip


def _notes(recipe: Recipe) -> dict[str, Any]:
    """For people: names and versions. Nothing of it is compared."""
    stated = environment()
    assert recipe.teacher is not None
    shown = recipe.teacher.model_dump(mode="json", exclude={"api_key_env", "api_key_file"}, exclude_none=True)
    return {"teacher": shown, "student": recipe.student.path, "data": recipe.data.model_dump(mode="json"), "versions": stated["versions"]}
