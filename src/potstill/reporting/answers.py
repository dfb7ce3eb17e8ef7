"""What the models wrote, side by side: right or wrong, and word by word where an answer differs from the first student's."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_CHARACTERS = 4000      # of one text
ALL_CHARACTERS = 600_000    # of all texts of a page together
MOST_WORDS = 500            # that are compared word by word
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Answer:
    """`parts`: pieces of the text, each with whether the answer it is compared with lacks it. `cut`: characters that are not shown."""

    model: str
    parts: tuple[tuple[str, bool], ...]
    right: bool | None
    is_teacher: bool
    is_reference: bool
    cut: int = 0


@dataclass(frozen=True)
class Entry:
    """One item with every model's answer. `differ`: not all answers are the same; `divided`: some are right and some are wrong."""

    item: str
    prompt: str
    reference: str
    answers: tuple[Answer, ...]
    differ: bool
    divided: bool
    prompt_cut: int = 0


@dataclass(frozen=True)
class Answers:
    """One task's items; `compared_with` is the model whose answers the marks refer to."""

    title: str
    compared_with: str | None
    entries: tuple[Entry, ...]
    left_out: int = 0


def side_by_side(records: Sequence[Mapping[str, Any]], *, all_characters: int = ALL_CHARACTERS) -> list[Answers]:
    """Every task with samples. Of long lists the first ones are kept, evenly over the tasks, so that a page stays small."""
    tasks = [
        (record, task, samples) for record in records for task in dict.fromkeys(sample["task"] for sample in record["samples"])
        if (samples := [sample for sample in record["samples"] if sample["task"] == task and sample["answers"]])
    ]  # fmt: skip
    several = len({id(record) for record, _, _ in tasks}) > 1
    found = []
    for record, task, samples in tasks:
        teachers = {model["name"] for model in record["models"] if model["is_teacher"]}
        first = _first_student(record, samples, teachers)
        left, entries = all_characters // len(tasks), []
        for sample in samples:
            entry = _entry(sample, teachers, first)
            left -= _size(entry)
            if left < 0 and entries:
                break
            entries.append(entry)
        title = f"{task} · {record['title']}" if several else task
        found.append(Answers(title, first, tuple(entries), len(samples) - len(entries)))
    return found


def _first_student(record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], teachers: set[str]) -> str | None:
    answering = dict.fromkeys(answer["model"] for sample in samples for answer in sample["answers"] if answer["model"] not in teachers)
    return record["baseline"] if record["baseline"] in answering else next(iter(answering), None)


def _entry(sample: Mapping[str, Any], teachers: set[str], first: str | None) -> Entry:
    texts = {answer["model"]: answer["text"][:MOST_CHARACTERS] for answer in sample["answers"]}
    answers = tuple(
        Answer(
            answer["model"], _parts(texts.get(first or ""), texts[answer["model"]]), answer["right"], answer["model"] in teachers,
            answer["model"] == first, max(len(answer["text"]) - MOST_CHARACTERS, 0),
        )
        for answer in sample["answers"]
    )  # fmt: skip
    judged = {answer.right for answer in answers}
    return Entry(
        sample["item"], sample["prompt"][:MOST_CHARACTERS], sample["reference"][:MOST_CHARACTERS], answers,
        len({text.strip() for text in texts.values()}) > 1, {True, False} <= judged, max(len(sample["prompt"]) - MOST_CHARACTERS, 0),
    )  # fmt: skip


def _parts(before: str | None, text: str) -> tuple[tuple[str, bool], ...]:
    """`text` in pieces, each with whether `before` lacks it there; very long texts are compared as a whole."""
    if before is None or before == text:
        return ((text, False),)
    old, new = _WORDS.findall(before), _WORDS.findall(text)
    if len(old) > MOST_WORDS or len(new) > MOST_WORDS:
        return ((text, True),)
    parts: list[tuple[str, bool]] = []
    for tag, _, _, start, stop in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if piece := "".join(new[start:stop]):
            parts.append((piece, tag != "equal"))
    return tuple(parts)


def _size(entry: Entry) -> int:
    """Characters of an entry with the markup around them."""
    return 600 + len(entry.prompt) + len(entry.reference) + sum(300 + sum(len(text) + 15 for text, _ in one.parts) for one in entry.answers)
