"""From a recipe to a trained and exported student: the one place that knows every kind of part and joins them.

Whatever can be refused without weights is refused before the run folder is made; only the first rank writes and speaks.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

import torch
from transformers.utils import logging

from potstill import storage
from potstill.errors import PotstillError
from potstill.models.causal_lm import CausalLM
from potstill.models.export import export_student
from potstill.models.footprint import count_parameters
from potstill.models.loading import load_model
from potstill.models.merging import refuse_unmergeable
from potstill.models.tokenizers import refuse_different
from potstill.recipes.authors import make_author
from potstill.recipes.objectives import make_objectives
from potstill.recipes.preparation import Preparation, prepare_data, read_models, refuse_too_short, teacher_name
from potstill.recipes.recorded import Readers, open_caches, refuse_foreign_caches, refuse_other_head, settle
from potstill.recipes.schema import Recipe
from potstill.recipes.teachers import fingerprints_of, make_self_teacher, make_teacher, own_device, prove
from potstill.recipes.words import in_words, printable
from potstill.recipes.writing import prepare_writing
from potstill.reporting.card import model_cards
from potstill.rollouts.author import Author
from potstill.rollouts.reward import KEY as REWARD_KEY
from potstill.run_folder import ENVIRONMENT, RECIPE, REFUSED_ANSWERS, REJECTED, RunFolder
from potstill.teachers.config import SelfTeacherConfig, ServerTeacherConfig
from potstill.teachers.self_teacher import SelfTeacher
from potstill.teachers.teacher import Teacher, require, require_answers
from potstill.training.beside import make_beside
from potstill.training.distiller import Distiller, Objective
from potstill.training.processes import Ranks, launched_ranks, stay_on_this_machine
from potstill.training.trainer import TrainingSummary, train

T = TypeVar("T")
Command = Literal["distill", "finetune"]


@dataclass(frozen=True)
class Parts:
    """What a run is made of, beside its data."""

    distiller: Distiller
    teacher: Teacher | None
    author: Author | None = None


def run(recipe: Recipe, *, command: Command, fresh: bool = False, override_resume: Sequence[str] = (), quiet: bool = False) -> Path:
    """Runs a recipe to its end, or resumes it, and returns the run folder. Every rank of a launch calls it.

    A finished run is said to be finished and left as it is. Raises PotstillError for everything that the user can mend.
    """
    first = launched_ranks()[0] == 0
    readers = open_caches(recipe)
    recipe, taken = settle(recipe, readers)
    if not fresh and RunFolder.look(recipe.run.folder, recipe.resolved(), override_resume=override_resume) == "finished":
        folder = RunFolder.read(recipe.run.folder)
        if first:
            _say_finished(folder, again=True)
        return folder.path
    ranks = join_ranks()
    quiet = quiet or not first
    _show_library_bars(not quiet and sys.stderr.isatty())
    with TemporaryDirectory() as scratch:
        preparation = prepare_run(recipe, readers, quiet=quiet, rejects_file=Path(scratch) / REJECTED)
        rejected = _text(Path(scratch) / REJECTED)
    opened = ranks.on_first(lambda: RunFolder.open(recipe.run.folder, recipe.resolved(), fresh=fresh, override_resume=override_resume))
    folder = opened or RunFolder.open(recipe.run.folder, recipe.resolved(), writer=False)
    with folder:
        for note in (*folder.notes, *(taken if first else ())):
            say(note)
        if rejected:
            say(f"{in_words(rejected.count(chr(10)), 'bad row')} left out; {folder.write_text(REJECTED, rejected)} says which and why")
        is_new = folder.status == "new"
        try:
            parts = _on_every(ranks, lambda: load_parts(recipe, preparation, ranks))
        except BaseException:
            if is_new and folder.writer:
                _forget(folder)
            raise
        if first:
            _say_start(recipe, preparation, parts.distiller, folder)
        summary = _train(recipe, preparation, parts, folder, trackers=recipe.run.trackers if first else (), quiet=quiet,
                         overridden=override_resume)  # fmt: skip
        finish(recipe, command, preparation, parts.distiller, folder, summary)
        if first:
            _say_finished(folder)
    return folder.path


def _train(
    recipe: Recipe, preparation: Preparation, parts: Parts, folder: RunFolder, *, trackers: Sequence[str], quiet: bool,
    overridden: Sequence[str] = (),
) -> TrainingSummary:
    data, teacher, author = preparation.data, parts.teacher, parts.author
    beside = None
    if preparation.texts is not None:
        assert recipe.rollouts is not None
        assert recipe.rollouts.text is not None
        beside = make_beside(
            preparation.texts, recipe.rollouts.text, recipe.training, seed=recipe.run.seed, pad_token=preparation.pad_token
        )
    fingerprints = fingerprints_of(recipe, teacher) if teacher is not None else {}
    if beside is not None:
        fingerprints |= {"text beside": beside.rows.fingerprint}
    if preparation.writing is not None and preparation.writing.reward is not None:
        fingerprints |= {REWARD_KEY: preparation.writing.reward.fingerprint}
    kept = {"teacher": teacher} if isinstance(teacher, SelfTeacher) and teacher.weights == "average" else None
    with closing(teacher) if teacher is not None else nullcontext(), closing(author) if author is not None else nullcontext():
        return train(
            parts.distiller, teacher, data.train, data.validation, recipe.training, folder, seed=recipe.run.seed,
            pad_token=preparation.pad_token, packed_tokens=recipe.data.max_tokens if recipe.data.packing else None,
            trackers=trackers, quiet=quiet, fingerprints=fingerprints, author=author, kept=kept, beside=beside,
            overridden=overridden,
        )  # fmt: skip


def join_ranks() -> Ranks:
    """The process group of a launch, made here because the first rank speaks to the others before anything is loaded."""
    stay_on_this_machine()
    if launched_ranks()[1] > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.accelerator.is_available())
    return Ranks()


def _on_every(ranks: Ranks, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; where it fails on one it fails on all, so that none waits for one that is gone."""
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    if ranks.largest([failure is not None])[0]:
        raise failure if failure is not None else PotstillError("another rank failed; its message says why")
    return result  # type: ignore[return-value]


