"""Which teacher can serve which objective and which record, as far as the recipe itself says it; and what is taken where it is silent.

It opens nothing: what a cache holds is told by whoever opened it. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from potstill.objectives import catalogue
from potstill.teachers.config import CacheTeacherConfig, EnsembleTeacherConfig, LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig

if TYPE_CHECKING:
    from potstill.recipes.schema import ObjectiveConfig, Recipe

Single = LocalTeacherConfig | CacheTeacherConfig | ServerTeacherConfig
# The supports that recorded outcomes can serve; the first is what is taken where the recipe names none.
SERVES = {
    "top_k": ("top_k_tail", "top_k_renormalised"),
    "sampled": ("samples",),
    "top_k_sampled": ("samples", "top_k_tail", "top_k_renormalised"),
    "projected": ("projected",),
    "hidden": tuple(catalogue.SUPPORTS),
}


@dataclass(frozen=True)
class Answers:
    """What a teacher gives, in the words of a record: `source` says whose it is. None for a number that has no limit."""

    source: str
    outcomes: str
    k: int | None = None
    num_samples: int | None = None
    temperature: float | None = None
    of_targets: bool = False
    """Whether it also gives the log-probability of the token that came, whichever it is."""


def members(teacher: Any) -> Iterator[tuple[str, Single]]:
    """The teachers inside a teacher section, each with the key that it stands under."""
    if isinstance(teacher, EnsembleTeacherConfig):
        yield from ((f"teacher.teachers.{name}", member) for name, member in teacher.teachers.items())
    elif teacher is not None and not isinstance(teacher, SelfTeacherConfig):
        yield "teacher", teacher


def known_answers(key: str, teacher: Single) -> Answers | None:
    """What a teacher gives, where its section says so; None for a cache, which must be opened."""
    if isinstance(teacher, ServerTeacherConfig):
        return Answers(f"{key} (a server)", "top_k", k=teacher.top_k, temperature=1.0, of_targets=True)
    return Answers(f"{key} (a local model)", "hidden") if isinstance(teacher, LocalTeacherConfig) else None


def refuse_unfit(recipe: "Recipe") -> None:
    """Raises ValueError, beginning with a key, for sections that cannot go together whatever lies on the disk."""
    teacher, objective = recipe.teacher, recipe.objective
    for key, member in members(teacher):
        if isinstance(member, LocalTeacherConfig) and member.sharded and member.quantization:
            raise ValueError(f"{key}.sharded: a quantised teacher cannot be sharded; leave out one of sharded and quantization")
        answers = known_answers(key, member)
        if answers is not None:
            settled(objective, answers)
        if isinstance(teacher, EnsembleTeacherConfig) and teacher.column is None and isinstance(member, ServerTeacherConfig):
            raise ValueError(
                f"{key}: a mean needs whole distributions, and a server gives its {member.top_k} most likely tokens alone; give each "
                "row to one teacher with teacher.column, or name a local model or a cache of hidden rows"
            )
    if objective.support == "projected" and teacher is not None:
        refuse_trained_head(recipe, "objective.support")
    if recipe.capture is not None:
        _refuse_unfit_capture(recipe)


def _refuse_unfit_capture(recipe: "Recipe") -> None:
    capture, teacher = recipe.capture, recipe.teacher
    assert capture is not None
    if teacher is None:
        raise ValueError("capture: there is no teacher section, so there is nothing to ask; add one, or leave it out: capture=null")
    if capture.outcomes == "projected":
        refuse_trained_head(recipe, "capture.outcomes")
    if capture.outcomes == "hidden" and isinstance(teacher, EnsembleTeacherConfig):
        raise ValueError("capture.outcomes: hidden rows belong to one head, and an ensemble has several; say top_k or sampled")
    for key, member in members(teacher):
        if not isinstance(member, ServerTeacherConfig):
            continue
        if capture.outcomes != "top_k":
            raise ValueError(f"capture.outcomes: {key} is a server and gives top_k outcomes alone; found {capture.outcomes}; say top_k")
        if "k" in capture.model_fields_set and capture.k > member.top_k:
            raise ValueError(f"capture.k: {capture.k} is more than {key}.top_k: {member.top_k}; set them to the same number")
        if capture.temperature != 1:
            raise ValueError(f"capture.temperature: {key} is a server and answers at 1; found {capture.temperature}; leave it out")


def refuse_trained_head(recipe: "Recipe", key: str) -> None:
    """Raises ValueError where the student's head learns, and what `key` stands for needs one that stays as it is."""
    student = recipe.student
    if student.lora is not None and not student.lora.on_head:
        return
    found = "student.lora trains the head" if student.lora else "without student.lora every weight learns"
    raise ValueError(
        f"{key}: projected outcomes are exact for a student's head that never changes, and {found}; "
        "add student.lora with targets that leave the head alone, or choose other outcomes"
    )


