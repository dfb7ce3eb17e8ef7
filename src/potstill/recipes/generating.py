"""From a recipe to a data set that a model wrote: who answers, which prompts, every answer once, and then the file.

Every rank of a launch calls it and takes a share. What is kept of the answers is written_rows.py's affair, how they are kept until then
rollouts/answers_folder.py's.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from potstill.cache.provenance import NOTES, Provenance
from potstill.counting_progress import CountingProgress
from potstill.data.answer_columns import Question, refuse_unwritable
from potstill.data.asking import ask as ask_rows
from potstill.data.collation import padding_id
from potstill.data.config import DataConfig
from potstill.data.rendering import Renderer
from potstill.environment import environment
from potstill.errors import DataError, IncompatibleError, InterruptedRun, UsageError
from potstill.interruption import SignalWatch
from potstill.models.config import LoadingConfig
from potstill.models.identity import tokenizer_digest
from potstill.models.loading import choose_dtype, load_tokenizer
from potstill.models.tokenizers import vocabulary_size
from potstill.recipes.assemble import join_ranks
from potstill.recipes.generate_rules import CHECKER_KEY, writer_of
from potstill.recipes.preparation import ends_of, read_model, refuse_too_short
from potstill.recipes.provenance import measured, weights_of
from potstill.recipes.schema import Recipe
from potstill.recipes.teachers import own_device, prove
from potstill.recipes.words import in_words, printable
from potstill.recipes.written_rows import Making, make_data_set, said_of
from potstill.rollouts.answers_folder import AnswersFolder, Given, Job
from potstill.rollouts.checkers import CHECKERS, make_checker
from potstill.rollouts.config import VllmGeneratorConfig
from potstill.rollouts.generate_config import GenerateConfig
from potstill.rollouts.writing import Generator, Prompt, Sampling, seed_of
from potstill.teachers.config import LocalTeacherConfig, ServerTeacherConfig
from potstill.training.processes import Ranks


@dataclass(frozen=True)
class Writer:
    """Who answers, without its weights: `key` is where the recipe names it, `vocabulary_size` counts the ids that it may draw."""

    key: str
    config: LoadingConfig | ServerTeacherConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary_size: int
    stop_ids: tuple[int, ...]

    @property
    def pad_token(self) -> int:
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return padding_id(*(number if isinstance(number, int) else None for number in (pad, eos)))


@dataclass(frozen=True)
class Asked:
    """The prompts, the tokens that end their answers in training, and the rows that have none that can be asked."""

    questions: list[Question]
    renderer: Renderer
    ends: list[int]
    rows: int
    rejected: int
    too_long: int


def generate_recipe(recipe: Recipe, *, quiet: bool = False) -> dict[str, Any]:
    """Writes the data set that the recipe's generate section describes, asking only for answers that are not there; returns the counts.

    `precheck_generate` has let the recipe pass. Raises PotstillError for everything that the user can mend.
    """
    config = recipe.generate
    assert config is not None
    ranks = join_ranks()
    quiet = quiet or not ranks.first
    writer = read_writer(recipe)
    if isinstance(writer.config, LocalTeacherConfig) and writer.config.sharded and ranks.world_size > 1:
        raise UsageError("teacher.sharded: each rank writes answers of its own, so each holds the whole teacher; leave it out")
    asked = ask(recipe.data, config, writer, seed=recipe.run.seed)
    writer = replace(writer, stop_ids=tuple(dict.fromkeys([*writer.stop_ids, *asked.ends])))
    checker = None if config.filters.checker is None else make_checker(config.filters.checker, CHECKER_KEY)
    if config.filters.checker in CHECKERS:
        _require_references(asked.questions, config)
    folder = AnswersFolder(Path(config.path).expanduser())
    with ExitStack() as opened:
        lock = ranks.on_first(lambda: folder.open(_stated(recipe, writer, asked.questions)))
        if lock is not None:
            opened.callback(lock.release)
        write_answers(recipe, writer, asked.questions, folder, ranks, quiet=quiet)
        ranks.wait()
        making = Making(asked.questions, asked.renderer, writer.tokenizer, config, recipe.data, checker)
        counts = ranks.on_first(lambda: make_data_set(making, folder.read(), _of_rows(asked)))
    if counts is not None:
        sys.stdout.write(printable(said_of(counts, config)))
    return counts or {}


def _of_rows(asked: Asked) -> dict[str, int]:
    return {"rows": asked.rows, "rejected": asked.rejected, "prompts_too_long": asked.too_long, "prompts": len(asked.questions)}


def read_writer(recipe: Recipe) -> Writer:
    """The writer's tokenizer and what ends its answers. A served one without a tokenizer of its own reads as the student does."""
    key, config = writer_of(recipe)
    if isinstance(config, ServerTeacherConfig):
        model = LoadingConfig(path=config.tokenizer) if config.tokenizer is not None else recipe.student
        tokenizer = load_tokenizer(model)
        # Of a tokenizer alone no more is known; a model's own ends are known too.
        eos = tokenizer.eos_token_id
        alone = (eos,) if isinstance(eos, int) else ()
        stops = alone if config.tokenizer is not None else ends_of(model, read_model(model))
        size = vocabulary_size(tokenizer)
    else:
        reader = read_model(config)
        refuse_too_short(recipe, {key: reader})
        tokenizer, stops = reader.tokenizer, ends_of(config, reader)
        size = min(vocabulary_size(tokenizer), reader.width)
    if not stops:
        raise IncompatibleError(
            f"{key}: neither its tokenizer nor its configuration names a token that ends an answer; name it: {key}.eos_token"
        )
    return Writer(key, config, tokenizer, size, stops)


