"""From answers to a data set: their text, the filters, the rows with the answers in place, and the count of what was left out.

The files are a function of the answers, the rows and the recipe alone, so that they are made again byte for byte. It asks nobody.
"""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill import storage
from potstill.data.answer_columns import Question, answered
from potstill.data.config import DataConfig
from potstill.data.lines import RowFault
from potstill.data.questions import as_trained
from potstill.data.rendering import Rendered, Renderer
from potstill.recipes.generate_rules import counts_path
from potstill.rollouts.answers_folder import Given, Job
from potstill.rollouts.checkers import Checker
from potstill.rollouts.filters import Counts, Written, judge
from potstill.rollouts.generate_config import GenerateConfig

_ROWS_AT_ONCE = 256
# Tokens of the prompt that are decoded with an answer: what its first token says may depend on the one before it.
_LEAD = 8


@dataclass(frozen=True)
class Making:
    """What a data set is made of besides the answers."""

    questions: Sequence[Question]
    renderer: Renderer
    tokenizer: PreTrainedTokenizerBase
    config: GenerateConfig
    data: DataConfig
    checker: Checker | None


@dataclass
class _Outcome:
    """Lines of the files, and the counts."""

    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    cut: int = 0
    unanswered: int = 0
    read_otherwise: int = 0


@dataclass(frozen=True)
class _Draft:
    """An answer as a row, and what training would read of it: None where it would refuse the row."""

    written: Written
    row: dict[str, Any]
    faithful: bool


def make_data_set(making: Making, answers: Mapping[Job, Given], of_rows: Mapping[str, int]) -> dict[str, Any]:
    """Writes the data set, beside it the counts, and where wanted what was left out; the data set last. Returns the counts."""
    outcome, config = _Outcome(), making.config
    for start in range(0, len(making.questions), _ROWS_AT_ONCE):
        chunk = range(start, min(start + _ROWS_AT_ONCE, len(making.questions)))
        drafts = _drafts(making, [(row, sample, answers[Job(row, sample)]) for row in chunk for sample in range(config.samples)])
        for place, row in enumerate(chunk):
            _sort_out(making, making.questions[row], drafts[place * config.samples : (place + 1) * config.samples], outcome)
    counts = {
        **of_rows, "samples": config.samples, **outcome.counts.as_dict(), "prompts_without_an_answer": outcome.unanswered,
        "cut": outcome.cut, "kept_but_read_otherwise": outcome.read_otherwise,
    }  # fmt: skip
    if config.dropped is not None:
        _write(Path(config.dropped).expanduser(), outcome.dropped)
    storage.make_folder(counts_path(config.path).parent)
    storage.write_json(counts_path(config.path), counts)
    _write(Path(config.path).expanduser(), outcome.kept)
    return counts


def _write(path: Path, lines: Sequence[str]) -> None:
    storage.make_folder(path.parent)
    data = "".join(line + "\n" for line in lines).encode()
    # No time stamp: the same rows are the same bytes.
    storage.write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _sort_out(making: Making, question: Question, drafts: Sequence[_Draft], outcome: _Outcome) -> None:
    """The answers to one prompt, each to its file."""
    written = [draft.written for draft in drafts]
    reasons = judge(written, question.reference, question.row.values, making.config.filters, making.checker)
    for draft, reason in zip(drafts, reasons, strict=True):
        outcome.counts.add(reason, len(draft.written.tokens))
        outcome.cut += not draft.written.ended
        if reason is None:
            outcome.kept.append(storage.to_json(draft.row))
            outcome.read_otherwise += not draft.faithful
        elif making.config.dropped is not None:
            outcome.dropped.append(storage.to_json({**draft.row, "dropped": reason}))
    outcome.unanswered += all(reason is not None for reason in reasons)


# ---------------------------------------------------------------- texts


