"""`potstill judge`: answers are written, then judged, then counted; each step keeps what it has, so that the same command goes on.

Without a judge it ends after the answers, and says how they are judged later.
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from potstill import storage
from potstill.counting_progress import CountingProgress
from potstill.errors import InterruptedRun, UsageError
from potstill.evaluation.judging.answers import Answers, read_answers, write_answer_file
from potstill.evaluation.judging.asking import Judge
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.matches import graded_answers, pair_matches
from potstill.evaluation.judging.prompts import JudgedPrompt, read_prompts
from potstill.evaluation.judging.questions import JudgeQuestion, grade_questions, pair_questions
from potstill.evaluation.judging.recorded import read_annotations
from potstill.evaluation.judging.settings import ContestantConfig, Format, JudgeConfig, JudgingConfig
from potstill.evaluation.judging.summary import Judged, grades_record, pairs_record
from potstill.evaluation.record import EvaluationRecord
from potstill.evaluation.task_config import name_of
from potstill.interruption import SignalWatch
from potstill.lock import Lock
from potstill.recipes.words import in_words, printable

ANSWERS, JUDGMENTS, RECORD = "answers", "judgments.jsonl", "record.json"
_WRITTEN = ".written.jsonl"
# Parts of names that say what a model was made for, not whose it is.
_OF_NO_FAMILY = frozenset({"instruct", "chat", "base", "model", "judge", "student", "teacher", "turbo", "mini", "small"})


class _BrokenOff(Exception):
    """A signal came while something was asked."""


def judge(config: JudgingConfig, *, also: Path | None = None, again: str = "", quiet: bool = False) -> dict[str, Any] | None:
    """Writes and judges; returns the record's JSON, or None where there is no judge. `also` is a second place for the record.

    `again` is the command without a judge, for the words on how to judge later. Raises PotstillError for what the user can mend.
    """
    format, prompts = read_prompts(config.prompts, config.format, config.limit)
    folder = Path(config.folder).expanduser().absolute()
    storage.make_folder(folder / ANSWERS)
    lock = Lock(folder / ".lock", held="another potstill judge is using this folder", remedy="stop it, or choose another --folder")
    try:
        storage.sweep(folder)
        storage.sweep(folder / ANSWERS)
        contestants = [_answers(config, one, prompts, folder / ANSWERS, quiet=quiet) for one in (config.first, config.second) if one]
        if len({one.name for one in contestants}) < len(contestants):
            raise UsageError(f"{contestants[0].name}: both contestants are called so; give one a name of its own, as in other=PATH")
        files = [write_answer_file(folder / ANSWERS, one, prompts, format) for one in contestants]
        if config.annotations is not None:
            record = _annotated(config, config.annotations, prompts, contestants, format).to_json()
        elif config.judge is None:
            sys.stdout.write(printable(_how_to_judge(files, folder, format, again)))
            return None
        else:
            record = _judged(config, config.judge, prompts, contestants, format, folder, quiet=quiet).to_json()
        for place in (folder / RECORD, also):
            if place is not None:
                storage.make_folder(place.absolute().parent)
                storage.write_json(place, record)
        return record
    finally:
        lock.release()


# ---------------------------------------------------------------- answers


def _answers(config: JudgingConfig, one: ContestantConfig, prompts: Sequence[JudgedPrompt], folder: Path, *, quiet: bool) -> Answers:
    if one.answers is not None:
        return read_answers(one.answers, prompts, one.name)
    assert one.model is not None
    from potstill.evaluation.judging.writing import Author
    from potstill.recipes.teachers import own_device

    device = config.writing.device or own_device()
    precision = config.writing.precision or ("float32" if device == "cpu" else "bf16")
    name = one.name or name_of(one.model.path)
    kept = KeptLines(folder / f"{name}{_WRITTEN}")
    author = Author(name, one.model, config.writing, kept, device=device, precision=precision)
    left = author.missing(prompts)
    if not left:
        return author.write(prompts)
    written: list[Answers] = []
    with CountingProgress(left, doing=f"Writing as {name}", done="wrote", unit="answers", quiet=quiet) as progress:
        received = _heeding(author, lambda: written.append(author.write(prompts, progress.advance)))
    if not written:
        raise InterruptedRun(
            f"{config.folder}: interrupted; what {name} has written is kept, {author.missing(prompts):,} answers are left, the same "
            "command writes them", received,
        )  # fmt: skip
    return written[0]


def _heeding(worker: Any, work: Callable[[], object]) -> int:
    """Does `work`, which ends early where a signal comes; returns the signal's number, or 0."""

    def look(watch: SignalWatch) -> None:
        if watch.received:
            raise _BrokenOff

    with SignalWatch("keeping what is there") as watch, suppress(_BrokenOff):
        worker.heed(partial(look, watch))
        work()
    return watch.received


# ---------------------------------------------------------------- judgments