def _show_library_bars(shown: bool) -> None:
    """The bars of transformers for reading and writing weights: for eyes, not for files and not for every rank."""
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


# ---------------------------------------------------------------- the parts


def prepare_run(recipe: Recipe, readers: Readers, *, quiet: bool, rejects_file: Path | None = None) -> Preparation:
    """Tokenizers and caches compared, data rendered. Raises PotstillError for what must fail, before any weight is read."""
    student, teachers, comparison = read_models(recipe)
    refuse_different(comparison, recipe.student.path, teacher_name(recipe))
    refuse_too_short(recipe, {"student": student, **teachers})
    data, ids = prepare_data(recipe, student, quiet=quiet, rejects_file=rejects_file)
    preparation = prepare_writing(recipe, Preparation(student, teachers, comparison, data, ids), quiet=quiet)
    return replace(preparation, cached=refuse_foreign_caches(recipe, readers, preparation))


def _about_steps(recipe: Recipe, preparation: Preparation) -> int:
    train = preparation.data.train
    rows = train.num_tokens / recipe.data.max_tokens if recipe.data.packing else len(train)
    return recipe.training.num_steps(ceil(rows / recipe.training.global_batch))


def load_parts(recipe: Recipe, preparation: Preparation, ranks: Ranks) -> Parts:
    """The student in its distiller, the teacher and the author; what is assumed of them is proven on them. Raises PotstillError."""
    size, precision, device = preparation.comparison.vocabulary_size, recipe.training.precision, own_device()
    steps = _about_steps(recipe, preparation)
    objectives = make_objectives(recipe, size, num_steps=steps)
    itself = isinstance(recipe.teacher, SelfTeacherConfig)
    with ExitStack() as opened:
        teacher = None
        if _loads_teacher(recipe):
            teacher = make_teacher(recipe, preparation, refused_answers=Path(recipe.run.folder) / REFUSED_ANSWERS)
            opened.callback(teacher.close)
            _prove_teacher(recipe, preparation, teacher, objectives)
        student = CausalLM(load_model(recipe.student, precision=precision, trainable=True, device=device, seed=recipe.run.seed), size)
        if recipe.run.merge_adapter:
            refuse_unmergeable(student.inner)
        prove(student, packed=recipe.data.packing)
        refuse_other_head(preparation.cached, student.head(), size)
        if itself:
            teacher = make_self_teacher(recipe, student)
            _prove_teacher(recipe, preparation, teacher, objectives)
        author = make_author(recipe, preparation, student, teacher, ranks, num_steps=steps)
        opened.pop_all()
    return Parts(Distiller(student, objectives), teacher, author)