def _drafts(making: Making, given: Sequence[tuple[int, int, Given]]) -> list[_Draft]:
    """The answers as rows, in their order."""
    exact = [_text(making, making.questions[row], answer) for row, _, answer in given]
    drafts = _tried(making, given, exact)
    # A template that writes a blank before the answer gets the answer without its own.
    again = [place for place, draft in enumerate(drafts) if not draft.faithful and exact[place].startswith(" ")
             and making.questions[given[place][0]].reading.format in ("instruct", "chat")]  # fmt: skip
    for place, draft in zip(again, _tried(making, [given[p] for p in again], [exact[p][1:] for p in again]), strict=True):
        if draft.faithful:
            drafts[place] = draft
    return drafts


def _tried(making: Making, given: Sequence[tuple[int, int, Given]], texts: Sequence[str]) -> list[_Draft]:
    rows = []
    for (row, sample, answer), text in zip(given, texts, strict=True):
        question = making.questions[row]
        whole = _text_of_prompt(making, question) + text if question.reading.format == "text" else text
        rows.append(answered(question, whole, ended=answer.ended, sample=sample))
    readings = [making.questions[row].reading for row, _, _ in given]
    found = as_trained(list(zip(rows, readings, strict=True)), making.renderer)
    return [
        _draft(making, making.questions[row], answer, text, values, read)
        for (row, _, answer), text, values, read in zip(given, texts, rows, found, strict=True)
    ]


def _draft(making: Making, question: Question, answer: Given, text: str, row: dict[str, Any], read: Rendered | RowFault) -> _Draft:
    tokens = list(answer.tokens[:-1] if answer.ended else answer.tokens)
    readable, faithful = not isinstance(read, RowFault), False
    if not isinstance(read, RowFault):
        too_long = len(read.tokens) > making.data.max_tokens and making.data.too_long in ("error", "drop")
        readable = not too_long
        start = len(question.tokens) if question.reading.format == "text" else read.spans[-1][0] if read.spans else 0
        faithful = read.tokens[start : start + len(tokens)] == tokens and len(read.tokens) - start <= len(tokens) + 2
    return _Draft(Written(tokens, text, answer.ended, readable), row, faithful)


def _text(making: Making, question: Question, answer: Given) -> str:
    """What the answer says after its prompt, without the token that ended it."""
    tokens = list(answer.tokens[:-1] if answer.ended else answer.tokens)
    lead = question.tokens[-_LEAD:]
    before, whole = _decoded(making, lead), _decoded(making, lead + tokens)
    return whole[len(before) :] if whole.startswith(before) else _decoded(making, tokens)


def _text_of_prompt(making: Making, question: Question) -> str:
    return _decoded(making, question.tokens)


def _decoded(making: Making, tokens: list[int]) -> str:
    return str(making.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# ---------------------------------------------------------------- what the user is told


def said_of(counts: Mapping[str, Any], config: GenerateConfig) -> str:
    """The closing lines: how many answers were kept, why the others were not, and how to train from the file."""
    dropped = {reason: number for reason, number in counts["dropped"].items() if number}
    lines = [f"{config.path}: {counts['kept']:,} of {counts['answers']:,} answers to {counts['prompts']:,} prompts kept, "
             f"{counts['kept_tokens']:,} tokens"]  # fmt: skip
    if dropped:
        kept_where = f"; they are in {config.dropped}" if config.dropped else ""
        lines.append("left out: " + ", ".join(f"{number:,} {reason}" for reason, number in dropped.items()) + kept_where)
    if counts["prompts_too_long"] or counts["rejected"]:
        lines.append(f"not asked: {counts['prompts_too_long']:,} prompts too long, {counts['rejected']:,} bad rows")
    if counts["prompts_without_an_answer"]:
        lines.append(f"{counts['prompts_without_an_answer']:,} prompts have no answer left")
    if counts["kept_but_read_otherwise"]:
        lines.append(f"{counts['kept_but_read_otherwise']:,} kept answers are read as other tokens than were drawn")
    lines.append(f"train from it with data.train={config.path}; the counts are in {counts_path(config.path)}")
    return "".join(line + "\n" for line in lines)
