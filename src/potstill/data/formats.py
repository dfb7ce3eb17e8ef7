"""A row becomes a conversation, a prompt with its completion, or a text. Knows columns; knows no tokenizer and no template.

Columns of every row are checked before anything is rendered.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from potstill.data.config import ABSENT_COLUMNS, OPTIONAL_COLUMNS, REQUIRED_COLUMNS
from potstill.data.lines import Rejects, Row, RowFault, parse_json, printable
from potstill.errors import DataError

# The wording of Stanford Alpaca (Taori et al. 2023), with and without an input.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns for a chat template. `tools` passes through to the template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Two texts that follow each other as they are; no template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """One text, every token of which is a target."""

    text: str


Item = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True)
class Reading:
    """How the rows of one source are read: the format and the names of its columns in this source."""

    format: str
    columns: dict[str, str | None]
    instruct_prompt: str = "plain"

    def theirs(self, column: str) -> str | None:
        return self.columns.get(column, column)

    @property
    def required(self) -> list[str]:
        return [self.columns.get(column, column) or column for column in REQUIRED_COLUMNS[self.format] if self.theirs(column) is not None]


def check_columns(rows: list[Row], reading: Reading, path: str, rejects: Rejects) -> list[Row]:
    """The rows that have every required column. A column that no row has stops at once; one that some rows lack is a bad row."""
    present = {column for row in rows for column in row.values}
    for column in reading.required:
        if column not in present:
            raise DataError(printable(_missing(column, sorted(present), reading, path)))
    for ours, theirs in reading.columns.items():
        if theirs is not None and theirs not in present:
            raise DataError(printable(f"{path}: no column {theirs!r}, which data.columns gives for {ours!r}; "
                                      f"the columns are {', '.join(sorted(present))}"))
    good = []
    for row in rows:
        lacking = [column for column in reading.required if column not in row.values]
        if lacking:
            rejects.refuse(row.origin, f"column {lacking[0]!r} is missing; the row has {', '.join(row.values) or 'none'}", repr(row.values))
        else:
            good.append(row)
    return good


def _missing(theirs: str, present: list[str], reading: Reading, path: str) -> str:
    ours = next(column for column in REQUIRED_COLUMNS[reading.format] if (reading.theirs(column) or column) == theirs)
    free = [column for column in present if column not in reading.required]
    near = difflib.get_close_matches(theirs, free, n=1, cutoff=0.5)
    remedy = f"set data.columns: {{{ours}: {near[0] if near else 'YOUR_COLUMN'}}}"
    if ours in ABSENT_COLUMNS:
        remedy += f", or {{{ours}: null}} if there is none"
    other = [name for name, columns in REQUIRED_COLUMNS.items() if name != reading.format and set(columns) <= set(present)]
    if other:
        remedy += f", or data.format: {other[0]}"
    return f"{path}: no column {theirs!r}, which the format {reading.format} needs; the columns are {', '.join(present)}; {remedy}"


def read_item(row: Row, reading: Reading) -> Item:
    """The row's content. Raises RowFault where a value has the wrong type."""
    if reading.format == "text":
        return PlainText(_text(row, reading, "text"))
    if reading.format == "prompt_completion":
        return PromptCompletion(_text(row, reading, "prompt"), _text(row, reading, "completion", null=True))
    if reading.format == "instruct":
        return Conversation(_with_system(row, reading, _instruct_messages(row, reading)))
    return Conversation(_with_system(row, reading, _messages(row, reading)), _tools(row, reading))


def is_unfinished(row: Row, reading: Reading) -> bool:
    """Whether the writer of the answer was cut off by its length limit, as the row's `finish_reason` says."""
    if "finish_reason" not in OPTIONAL_COLUMNS[reading.format]:
        return False
    return row.values.get(reading.theirs("finish_reason") or "") == "length"


def _text(row: Row, reading: Reading, column: str, null: bool = False) -> str:
    theirs = reading.theirs(column)
    if theirs is None:
        return ""
    value = row.values[theirs]
    if value is None and null:
        return ""
    if not isinstance(value, str):
        raise RowFault(f"column {theirs!r} is {_kind(value)}, not text")
    return value


def _instruct_messages(row: Row, reading: Reading) -> list[dict[str, Any]]:
    instruction = _text(row, reading, "instruction")
    given = _text(row, reading, "input", null=True)
    if reading.instruct_prompt == "alpaca":
        wording = ALPACA_WITH_INPUT if given else ALPACA_WITHOUT_INPUT
        prompt = wording.format(instruction=instruction, input=given)
    else:
        prompt = f"{instruction}\n\n{given}" if given else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": _text(row, reading, "output", null=True)}]


def _messages(row: Row, reading: Reading) -> list[dict[str, Any]]:
    theirs = reading.theirs("messages") or ""
    value = row.values[theirs]
    if isinstance(value, str):
        value = _json(value, theirs)
    if not isinstance(value, list) or not value:
        raise RowFault(f"column {theirs!r} is {_kind(value)}, not a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowFault(f"message {number} of column {theirs!r} is no object with a role and a content")
        # What is null is not there: that is how transformers hands messages to a template, and how Parquet says it.
        kept = {key: item for key, item in message.items() if item is not None}
        content = kept.get("content")
        if content is None and not kept.get("tool_calls"):
            raise RowFault(f"message {number} of column {theirs!r} ({kept['role']}) has no content")
        if content is not None and not isinstance(content, str):
            raise RowFault(f"the content of message {number} of column {theirs!r} is {_kind(content)}, not text")
        messages.append(kept)
    return messages


def _with_system(row: Row, reading: Reading, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    theirs = reading.theirs("system")
    system = row.values.get(theirs or "")
    if not system:
        return messages
    if not isinstance(system, str):
        raise RowFault(f"column {theirs!r} is {_kind(system)}, not text")
    if messages[0]["role"] == "system":
        raise RowFault(f"column {theirs!r} and the first message are both a system prompt")
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Row, reading: Reading) -> list[dict[str, Any]] | None:
    theirs = reading.theirs("tools") or ""
    value = row.values.get(theirs)
    if isinstance(value, str) and value.strip():
        value = _json(value, theirs)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault(f"column {theirs!r} is no list of tools (JSON schemas)")
    return value


def _json(value: str, column: str) -> Any:
    try:
        return parse_json(value)
    except RowFault as fault:
        raise RowFault(f"column {column!r} is text that is {fault}") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list) and not value:
        return "empty"
    kinds = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")