def _loads_teacher(recipe: Recipe) -> bool:
    """Whether a teacher is opened before the student: one that is asked, or a local one that only writes."""
    if recipe.teacher is None or isinstance(recipe.teacher, SelfTeacherConfig):
        return False
    return recipe.asks_teacher or (recipe.uses_teacher and not isinstance(recipe.teacher, ServerTeacherConfig))


def _prove_teacher(recipe: Recipe, preparation: Preparation, teacher: Teacher, objectives: Mapping[str, Objective]) -> None:
    """Raises PotstillError where it cannot give what an objective asks, or not for the rows that are there."""
    for stream, objective in objectives.items():
        section = "objective.on_student_text" if stream == "student" and recipe.objective.on_student_text else "objective"
        require(teacher, objective.needs, f"{section}.divergence {objective.plan.divergence}")
    if objectives["dataset"].needs.outcomes != "nothing":
        require_answers(teacher, preparation.data.train, preparation.data.validation)


def finish(
    recipe: Recipe, command: Command, preparation: Preparation, distiller: Distiller, folder: RunFolder, summary: TrainingSummary
) -> None:
    """Exports the student and states that the run is complete."""
    total, trainable = count_parameters(distiller.student)
    ranks = Ranks()
    facts = {
        "command": command, **asdict(summary), "parameters": total, "trainable_parameters": trainable,
        "data": preparation.data.counts.as_dict(),
    }  # fmt: skip
    cards = ranks.on_first(lambda: model_cards(folder.path, facts))
    export_student(distiller.student, preparation.student.tokenizer, folder.path, merge=recipe.run.merge_adapter, writes=ranks.first,
                   cards=cards)  # fmt: skip
    ranks.on_first(lambda: folder.finish(facts))


def _forget(folder: RunFolder) -> None:
    """A run that never began leaves no recipe behind that would refuse the mended one."""
    for name in (ENVIRONMENT, RECIPE, "checkpoints"):
        storage.remove(folder.path / name)


# ---------------------------------------------------------------- what the user is told


def say(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")


def _say_start(recipe: Recipe, preparation: Preparation, distiller: Distiller, folder: RunFolder) -> None:
    total, trainable = count_parameters(distiller.student)
    data = preparation.data
    verb = "resuming" if folder.status == "interrupted" else "training"
    say(f"{verb} {recipe.student.path}: {trainable:,} of {in_words(total, 'parameter')}, on {in_words(len(data.train), 'example')} "
         f"({in_words(data.train.num_targets, 'target token')}); everything goes to {folder.path}")  # fmt: skip


def _say_finished(folder: RunFolder, *, again: bool = False) -> None:
    summary = folder.read_summary()
    said = f"{folder.path}: this run is finished" if again else "finished"
    hint = "; --fresh starts over" if again else ""
    sys.stdout.write(printable(
        f"{said}: {in_words(summary.get('steps', 0), 'step')}, {in_words(summary.get('target_tokens', 0), 'target token')}, "
        f"{summary.get('seconds', 0.0):.0f} s; the student is in {folder.student}{hint}\n"
    ))  # fmt: skip
