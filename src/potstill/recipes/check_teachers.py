"""What the look before a run says of the teacher, whatever its kind: where it lies, what it gives, what it takes."""

from collections.abc import Mapping
from dataclasses import asdict

from potstill.cache.store import CacheReader
from potstill.capture.disk import bytes_per_row, predicted_bytes
from potstill.capture.units import Share, sequences_of
from potstill.errors import PotstillError
from potstill.models.footprint import Footprint
from potstill.recipes.capturing import capturing, record_format
from potstill.recipes.fitting import members
from potstill.recipes.preparation import Preparation
from potstill.recipes.recorded import own_rows
from potstill.recipes.schema import Recipe
from potstill.recipes.words import gib, in_words
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.config import CacheTeacherConfig, EnsembleTeacherConfig, LocalTeacherConfig, SelfTeacherConfig, ServerTeacherConfig

# A look does not wait for a server that is away.
_PATIENCE_SECONDS = 5.0


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
    if isinstance(teacher, SelfTeacherConfig):
        return "its whole next-token distribution at every target, with what it sees beyond the student's prompt"
    return f"its {teacher.top_k} most likely tokens at every target, over HTTP" if teacher is not None else "nothing"


def cache_rows(recipe: Recipe, key: str, reader: CacheReader, preparation: Preparation) -> list[tuple[str, str]]:
    """What a cache holds, what it takes, and how much of this run's text it covers."""
    answers = sum(int(entries["rows"].sum()) for _, entries in reader.in_order())
    size, form = sum(reader.segments.values()), reader.format
    told = ("k", "num_samples", "temperature", "exact", "width")
    details = {name: value for name, value in asdict(form).items() if value and name in told}
    each = f", {size / answers:,.1f} bytes a token" if answers else ""
    rows = [
        (short(key), reader.name),
        ("holds", f"{form.outcomes}: {', '.join(f'{name} {value}' for name, value in details.items())}"),
        ("answers", f"{in_words(len(reader), 'sequence')}, {in_words(answers, 'target token')}, {gib(size)}{each}"),
    ]
    teacher = preparation.cached.get(key)
    if isinstance(teacher, CachedTeacher):
        rows.append(("covers", f"{in_words(sum(map(len, own_rows(recipe, key, preparation.data))), 'example')} of this run, all of them"))
    rows += [("damaged", str(damage)) for damage in reader.damage[:3]]
    return rows


def server_rows(teacher: ServerTeacherConfig, preparation: Preparation, problems: list[str]) -> list[tuple[str, str]]:
    """What a server says when it is asked; that it is not there, or serves something else, is a problem."""
    from potstill.teachers.server import ServerTeacher

    size, patient = preparation.comparison.vocabulary_size, min(_PATIENCE_SECONDS, teacher.max_outage_seconds)
    try:
        asked = ServerTeacher(
            teacher.model_copy(update={"max_outage_seconds": patient}), vocabulary_size=size, tokenizer=preparation.student.tokenizer
        )
    except PotstillError as error:
        problems.append(str(error))
        return [("asked", "it could not be asked, or does not fit; see below")]
    try:
        return [("answers", f"{teacher.top_k} outcomes a target"), ("served", asked.identity["served model"])]
    finally:
        asked.close()


def capture_rows(recipe: Recipe, preparation: Preparation) -> list[tuple[str, str]]:
    """What `potstill capture` would write of this recipe, and what it would have to ask for."""
    config = capturing(recipe)
    sets = [examples for examples in (preparation.data.train, preparation.data.validation) if examples is not None]
    sequences = sequences_of(sets, Share())
    width = 0
    if config.outcomes in ("hidden", "projected"):
        asked = preparation.student if config.outcomes == "projected" else next(iter(preparation.teachers.values()))
        width = asked.config.get_text_config().hidden_size
    dtype = "bfloat16" if config.outcomes == "hidden" and recipe.training.precision == "bf16" else "float32"
    form = record_format(config, preparation, width, dtype)
    rows, tokens = int(sequences.targets.sum()), int(sequences.lengths.sum())
    numbers = [f"{form.k} tokens"] * (form.k > 0) + [f"{form.num_samples} draws"] * (form.num_samples > 0)
    return [
        ("written to", config.path),
        ("records", ", ".join([config.outcomes, *numbers])),
        ("to be asked", f"{in_words(len(sequences), 'sequence')} of {in_words(tokens, 'token')}, {in_words(rows, 'target token')}"),
        ("on disk", f"at most about {gib(predicted_bytes(form, rows, len(sequences)))}, {bytes_per_row(form):,.0f} bytes a target token"),
        ("takes", f"one forward pass of the teacher over {in_words(tokens, 'token')}; a run over the text is as many an epoch"),
    ]
