"""The column that an answer stands in: a row's own answer, and the same row with another one in its place. No tokenizer, no template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from potstill.data.formats import Conversation, PromptCompletion, Reading, read_item
from potstill.data.lines import Row, parse_json
from potstill.errors import DataError

SAMPLE = "sample"
FINISH_REASON = "finish_reason"
# In a chat it is the content of the last message.
ANSWER_COLUMNS = {"instruct": "output", "prompt_completion": "completion", "chat": "messages", "text": "text"}


@dataclass(frozen=True)
class Question:
    """A row, the tokens of its prompt, and its own answer: empty where it has none."""

    row: Row
    reading: Reading
    tokens: list[int]
    reference: str


def open_rows(rows: list[Row], reading: Reading) -> list[Row]:
    """The same rows; one that has no column for its answer gets an empty one, for it need not have any."""
    column = reading.theirs(ANSWER_COLUMNS[reading.format])
    if reading.format not in ("instruct", "prompt_completion") or column is None:
        return rows
    return [row if column in row.values else Row({**row.values, column: ""}, row.source, row.number) for row in rows]


def refuse_unwritable(rows: Sequence[Row]) -> None:
    """Raises DataError for a column that a line of JSON cannot hold, such as a date or bytes of a Parquet file."""
    for row in rows:
        for column, value in row.values.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise DataError(
                    f"{row.origin}: column {column!r} holds a value ({type(value).__name__}) that a line of JSON cannot, and every column "
                    "is kept in what is written; take the column out, or make it text"
                ) from None


def own_answer(row: Row, reading: Reading) -> str:
    """The text that the row itself has as its answer; of the format text all of it, and empty where there is none."""
    item = read_item(row, reading)
    if isinstance(item, Conversation):
        last = item.messages[-1]
        return str(last.get("content") or "") if last["role"] == "assistant" else ""
    return item.completion if isinstance(item, PromptCompletion) else item.text


def answered(question: Question, text: str, *, ended: bool, sample: int) -> dict[str, Any]:
    """The row's columns with `text` as its answer, the number of the sample, and whether the answer ended by itself ("stop", "length").

    Of the format text `text` is prompt and answer together. Everything else stays as it was.
    """
    reading, values = question.reading, dict(question.row.values)
    column = reading.theirs(ANSWER_COLUMNS[reading.format]) or ANSWER_COLUMNS[reading.format]
    values[column] = _messages(values[column], text) if reading.format == "chat" else text
    if reading.format != "text":
        values[reading.theirs(FINISH_REASON) or FINISH_REASON] = "stop" if ended else "length"
    return values | {SAMPLE: sample}


def _messages(given: Any, text: str) -> Any:
    """The messages with another last answer, as text where they were text."""
    messages = parse_json(given) if isinstance(given, str) else list(given)
    kept = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    new = [*kept, {"role": "assistant", "content": text}]
    return json.dumps(new, ensure_ascii=False) if isinstance(given, str) else new