def _judged(
    config: JudgingConfig, judge: JudgeConfig, prompts: Sequence[JudgedPrompt], contestants: Sequence[Answers], format: Format,
    folder: Path, *, quiet: bool,
) -> EvaluationRecord:  # fmt: skip
    kept = KeptLines(folder / JUDGMENTS)
    pairs = config.style == "pairs"
    questions = pair_questions(prompts, contestants[0], contestants[1]) if pairs else grade_questions(prompts, contestants)
    with closing(Judge(judge, config.style, kept)) as asked:
        left = len(asked.unsettled(questions))
        if left:
            with CountingProgress(left, doing=f"Asking {judge.model}", done="heard", unit="verdicts", quiet=quiet) as progress:
                received = _heeding(asked, lambda: asked.ask(questions, lambda: progress.advance(1, 0)))
            if left := len(asked.unsettled(questions)):
                raise InterruptedRun(
                    f"{config.folder}: interrupted; every answer of the judge is kept, {left:,} questions are left, the same command asks "
                    "them", received,
                )  # fmt: skip
        judged = Judged(
            name_of(config.prompts), f"judge: {judge.model}", prompts, contestants,
            _facts(config, judge, contestants, format, prompts, questions), _warnings(judge, contestants, kept, questions), config.samples,
        )  # fmt: skip
        if pairs:
            return pairs_record(judged, pair_matches(prompts, contestants[0], contestants[1], questions, asked.heard))
        return grades_record(judged, graded_answers(prompts, contestants, questions, asked.heard))


def _annotated(
    config: JudgingConfig, path: str, prompts: Sequence[JudgedPrompt], contestants: Sequence[Answers], format: Format
) -> EvaluationRecord:
    """The record of preferences that were judged elsewhere."""
    if format != "alpaca_eval":
        raise UsageError("annotations: AlpacaEval's preferences are about prompts of one turn, and these are MT-Bench's questions")
    matches, annotator = read_annotations(path, prompts, contestants[0], contestants[1])
    facts = {"prompts": config.prompts, "format": format, "number of prompts": len(prompts), "annotations": path, "judge": annotator,
             "rule": "each pair was judged once; a win where it is preferred by more than one half"}  # fmt: skip
    warnings = [warning for one in contestants for warning in one.warnings]
    judged = Judged(name_of(config.prompts), f"judge: {annotator}", prompts, contestants, facts, warnings, config.samples)
    return pairs_record(judged, matches, both_orders=False)


def _facts(
    config: JudgingConfig, judge: JudgeConfig, contestants: Sequence[Answers], format: Format, prompts: Sequence[JudgedPrompt],
    questions: Sequence[JudgeQuestion],
) -> dict[str, Any]:  # fmt: skip
    facts: dict[str, Any] = {
        "prompts": config.prompts, "format": format, "number of prompts": len(prompts), "style": config.style, "judge": judge.model,
        "judge url": judge.url, "judge temperature": judge.temperature, "questions to the judge": len(questions),
    }  # fmt: skip
    if config.style == "pairs":
        facts["rule"] = "each pair is asked in both orders; a win where both prefer the same answer, else a tie (half a win)"
    return facts | {one.name: json.loads(storage.to_json(dict(one.facts))) for one in contestants}


def _warnings(judge: JudgeConfig, contestants: Sequence[Answers], kept: KeptLines, questions: Sequence[JudgeQuestion]) -> list[str]:
    found = [warning for one in contestants for warning in one.warnings]
    for one in contestants:
        alike = _family(judge.model) & _family(f"{one.name} {one.facts.get('generator') or one.facts.get('model') or ''}")
        if alike:
            found.append(f"the judge may be kin to {one.name} ({', '.join(sorted(alike))}): judges prefer answers of their own kind")
    lines = [line for question in questions for line in kept.get(question.key(judge))]
    served = sorted({line["served_as"] for line in lines if line.get("served_as")})
    if len(served) > 1:
        found.append(f"{judge.model} was served as {', '.join(served)}: the judge may have changed while it was asked")
    refused = [line["refused"] for line in lines if "refused" in line]
    if refused:
        found.append(f"the judge's server refused {in_words(len(refused), 'question')}; the first refusal: {refused[0]}")
    return found


def _family(name: str) -> set[str]:
    letters = "".join(letter if letter.isalpha() else " " for letter in name.lower())
    return {word for word in letters.split() if len(word) > 2} - _OF_NO_FAMILY


# ---------------------------------------------------------------- later


def _how_to_judge(files: Sequence[Path], folder: Path, format: Format, again: str) -> str:
    lines = [f"answers are written to {' and '.join(map(str, files))}", "to judge them, name a judge:",
             f"  {again} --judge https://HOST --judge-model NAME --api-key-env VARIABLE"]  # fmt: skip
    first, *others = map(str, files)
    if format == "alpaca_eval":
        against = f" --reference_outputs {shlex.quote(others[0])}" if others else ""
        lines += ["or with AlpacaEval's own tool:",
                  f"  alpaca_eval --model_outputs {shlex.quote(first)}{against} --output_path {shlex.quote(str(folder / 'alpaca_eval'))}",
                  f"and its annotations.json read back:\n  {again} --annotations FILE"]  # fmt: skip
    else:
        lines += ["or with MT-Bench's own tool, the files lying in its data/mt_bench/model_answer:",
                  f"  python gen_judgment.py --mode pairwise-all --model-list {' '.join(file.stem for file in files)}"]  # fmt: skip
    return "\n".join(lines) + "\n"
