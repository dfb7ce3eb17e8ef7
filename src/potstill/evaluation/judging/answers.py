"""Written answers: read from AlpacaEval's and MT-Bench's files, and written as such. No model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from potstill import storage
from potstill.data.config import MixtureItem
from potstill.data.lines import Rejects, Row
from potstill.data.sources import read_source
from potstill.errors import DataError
from potstill.evaluation.judging.prompts import JudgedPrompt, instruction_of, texts_of
from potstill.evaluation.judging.settings import Format
from potstill.evaluation.task_config import name_of


@dataclass(frozen=True)
class Answers:
    """What one contestant answered: `texts` by item and turn. `facts` say how it was written, `warnings` what went wrong."""

    name: str
    texts: Mapping[str, tuple[str, ...]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_answers(path: str, prompts: Sequence[JudgedPrompt], name: str | None = None) -> Answers:
    """The answers of a file to these prompts, found by instruction or by question_id. Raises DataError where one is missing."""
    rows = read_source(MixtureItem(path=path), Rejects())
    if "choices" in rows[0].values:
        found, writers = _of_questions(rows), {str(row.values.get("model_id") or "") for row in rows}
        texts = {prompt.item: found[prompt.item] for prompt in prompts if len(found.get(prompt.item, ())) >= len(prompt.turns)}
    elif "output" in rows[0].values:
        writers = {str(row.values.get("generator") or "") for row in rows}
        texts = _of_instructions(rows, prompts)
    else:
        raise DataError(
            f"{rows[0].origin}: no answers: neither AlpacaEval's columns instruction and output nor MT-Bench's question_id and choices; "
            f"the row has {', '.join(rows[0].values) or 'none'}"
        )
    missing = [prompt for prompt in prompts if prompt.item not in texts]
    if missing:
        raise DataError(
            f"{path}: no answer to {len(missing)} of {len(prompts)} prompts, the first is {missing[0].item}: {missing[0].turns[0][:80]!r}; "
            "is it the file of these prompts?"
        )
    writer = writers.pop() if len(writers) == 1 else ""
    cut = {prompt.item: texts[prompt.item][: len(prompt.turns)] for prompt in prompts}
    return Answers(name or (name_of(writer) if writer else name_of(path)), cut, {"answers": path, "generator": writer or None})


def _of_instructions(rows: Sequence[Row], prompts: Sequence[JudgedPrompt]) -> dict[str, tuple[str, ...]]:
    """By instruction; of one that stands there several times the first answer goes to the first prompt of it, and so on."""
    found: dict[str, list[str]] = {}
    for row in rows:
        output = row.values.get("output")
        if not isinstance(output, str):
            raise DataError(f"{row.origin}: output is no text; it is the answer to the row's instruction")
        found.setdefault(instruction_of(row), []).append(output)
    given: dict[str, tuple[str, ...]] = {}
    for prompt in prompts:
        outputs = found.get(prompt.turns[0])
        if outputs and len(prompt.turns) == 1:
            given[prompt.item] = (outputs.pop(0) if len(outputs) > 1 else outputs[0],)
    return given


def _of_questions(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    found = {}
    for row in rows:
        choices = row.values.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise DataError(f"{row.origin}: choices is empty or no list of objects; MT-Bench's answers have one with turns there")
        turns = texts_of(Row(choices[0], row.source, row.number), "turns")
        found[str(row.values.get("question_id"))] = turns
    return found


def write_answer_file(folder: Path, answers: Answers, prompts: Sequence[JudgedPrompt], format: Format) -> Path:
    """The answers as the benchmark's own tools read them: NAME.json for AlpacaEval, NAME.jsonl for MT-Bench."""
    if format == "alpaca_eval":
        path = folder / f"{answers.name}.json"
        storage.write_json(path, [
            {"dataset": prompt.dataset, "instruction": prompt.turns[0], "output": answers.texts[prompt.item][0], "generator": answers.name}
            for prompt in prompts
        ])  # fmt: skip
        return path
    path = folder / f"{answers.name}.jsonl"
    storage.write_text(path, "".join(storage.to_json(_question_answer(answers, prompt)) + "\n" for prompt in prompts))
    return path


def _question_answer(answers: Answers, prompt: JudgedPrompt) -> dict[str, Any]:
    turns = list(answers.texts[prompt.item])
    digest = xxhash.xxh3_128_hexdigest(storage.to_json([answers.name, prompt.item, turns]).encode())
    return {"question_id": prompt.question_id, "answer_id": digest, "model_id": answers.name, "choices": [{"index": 0, "turns": turns}]}
