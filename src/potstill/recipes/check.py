"""A look before the run: the pipeline in words, one example with its targets marked, tokenizers, rows, memory and steps.

No weights are loaded. What must fail is collected and said together, each with its remedy.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from potstill.data.examples import ExampleSet
from potstill.data.prepare import PreparedData
from potstill.data.preview import preview
from potstill.errors import UsageError
from potstill.models.footprint import Footprint, Workload, predict_student, predict_teacher
from potstill.objectives.catalogue import scales_by_temperature_squared
from potstill.recipes.check_teachers import answer_words, cache_rows, capture_rows, model_words, server_rows, short, teacher_rows
from potstill.recipes.check_writers import author_words, beside_words, longest_written, student_text_words, writing_rows
from potstill.recipes.fitting import members
from potstill.recipes.preparation import Preparation, Reader, prepare_data, read_models, refuse_too_short
from potstill.recipes.recorded import Readers, open_caches, refuse_foreign_caches, settle
from potstill.recipes.schema import ObjectiveConfig, Recipe
from potstill.recipes.words import gib, in_words, printable
from potstill.recipes.writing import prepare_writing
from potstill.teachers.cached import CachedTeacher
from potstill.teachers.config import LocalTeacherConfig, ServerTeacherConfig
from potstill.training.feeding import Rows

# An example is shown to be read; a long one is cut in the middle of a piece, and says so.
_SHOWN_CHARACTERS = 1500


@dataclass
class Findings:
    """What is odd (`notes`) and what must be changed before the run can work (`problems`)."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """What a run takes. Bytes are of one device."""

    rows: int
    steps: int
    steps_per_epoch: int
    row_tokens: int
    student: Footprint | None
    teachers: Mapping[str, Footprint]
    loss_bytes: int

    @property
    def total_bytes(self) -> int:
        teachers = sum(footprint.total for footprint in self.teachers.values())
        return (self.student.total if self.student else 0) + teachers + self.loss_bytes


def check(recipe: Recipe, console: Console | None = None) -> int:
    """Prints the look, and what must be changed on stderr. Returns the exit code: 0, or 2 where the run would fail."""
    console = console or Console()
    findings = Findings()
    readers = open_caches(recipe)
    recipe, taken = settle(recipe, readers)
    findings.notes += taken
    preparation = examine(recipe, readers, findings)
    cost = predict(recipe, preparation, findings)
    _show_pipeline(console, recipe, preparation, cost)
    _show_example(console, preparation)
    _show_rows(console, preparation.data)
    if written := writing_rows(recipe, preparation):
        _section(console, "Text that is written", written)
    _show_readers(console, preparation)
    if readers:
        _section(console, "Recorded answers", [row for key in readers for row in cache_rows(recipe, key, readers[key], preparation)])
    for key, member in members(recipe.teacher) if recipe.asks_teacher else ():
        if isinstance(member, ServerTeacherConfig):
            _section(console, f"Server ({short(key)})", server_rows(member, preparation, findings.problems))
    if recipe.capture is not None and recipe.objective.asks_teacher and not readers:
        _section(console, "Capture", capture_rows(recipe, preparation))
    _show_cost(console, recipe, preparation, cost)
    for note in findings.notes:
        console.print(Text(f"note: {printable(note)}", style="yellow"))
    for problem in findings.problems:
        sys.stderr.write(f"potstill: must be changed: {printable(problem)}\n")
    if not findings.problems:
        console.print("Nothing stands in the way of this run.")
    return 2 if findings.problems else 0


def examine(recipe: Recipe, readers: Readers, findings: Findings) -> Preparation:
    """Tokenizers and data, with everything that a run would refuse collected instead of raised, as far as that goes."""
    student, teachers, comparison = read_models(recipe)
    findings.problems += comparison.refusals[:1]
    _collect(findings, lambda: refuse_too_short(recipe, {"student": student, **teachers}))
    data, ids = prepare_data(recipe, student, quiet=not sys.stderr.isatty(), strict=False)
    findings.problems += data.problems
    if data.shared_rows:
        shared = in_words(data.shared_rows, "validation row")
        findings.notes.append(f"{shared} also in the training set: the validation loss flatters")
    found = [Preparation(student, teachers, comparison, data, ids)]
    _collect(findings, lambda: found.append(prepare_writing(recipe, found[0])))
    preparation = found[-1]
    cached: dict[str, CachedTeacher] = {}
    _collect(findings, lambda: cached.update(refuse_foreign_caches(recipe, readers, preparation)))
    return replace(preparation, cached=cached)


def _collect(findings: Findings, action) -> None:
    try:
        action()
    except UsageError as error:
        findings.problems.append(str(error))


def predict(recipe: Recipe, preparation: Preparation, findings: Findings) -> Cost:
    """Steps, tokens and memory. A part that cannot be built (a LoRA target that is not there) becomes a problem."""
    training, data = recipe.training, preparation.data
    packed = recipe.data.max_tokens if recipe.data.packing else None
    rows = Rows(data.train, pad_token=preparation.pad_token, seed=recipe.run.seed, max_tokens=packed)
    steps_per_epoch = -(-len(rows) // training.global_batch) if len(rows) else 0
    steps = training.num_steps(steps_per_epoch) if steps_per_epoch else 0
    if steps and training.warmup_steps >= steps:
        findings.notes.append(
            f"training.warmup_steps: {training.warmup_steps} is not less than the {in_words(steps, 'step')} of the run, "
            "so the learning rate never arrives"
        )
    if steps_per_epoch and steps > 0 and training.steps and steps > 20 * steps_per_epoch:
        findings.notes.append(f"training.steps: {steps} go over the data {steps / steps_per_epoch:.0f} times")
    row_tokens = max([*rows.lengths, longest_written(recipe, preparation)])
    work = Workload(training.batch_size, max(row_tokens, 2), training.precision)
    footprints: dict[str, Footprint] = {}

    def student() -> None:
        footprints["student"] = predict_student(recipe.student, work)

    def teacher(key: str, config: LocalTeacherConfig) -> None:
        footprints[key] = predict_teacher(config, work)

    _collect(findings, student)
    for key, member in members(recipe.teacher):
        if isinstance(member, LocalTeacherConfig) and key in preparation.teachers:
            _collect(findings, partial(teacher, key, member))
    loss = _loss_bytes(recipe, preparation)
    return Cost(len(rows), steps, steps_per_epoch, row_tokens, footprints.pop("student", None), footprints, loss)


def _loss_bytes(recipe: Recipe, preparation: Preparation) -> int:
    """What the fused loss holds beside the models: a slice of logits of each side, and the gradient of a head that learns."""
    width, size = preparation.student.width, 2 if recipe.training.precision == "bf16" else 4
    sides = 1 + len(preparation.teachers)
    learns = recipe.student.lora is None or recipe.student.lora.on_head
    hidden = preparation.student.config.get_text_config().hidden_size
    return sides * 64 * 2**20 + (width * hidden * size if learns else 0)


# ---------------------------------------------------------------- the look


def _section(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(printable(value)))
    console.print(Text(title, style="bold"))
    console.print(Padding(table, (0, 0, 1, 2)))


def _show_pipeline(console: Console, recipe: Recipe, preparation: Preparation, cost: Cost) -> None:
    student, teacher, objective, size = recipe.student, recipe.teacher, recipe.objective, preparation.comparison.vocabulary_size
    lora = "its adapter learns" if student.adapter else "all weights learn"
    if student.lora:
        lora = f"LoRA of rank {student.lora.rank} and alpha {student.lora.alpha:g}"
    learned = f"{cost.student.trainable:,} of them learn" if cost.student and student.lora else None
    rows = [
        ("student", model_words(student.path, cost.student, lora, learned, student.quantization)),
        ("who writes the text", author_words(recipe)),
    ]
    if teacher is None or not recipe.asks_teacher:
        why = "nothing: there is none" if teacher is None else "nothing: the divergence weighs 0"
        why += "" if teacher is None else ", and it only writes" if recipe.uses_teacher else ", so it is not loaded"
        rows += [("the teacher answers", why), ("loss", f"cross-entropy of the targets over {size:,} tokens, {objective.reduction}")]
    else:
        rows[1:1] = teacher_rows(recipe, cost.teachers)
        rows += [
            ("the teacher answers", answer_words(recipe)),
            ("positions", "the same in both: one tokenizer, one rendering, the student's"),
            ("outcomes", _outcomes(objective, size)),
            ("distance", _distance(objective)),
        ]
    own, beside = student_text_words(recipe, _distance), beside_words(recipe.rollouts)
    rows += [(name, said) for name, said in (("on its own text", own), ("plain text beside", beside)) if said is not None]
    rows.append(("written to", recipe.run.folder))
    _section(console, "Pipeline", rows)


def _outcomes(objective: ObjectiveConfig, size: int) -> str:
    parameters = objective.parameters
    return {
        "full": f"the full vocabulary, {size:,} tokens",
        "top_k_tail": f"the teacher's {parameters.get('top_k')} most likely tokens, and one for all others",
        "top_k_renormalised": f"the teacher's {parameters.get('top_k')} most likely tokens, renormalised",
        "samples": f"{parameters.get('num_samples')} tokens drawn from the teacher",
        "projected": "the teacher's probabilities on the student's frozen head: the full vocabulary, exactly",
        "student_top_k_tail": f"the student's {parameters.get('top_k')} most likely tokens, and one for all others",
        "written": "the token that was drawn",
    }.get(objective.support, objective.support)


def _distance(objective: ObjectiveConfig) -> str:
    kd_weight, sft_weight = objective.weights
    parameters = ", ".join(f"{name} {value}" for name, value in objective.parameters.items())
    squared = scales_by_temperature_squared(
        objective.scale_by_temperature_squared, objective.divergence, sft_weight, objective.temperature
    )
    said = f"{kd_weight:g} x {objective.divergence}" + (f" ({parameters})" if parameters else "")
    said += f" + {sft_weight:g} x cross-entropy; temperature {objective.temperature:g}"
    said += ", times its square" if squared and objective.temperature != 1 else ""
    said += f"; weighed by {objective.token_weight}" if objective.token_weight != "none" else ""
    return f"{said}; {objective.reduction}"


def _show_example(console: Console, preparation: Preparation) -> None:
    examples = preparation.data.train
    if not len(examples):
        return
    shown = preview(examples, preparation.student.tokenizer)
    text, left = Text(), _SHOWN_CHARACTERS
    for piece, is_target in shown.pieces:
        part = piece if len(piece) <= left else piece[:left] + " [...]"
        text.append(f"⟦{printable(part)}⟧" if is_target else printable(part), style="bold green" if is_target else "dim")
        left -= len(part)
        if left <= 0:
            break
    counted = f"{shown.num_targets} of {shown.num_tokens} tokens are targets, between ⟦ and ⟧"
    console.print(Text(f"One example ({printable(shown.origin)}): {counted}", style="bold"))
    console.print(Padding(text, (0, 0, 1, 2)), soft_wrap=False)


def _show_rows(console: Console, data: PreparedData) -> None:
    counts = data.counts
    rows = [("read", f"{counts.rows:,}"), ("used", f"{counts.used:,}")]
    parts = {"empty": counts.empty, "unfinished answers": counts.unfinished, "too long": counts.too_long, "dropped": counts.dropped,
             "truncated": counts.truncated, "without an end of turn": counts.unended, "malformed": counts.rejected}  # fmt: skip
    rows += [(name, f"{number:,}") for name, number in parts.items() if number or name in ("empty", "too long")]
    rows.append(("longest", in_words(counts.longest, "token")))
    held = data.validation
    rows += [("training", _set_words(data.train)), ("validation", "none" if held is None else _set_words(held))]
    _section(console, "Rows", rows)


def _set_words(examples: ExampleSet) -> str:
    return f"{in_words(len(examples), 'example')}, {in_words(examples.num_targets, 'target token')}"


def _show_readers(console: Console, preparation: Preparation) -> None:
    student, teachers, comparison = preparation.student, preparation.teachers, preparation.comparison
    rows = [("student", _reader_words(student)), *((short(key), _reader_words(teacher)) for key, teacher in teachers.items())]
    if teachers:
        same = f"{comparison.vocabulary_size:,} tokens mean the same to {'both' if len(teachers) == 1 else 'all'}"
        rows.append(("shared", same if comparison.same else "they do not read the same tokens"))
    _section(console, "Tokenizers and templates", rows + [("", difference) for difference in comparison.notes])


def _reader_words(reader: Reader) -> str:
    tokenizer = reader.tokenizer
    template = "none"
    if tokenizer.chat_template is not None:
        template = f"{'with' if 'generation %}' in str(tokenizer.chat_template) else 'without'} generation marks"
    return (f"{len(tokenizer):,} tokens, head {reader.width:,} wide, BOS {tokenizer.bos_token!r}, EOS {tokenizer.eos_token!r}, "
            f"pad {tokenizer.pad_token!r}, chat template {template}")  # fmt: skip


def _show_cost(console: Console, recipe: Recipe, preparation: Preparation, cost: Cost) -> None:
    training, counts = recipe.training, preparation.data.train
    epochs = cost.steps / cost.steps_per_epoch if cost.steps_per_epoch else 0.0
    kind = f"packed rows of up to {recipe.data.max_tokens} tokens" if recipe.data.packing else "rows of one example"
    rows = [
        ("rows", f"{cost.rows:,} {kind}"),
        ("steps", f"{cost.steps:,} of {training.global_batch} rows ({training.batch_size} x {training.accumulation}); {epochs:.3g} epochs"),
        ("tokens", f"about {round(counts.num_tokens * epochs):,}, of which {round(counts.num_targets * epochs):,} are targets"),
    ]
    if cost.student is not None:
        parts = cost.student
        rows.append(("student memory", f"{gib(parts.total)}: weights {gib(parts.weights)}, gradients {gib(parts.gradients)}, "
                     f"optimizer {gib(parts.optimizer)}, activations {gib(parts.activations)}"))  # fmt: skip
    for key, parts in cost.teachers.items():
        said = f"{gib(parts.total)}: weights {gib(parts.weights)}, activations {gib(parts.activations)}"
        rows.append((f"{short(key)} memory", said))
    rows += [("loss memory", gib(cost.loss_bytes)), ("together", f"about {gib(cost.total_bytes)} on each device")]
    _section(console, "Cost", rows)
