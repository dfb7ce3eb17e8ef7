"""What is answered: AlpacaEval's instructions and MT-Bench's questions, as rows of a file. No tokenizer, no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from potstill import storage
from potstill.data.config import MixtureItem
from potstill.data.lines import Rejects, Row
from potstill.data.sources import read_source
from potstill.errors import DataError
from potstill.evaluation.judging.settings import Format

_NEEDED: dict[Format, str] = {"alpaca_eval": "instruction", "mt_bench": "turns"}


@dataclass(frozen=True)
class JudgedPrompt:
    """One prompt of one or several user turns; `references` are right answers by turn, where the data has them."""

    item: str
    turns: tuple[str, ...]
    category: str = ""
    dataset: str = ""
    references: tuple[str, ...] = ()
    question_id: int | str = ""

    def digest(self, turn: int) -> str:
        """What stands before the answer of this turn, whatever its place in the file."""
        return xxhash.xxh3_64_hexdigest(storage.to_json(list(self.turns[: turn + 1])).encode())


def read_prompts(path: str, format: Format | None = None, limit: int | None = None) -> tuple[Format, list[JudgedPrompt]]:
    """The prompts of a file, and which format they have. Raises DataError naming the row."""
    rows = read_source(MixtureItem(path=path), Rejects())
    found = format or _format_of(rows[0])
    read = _read_question if found == "mt_bench" else _read_instruction
    prompts = [read(row, number) for number, row in enumerate(rows[:limit])]
    seen: dict[str, Row] = {}
    for prompt, row in zip(prompts, rows, strict=False):
        if prompt.item in seen:
            raise DataError(f"{row.origin}: question_id {prompt.item} stands at {seen[prompt.item].origin} already; give each its own")
        seen[prompt.item] = row
    return found, prompts


def _format_of(row: Row) -> Format:
    for name, column in _NEEDED.items():
        if column in row.values:
            return name
    raise DataError(
        f"{row.origin}: neither AlpacaEval's column instruction nor MT-Bench's column turns; the row has {', '.join(row.values) or 'none'}"
    )


def _read_instruction(row: Row, number: int) -> JudgedPrompt:
    return JudgedPrompt(str(number), (instruction_of(row),), dataset=str(row.values.get("dataset") or ""), question_id=number)


def instruction_of(row: Row) -> str:
    """The instruction of a row, and its input behind it where it has one."""
    instruction, given = row.values.get("instruction"), row.values.get("input")
    if not isinstance(instruction, str) or not instruction.strip():
        raise DataError(f"{row.origin}: instruction is {_kind(instruction)}; AlpacaEval's rows have a text there")
    return f"{instruction}\n\n{given}" if isinstance(given, str) and given else instruction


def _read_question(row: Row, number: int) -> JudgedPrompt:
    turns = texts_of(row, "turns")
    if not turns or not all(turn.strip() for turn in turns):
        raise DataError(f"{row.origin}: turns is empty, or holds an empty text; MT-Bench's rows have a list of user turns there")
    known = next((column for column in ("reference", "gpt4_reference") if row.values.get(column)), None)
    name = row.values.get("question_id", number)
    if not isinstance(name, int | str):
        raise DataError(f"{row.origin}: question_id is {_kind(name)}; it is a number or a text")
    references = texts_of(row, known) if known else ()
    return JudgedPrompt(str(name), turns, str(row.values.get("category") or ""), references=references, question_id=name)


def texts_of(row: Row, column: str) -> tuple[str, ...]:
    """A column that is a list of texts. Raises DataError where it is something else."""
    value = row.values.get(column)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f"{row.origin}: {column} is {_kind(value)}; it must be a list of texts")
    return tuple(value)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "an empty text" if not value.strip() else "a text"
    return "a list that holds something else" if isinstance(value, list) else f"a {type(value).__name__}"


def categories(prompts: Sequence[JudgedPrompt]) -> list[str]:
    """The categories, in the order of their first prompt; none where the prompts have none or all share one."""
    found = dict.fromkeys(prompt.category for prompt in prompts if prompt.category)
    return list(found) if len(found) > 1 else []