def settled(objective: "ObjectiveConfig", answers: Answers) -> "ObjectiveConfig":
    """The objective with the support, and its size, that these answers have, where the recipe names none.

    Raises ValueError, beginning with the key and naming both sides, where the recipe names what cannot be served.
    """
    if answers.outcomes == "hidden":
        return objective
    if (other := objective.on_student_text) is not None:
        objective = objective.model_copy(update={"on_student_text": settled(other, answers)})
    if not objective.asks_teacher:
        return objective
    if objective.support == "written" and answers.of_targets:
        if objective.policy is not None and objective.policy.baseline == "kl":
            raise ValueError(
                f"objective.policy.baseline: kl needs whole distributions, and {answers.source} gives one log-probability a token; say none"
            )
        return objective
    serves, given = SERVES[answers.outcomes], objective.model_fields_set
    support = objective.support if "support" in given else _natural(serves, objective.divergence)
    if support not in serves:
        said = serves[0] if len(serves) == 1 else f"one of {', '.join(serves)}"
        raise ValueError(
            f"objective.support: {support} asks for more than {answers.source} gives, {answers.outcomes} outcomes; "
            f"say {said}, or leave it out"
        )
    sizes = {"top_k": answers.k} if support.startswith("top_k") else {"num_samples": answers.num_samples} if support == "samples" else {}
    limits = {name: number for name, number in sizes.items() if number is not None}
    for name, number in limits.items():
        asked = getattr(objective, name)
        if asked is not None and (asked > number if name == "top_k" else asked != number):
            remedy = "leave it out, or ask for no more" if name == "top_k" else "draws are taken all or none: leave it out"
            raise ValueError(f"objective.{name}: {asked} asked, and {answers.source} gives {number}; {remedy}")
    if answers.temperature not in (None, objective.temperature) and support != "top_k_renormalised":
        raise ValueError(
            f"objective.temperature: {objective.temperature:g} asked, and {answers.source} answers at {answers.temperature:g}; set "
            f"objective.temperature={answers.temperature:g}" + (", or say support: top_k_renormalised" if "top_k" in support else "")
        )
    taken = {name: number for name, number in limits.items() if getattr(objective, name) is None}
    values = objective.model_dump(include=set(given), exclude_unset=True) | {"support": support} | taken
    return _rebuilt(objective, values, answers)


def _natural(serves: tuple[str, ...], divergence: str) -> str:
    """The first support that the divergence has a meaning on; samples are for forward KL alone."""
    return next((support for support in serves if support != "samples" or divergence == "forward_kl"), serves[0])


def _rebuilt(objective: "ObjectiveConfig", values: dict[str, Any], answers: Answers) -> "ObjectiveConfig":
    """The same objective with a support of the teacher's; what has no meaning on it names the teacher too."""
    try:
        return type(objective).model_validate(values)
    except ValidationError as error:
        cause = error.errors()[0].get("ctx", {}).get("error", error)
        said = str(cause).removeprefix("objective: ").rpartition(";")[0] or str(cause)
        raise ValueError(
            f"objective.support: {answers.source} gives {answers.outcomes} outcomes, so it would be {values['support']}: {said}; "
            "change what does not fit, or choose another teacher"
        ) from None