def ask(data: DataConfig, config: GenerateConfig, writer: Writer, *, seed: int) -> Asked:
    """The prompts of the training rows, as the writer reads them. Raises DataError where none is left, or one is too long."""
    wording = data.teacher_prompt if writer.key == "teacher" else None
    asked = ask_rows(
        data, writer.tokenizer, seed=seed, end_of_text=writer.stop_ids, prompt_tokens=config.prompt_tokens, wording=wording,
    )  # fmt: skip
    found = asked.questions
    refuse_unwritable([question.row for question in found])
    room = data.max_tokens - config.sampling.max_new_tokens
    fitting = [question for question in found if len(question.tokens) <= room]
    if len(fitting) < len(found) and data.too_long == "error":
        longest = max(found, key=lambda question: len(question.tokens))
        raise DataError(
            f"data.train: {len(found) - len(fitting)} of {len(found)} prompts leave no room for generate.sampling.max_new_tokens = "
            f"{config.sampling.max_new_tokens} within data.max_tokens = {data.max_tokens}; the longest has {len(longest.tokens)} tokens "
            f"({longest.row.origin}). Raise data.max_tokens, or set data.too_long: drop to leave them out"
        )
    if not fitting:
        raise DataError(f"data.train: 0 of {len(found)} prompts can be asked; look at data.format, data.columns and data.max_tokens")
    return Asked(fitting, asked.renderer, asked.ends(), asked.rows, asked.rejected, len(found) - len(fitting))


def _require_references(found: Sequence[Question], config: GenerateConfig) -> None:
    without = [question.row.origin for question in found if not question.reference.strip()]
    if without:
        raise DataError(
            f"{CHECKER_KEY}: {config.filters.checker} compares with the own answer of a row, and {len(without):,} of {len(found):,} rows "
            f"have none, the first is {without[0]}; leave these rows out, or name a function of yours"
        )


# ---------------------------------------------------------------- what the answers depend on


def _stated(recipe: Recipe, writer: Writer, found: Sequence[Question]) -> Provenance:
    """Everything that an answer depends on; filters and the number of samples are not part of it. Reads every weight once."""
    config = recipe.generate
    assert config is not None
    digest = xxhash.xxh3_128()
    for question in found:
        digest.update(np.array([len(question.tokens), *question.tokens], dtype="<i4").tobytes())
    notes = {"writer": writer.config.path if isinstance(writer.config, LoadingConfig) else writer.config.model,
             "data": [item.path for item in recipe.data.sources], "versions": environment()["versions"]}  # fmt: skip
    return Provenance({
        "author": config.author, **_identity(recipe, writer), "tokenizer": tokenizer_digest(writer.tokenizer),
        "stop ids": list(writer.stop_ids), "prompts": {"number": len(found), "digest": digest.hexdigest()},
        "sampling": config.sampling.model_dump(), "run.seed": recipe.run.seed, NOTES: notes,
    })  # fmt: skip


def _identity(recipe: Recipe, writer: Writer) -> dict[str, Any]:
    config = writer.config
    if isinstance(config, ServerTeacherConfig):
        from potstill.teachers.server import ServerTeacher

        with closing(ServerTeacher(config, vocabulary_size=writer.vocabulary_size, tokenizer=writer.tokenizer)) as served:
            return measured(served.identity, config.probe_tolerance)
    dtype = str(choose_dtype(config, recipe.training.precision, trainable=False)).removeprefix("torch.")
    stated = weights_of(config, seed=recipe.run.seed)
    return {name.replace("teacher", "writer"): value for name, value in stated.items()} | {"writer dtype": dtype}


