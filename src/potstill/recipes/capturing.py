"""From a recipe to a cache of its teacher's answers: the same data as training would see, who answers, how it is recorded, and where.

Every rank of a launch calls it and takes a share; what is asked, coded and committed is the affair of `potstill.capture`.
"""

import gc
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheWriter
from potstill.capture.capture import CaptureSummary, Work, capture, say_end, work_left
from potstill.capture.config import CaptureConfig
from potstill.capture.units import Share
from potstill.errors import ConfigError, UsageError
from potstill.head import Head, head_digest
from potstill.models.causal_lm import CausalLM
from potstill.models.loading import load_model
from potstill.recipes.assemble import join_ranks, prepare_run
from potstill.recipes.fitting import members
from potstill.recipes.preparation import Preparation
from potstill.recipes.provenance import provenance_of
from potstill.recipes.recorded import open_caches
from potstill.recipes.schema import Recipe
from potstill.recipes.teachers import make_teacher, own_device
from potstill.recipes.words import printable
from potstill.teachers.cached import HEAD_FIELD, HEAD_FILE, head_to_bytes
from potstill.teachers.config import LocalTeacherConfig, ServerTeacherConfig
from potstill.teachers.local import LocalTeacher
from potstill.teachers.teacher import Teacher
from potstill.training.processes import Ranks


def capture_recipe(
    recipe: Recipe, name: str, overrides: Sequence[str] = (), *, shard: tuple[int, int] = (0, 1), engine: str | None = None,
    quiet: bool = False,
) -> CaptureSummary:  # fmt: skip
    """Records the answers that the recipe's teacher gives to its training and validation rows; asks only for what is not there.

    `name` and `overrides` are the recipe as it was asked for, to say how to go on. `precheck_capture` has let the recipe pass. Raises
    PotstillError for everything that the user can mend.
    """
    ranks = join_ranks()
    if engine is not None and ranks.world_size > 1:
        raise UsageError(f"--engine {engine}: it spreads the work by itself; start it once, without torchrun")
    config = capturing(recipe, ranks.world_size)
    quiet = quiet or not ranks.first
    preparation = prepare_run(recipe, open_caches(recipe), quiet=quiet)
    student_head = _student_head(recipe, preparation) if config.outcomes == "projected" else None
    teacher = make_teacher(recipe, preparation)
    with ExitStack() as opened:
        opened.callback(teacher.close)
        form = record_format(config, preparation, _width(config, teacher, student_head), _dtype(config, teacher))
        stated, files = _stated(recipe, preparation, teacher, student_head)
        share = Share(*shard).split(ranks.rank, ranks.world_size)
        sets = [examples for examples in (preparation.data.train, preparation.data.validation) if examples is not None]
        writer = opened.enter_context(CacheWriter(
            config.path, stated, form, writer=share.writer, shard_bytes=config.shard_mib * 2**20, extra_files=files
        ))  # fmt: skip
        if engine == "ray":
            summary = _with_ray(recipe, preparation, work_left(sets, writer, share), stated, form, files, student_head, quiet)
        else:
            summary = capture(
                teacher, sets, writer, form, config, seed=recipe.run.seed, pad_token=preparation.pad_token, share=share,
                device=own_device(), project_on=student_head, quiet=quiet,
            )  # fmt: skip
    whole = _of_all(summary, ranks)
    if ranks.first:
        sys.stdout.write(f"{say_end(whole, config.path)}\n")
        if shard[1] == 1:
            other = config.outcomes != "hidden" and config.temperature != recipe.objective.temperature
            kept = [*overrides, *([f"objective.temperature={config.temperature}"] if other else [])]
            sys.stdout.write(printable(f"train from it: {_command_from(config.path, name, kept)}\n"))
    return whole


def _command_from(path: str, name: str, overrides: Sequence[str]) -> str:
    """The command that trains from the cache: what was set for the capture stays set, but who is asked and what is written."""
    kept = [override.partition("=") for override in overrides if re.split(r"[.=]", override, maxsplit=1)[0] not in ("capture", "teacher")]
    said = path if re.fullmatch(r"[\w/.~][\w/.:~+-]*", path) else json.dumps(path)
    words = [shlex.quote(name), *(f"{key}={shlex.quote(value)}" for key, _, value in kept)]
    return f"potstill distill {' '.join(words)} teacher={shlex.quote(f'{{kind: cache, path: {said}}}')}"


