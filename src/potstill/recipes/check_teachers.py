"""What the look before a run says of the teacher, whatever its kind: where it lies, what it gives, what it takes."""

from collections.abc import Mapping

from potstill.models.footprint import Footprint
from potstill.recipes.fitting import members
from potstill.recipes.schema import Recipe
from potstill.recipes.words import in_words
from potstill.teachers.config import CacheTeacherConfig, EnsembleTeacherConfig, LocalTeacherConfig


def short(key: str) -> str:
    """How a table calls the teacher under a key of the recipe: "teacher", or a member of an ensemble by its name."""
    return key.rpartition(".")[2]


def model_words(path: str, footprint: Footprint | None, *details: str | None) -> str:
    counted = f"{in_words(footprint.parameters, 'parameter')}" if footprint else None
    return ", ".join(part for part in (path, counted, *details) if part)


def teacher_rows(recipe: Recipe, footprints: Mapping[str, Footprint]) -> list[tuple[str, str]]:
    """A line for each teacher."""
    rows = []
    for key, member in members(recipe.teacher):
        if isinstance(member, LocalTeacherConfig):
            adapter = f"with {member.adapter}" if member.adapter else None
            said = model_words(member.path, footprints.get(key), adapter, member.quantization)
        elif isinstance(member, CacheTeacherConfig):
            said = f"recorded answers in {member.path}"
        else:
            said = f"{member.model}, served by {member.backend} at {member.url}"
        rows.append((short(key), said))
    return rows


def answer_words(recipe: Recipe) -> str:
    """How the teacher answers."""
    teacher = recipe.teacher
    if isinstance(teacher, LocalTeacherConfig):
        return "its whole next-token distribution at every target, as hidden rows and a head"
    if isinstance(teacher, EnsembleTeacherConfig):
        if teacher.column is not None:
            return f"each row is answered by the teacher that its column {teacher.column!r} names"
        shares = teacher.weights or dict.fromkeys(teacher.teachers, 1.0)
        total = sum(shares.values())
        return f"the mean of their probabilities: {', '.join(f'{name} {share / total:.3g}' for name, share in shares.items())}"
    if isinstance(teacher, CacheTeacherConfig):
        return "what was recorded of it; no teacher is loaded"
    return f"its {teacher.top_k} most likely tokens at every target, over HTTP" if teacher is not None else "nothing"