# ---------------------------------------------------------------- answers


class _BrokenOff(Exception):
    """A signal came while an answer was written."""


def _break_off(watch: SignalWatch) -> None:
    if watch.received:
        raise _BrokenOff


def units_left(found: Sequence[Question], config: GenerateConfig, held: dict[Job, Given]) -> list[list[Job]]:
    """The answers that are missing, in batches: long prompts first, so that what does not fit in memory fails at once.

    Which answers are written side by side depends on the prompts and on batch_size alone, so that a resumed start repeats it.
    """
    order = sorted(range(len(found)), key=lambda row: -len(found[row].tokens))
    jobs = [Job(row, sample) for row in order for sample in range(config.samples)]
    units = [jobs[start : start + config.batch_size] for start in range(0, len(jobs), config.batch_size)]
    missing = [[job for job in unit if job not in held] for unit in units]
    return [unit for unit in missing if unit]


def write_answers(
    recipe: Recipe, writer: Writer, found: Sequence[Question], folder: AnswersFolder, ranks: Ranks, *, quiet: bool
) -> None:
    """Asks for this rank's share of what is missing, and commits it batch by batch. Raises InterruptedRun after SIGTERM or SIGINT."""
    config = recipe.generate
    assert config is not None
    held = folder.read()
    left = units_left(found, config, held)
    wanted = len(found) * config.samples
    _say_start(config, folder, wanted, sum(map(len, left)), ranks.world_size, quiet=quiet)
    # The first rank must not write before the others have seen what is missing.
    ranks.wait()
    mine = left[ranks.rank :: ranks.world_size]
    if not mine:
        return
    sampling = Sampling(**config.sampling.model_dump())
    done = 0
    with (
        closing(make_generator(recipe, writer)) as generator, SignalWatch("committing what was written") as watch,
        CountingProgress(sum(map(len, mine)), doing="Writing", done="wrote", unit="answers", quiet=quiet) as progress, suppress(_BrokenOff),
    ):  # fmt: skip
        generator.heed(partial(_break_off, watch))
        for unit in mine:
            if watch.received:
                break
            prompts = [Prompt(tuple(found[row].tokens), seed_of(recipe.run.seed, row, sample)) for row, sample in unit]
            completions = generator.generate(prompts, sampling)
            folder.commit(unit, completions, rank=ranks.rank, world_size=ranks.world_size)
            done += len(unit)
            progress.advance(len(unit), sum(len(completion.tokens) for completion in completions))
    if watch.received and done < sum(map(len, mine)):
        raise InterruptedRun(
            f"{config.path}: interrupted; {done:,} of {sum(map(len, mine)):,} answers were written and are committed, the same command "
            "writes the rest", watch.received,
        )  # fmt: skip


def make_generator(recipe: Recipe, writer: Writer) -> Generator:
    """Who writes the answers, loaded or behind its address."""
    if isinstance(writer.config, ServerTeacherConfig):
        from potstill.rollouts.vllm import VllmGenerator

        return VllmGenerator(
            _as_generator(writer.config), stop_ids=writer.stop_ids, vocabulary_size=writer.vocabulary_size, writer="teacher"
        )
    from potstill.models.causal_lm import CausalLM
    from potstill.models.loading import load_model
    from potstill.rollouts.local import LocalGenerator

    loaded = load_model(
        writer.config, precision=recipe.training.precision, trainable=False, device=own_device(), seed=recipe.run.seed
    )
    model = CausalLM(loaded, writer.vocabulary_size)
    prove(model, packed=False)
    return LocalGenerator(model, stop_ids=writer.stop_ids, pad_token=writer.pad_token)


def _as_generator(config: ServerTeacherConfig) -> VllmGeneratorConfig:
    """The same server as one that writes."""
    shared = ("url", "model", "api_key_env", "api_key_file", "concurrency", "request_seconds", "max_outage_seconds")
    return VllmGeneratorConfig(kind="vllm", weights="fixed", **{name: getattr(config, name) for name in shared})


def _say_start(config: GenerateConfig, folder: AnswersFolder, wanted: int, left: int, world_size: int, *, quiet: bool) -> None:
    if folder.damaged:
        sys.stderr.write(printable(
            f"{folder.path}: {in_words(folder.damaged, 'line')} did not read back as written; these answers are written again\n"
        ))  # fmt: skip
    if quiet or not left:
        return
    held = f"{wanted - left:,} answers are committed, " if left < wanted else ""
    each = " a rank" if world_size > 1 else ""
    sys.stderr.write(printable(f"{config.path}: {held}{left:,} are left; a kill costs at most {config.batch_size:,} of them{each}\n"))