def _with_ray(
    recipe: Recipe, preparation: Preparation, work: Work, stated: Provenance, form: RecordFormat, files: Mapping[str, bytes],
    student_head: Head | None, quiet: bool,
) -> CaptureSummary:  # fmt: skip
    """What is left, done by actors that load the teacher each for itself: they get the recipe and the tokenizers, and no rows."""
    from potstill.capture.ray_engine import RayCapture, capture_with_ray

    config = capturing(recipe)
    job = RayCapture(
        partial(_make_again, recipe, replace(preparation, data=None)), stated, form, config, recipe.run.seed,  # type: ignore[arg-type]
        preparation.pad_token, max(work.sequences.lengths.tolist(), default=8), files, student_head,
    )  # fmt: skip
    return capture_with_ray(job, work, quiet=quiet)


def _make_again(recipe: Recipe, preparation: Preparation, device: str) -> Teacher:
    """The same teacher in another process; `device` is that process's own."""
    return make_teacher(recipe, preparation)


def capturing(recipe: Recipe, world_size: int = 1) -> CaptureConfig:
    """The capture section, with the K that a server gives where the recipe names none."""
    config = recipe.capture
    assert config is not None
    sharded = [key for key, member in members(recipe.teacher) if isinstance(member, LocalTeacherConfig) and member.sharded]
    if sharded and world_size > 1:
        raise UsageError(f"{sharded[0]}.sharded: each rank captures rows of its own, so each holds the whole teacher; leave it out")
    limits = [member.top_k for _, member in members(recipe.teacher) if isinstance(member, ServerTeacherConfig)]
    return config.model_copy(update={"k": min(limits)}) if limits and "k" not in config.model_fields_set else config


def record_format(config: CaptureConfig, preparation: Preparation, width: int, dtype: str) -> RecordFormat:
    """What all records will share. Numbers that the outcomes do not have stay at what they are without them."""
    size = preparation.comparison.vocabulary_size
    k = min(config.k, size) if "top_k" in config.outcomes else 0
    exact = config.outcomes == "top_k" and (config.precision == "exact" or (config.precision is None and k == size))
    drawn = {"num_samples": config.num_samples, "proposal_exponent": config.proposal_exponent} if "sampled" in config.outcomes else {}
    form = RecordFormat(config.outcomes, size, k=k, temperature=config.temperature, exact=exact, **drawn)
    return replace(form, width=width, dtype=dtype)  # type: ignore[arg-type]


def _width(config: CaptureConfig, teacher: Teacher, student_head: Head | None) -> int:
    if student_head is not None:
        return student_head.weight.shape[1]
    return _head(teacher).weight.shape[1] if config.outcomes == "hidden" else 0


def _dtype(config: CaptureConfig, teacher: Teacher) -> str:
    """Of recorded hidden rows: that of the teacher's own."""
    return str(_head(teacher).weight.dtype).removeprefix("torch.") if config.outcomes == "hidden" else "float32"


def _head(teacher: Teacher) -> Head:
    assert isinstance(teacher, LocalTeacher), "the schema lets hidden rows be captured of a model in this process alone"
    return teacher.causal_lm.head()


def _student_head(recipe: Recipe, preparation: Preparation) -> Head:
    """The head that the student will keep, loaded as training loads it; the rest of the student is let go again."""
    loaded = load_model(recipe.student, precision=recipe.training.precision, trainable=True, device=own_device(), seed=recipe.run.seed)
    head = CausalLM(loaded, preparation.comparison.vocabulary_size).head()
    if any(tensor.requires_grad for tensor in (head.weight, head.bias) if tensor is not None) or head.low_rank:
        raise ConfigError("capture.outcomes: projected: the student's head learns; leave it out of student.lora, or choose other outcomes")
    head = replace(head, weight=head.weight.detach().clone(), bias=None if head.bias is None else head.bias.detach().clone())
    del loaded
    gc.collect()
    return head


def _stated(
    recipe: Recipe, preparation: Preparation, teacher: Teacher, student_head: Head | None
) -> tuple[Provenance, Mapping[str, bytes]]:
    """What the cache says of itself, and the files beside the answers."""
    stated = provenance_of(recipe, preparation, teacher)
    if student_head is not None:
        digest = head_digest(student_head, preparation.comparison.vocabulary_size)
        stated = Provenance({**stated.fields, HEAD_FIELD: digest})
    files = {HEAD_FILE: head_to_bytes(_head(teacher))} if recipe.capture and recipe.capture.outcomes == "hidden" else {}
    return stated, files


def _of_all(summary: CaptureSummary, ranks: Ranks) -> CaptureSummary:
    """The sums over the ranks; they worked side by side, so the time is that of the slowest."""
    counts = ("sequences", "rows", "tokens", "payload_bytes", "redone_rows", "most_in_flight", "found_sequences")
    sums = ranks.sum([getattr(summary, name) for name in counts])
    seconds = ranks.largest([summary.seconds])[0]
    return CaptureSummary(**{name: int(number) for name, number in zip(counts, sums, strict=True)}, seconds=seconds)
