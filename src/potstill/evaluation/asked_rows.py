"""The rows that a task asks, as one model reads them, and the answers that it writes to them.

Rows, prompts, ends and room come from files, configurations and tokenizers alone; weights are needed for the writing only. What an answer
is worth is the tasks' affair.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill import storage
from potstill.data.answer_columns import Question
from potstill.data.asking import ask
from potstill.errors import DataError
from potstill.evaluation.exact_match import answer_ends, write_all
from potstill.evaluation.items import item_names
from potstill.evaluation.task import Advance, Subject
from potstill.evaluation.writing_config import WritingTaskConfig
from potstill.models.config import LoadingConfig
from potstill.models.identity import tokenizer_digest
from potstill.models.loading import load_tokenizer, longest_context, read_model_config
from potstill.rollouts.writing import Prompt, seed_of


@dataclass(frozen=True)
class AskedRow:
    """One row by its file and line. `numbers`, its source and its number there, seed its answers.

    `reference` is its own answer, `reference_tokens` how many tokens that has for this model.
    """

    name: str
    numbers: tuple[int, int]
    prompt: str
    tokens: tuple[int, ...]
    reference: str
    reference_tokens: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """One answer: its text, its tokens without the end, their log-probabilities (end included), and whether it ended."""

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ended: bool


@dataclass(frozen=True)
class AskedRows:
    """All rows of a task for one model. `ends` are the tokens that end an answer."""

    config: WritingTaskConfig
    rows: tuple[AskedRow, ...]
    ends: frozenset[int]
    tokenizer: str
    left_out: Mapping[str, int]
    num_rows: int

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides what is written, and the rows' own content."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            stated = [row.name, row.numbers, row.tokens, row.reference, row.reference_tokens, repr(sorted(row.values.items()))]
            digest.update(storage.to_json(stated).encode("utf-8", "surrogatepass"))
        sampling = self.config.sampling
        drawn = [sampling.temperature, sampling.top_p, sampling.top_k, self.config.seed] if sampling.temperature else "greedy"
        return {
            "rows": digest.hexdigest(), "ends": sorted(self.ends), "tokenizer": self.tokenizer, "samples": self.config.samples,
            "drawn": drawn, "max_new_tokens": sampling.max_new_tokens,
        }  # fmt: skip

    @property
    def size(self) -> int:
        return len(self.rows) * self.config.samples

    @property
    def facts(self) -> dict[str, Any]:
        sampling = self.config.sampling
        how = "greedy"
        if sampling.temperature:
            how = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, seed {self.config.seed}"
        return {
            "data": ", ".join(source.path for source in self.config.data.sources), "rows": self.num_rows, "asked": len(self.rows),
            "answers_a_row": self.config.samples, "drawn": how, "max_new_tokens": sampling.max_new_tokens,
        }  # fmt: skip

    @property
    def warnings(self) -> list[str]:
        counts = self.left_out.items()
        return [f"{number} of {self.num_rows} rows were {why} and are not in the numbers" for why, number in counts if number]

    def write(self, subject: Subject, advance: Advance) -> list[list[Written]]:
        """The answers to each row, the same for any batch size and beside any other rows."""
        config = self.config
        prompts = [
            Prompt(row.tokens, seed_of(config.seed, *row.numbers, sample)) for row in self.rows for sample in range(config.samples)
        ]
        found = write_all(
            subject.model, prompts, config.sampling, stop_tokens=self.ends, batch_size=subject.batch_size, on_answers=advance
        )
        written = []
        for completion in found:
            tokens = completion.tokens[: len(completion.tokens) - completion.ended]
            written.append(Written(_text(subject.tokenizer, tokens), tokens, completion.log_probs, completion.ended))
        return [written[start : start + config.samples] for start in range(0, len(written), config.samples)]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def read_rows(config: WritingTaskConfig, model: LoadingConfig, *, prompt_tokens: int | None = None) -> AskedRows:
    """The rows of a task as `model` reads them; of plain text the first `prompt_tokens` tokens are asked and the rest is the reference.

    Raises DataError for rows that cannot be asked, ModelError for a model whose answers have no end.
    """
    tokenizer, saved = load_tokenizer(model), read_model_config(model)
    ends = answer_ends(model, tokenizer)
    asked = ask(config.data, tokenizer, seed=0, end_of_text=ends)
    names = item_names([question.row.origin for question in asked.questions])
    # A weighted mixture may hold a row several times; it is one question.
    once = dict(zip(names, zip(asked.questions, asked.sources, strict=True), strict=True))
    found = [_row(name, question, place, tokenizer, prompt_tokens) for name, (question, place) in once.items()]
    rows = [row for row in found if row is not None]
    if not rows:
        raise DataError(f"0 of {asked.rows} rows can be asked; look at data.format, data.columns and prompt_tokens")
    fitting = _fitting(config, rows, longest_context(saved))
    left_out = {"malformed": asked.rejected, "too short": len(found) - len(rows), "too long": len(rows) - len(fitting)}
    return AskedRows(config, tuple(fitting), frozenset({*ends, *asked.ends()}), tokenizer_digest(tokenizer), left_out, asked.rows)


def _row(
    name: str, question: Question, source: int, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int | None
) -> AskedRow | None:
    tokens, reference, number = tuple(question.tokens), question.reference, question.row.number
    if question.reading.format == "text" and prompt_tokens is not None:
        tokens, rest = tokens[:prompt_tokens], tokens[prompt_tokens:]
        if not rest:
            return None
        reference, count = _text(tokenizer, rest), len(rest)
    else:
        count = len(tokenizer(reference, add_special_tokens=False, verbose=False)["input_ids"])
    return AskedRow(name, (source, number), _text(tokenizer, tokens, special=True), tokens, reference, count, question.row.values)


def _fitting(config: WritingTaskConfig, rows: Sequence[AskedRow], context: int | None) -> list[AskedRow]:
    limit = min(config.data.max_tokens, context or config.data.max_tokens)
    fitting = [row for row in rows if len(row.tokens) + config.max_new_tokens <= limit]
    longest = max(rows, key=lambda row: len(row.tokens))
    if not fitting or (len(fitting) < len(rows) and config.data.too_long == "error"):
        whose = "the model's context" if context is not None and context < config.data.max_tokens else "data.max_tokens"
        raise DataError(
            f"{len(rows) - len(fitting)} of {len(rows)} prompts leave no room for max_new_tokens = {config.max_new_tokens} within "
            f"{whose} = {limit}; the longest has {len(longest.tokens)} tokens ({longest.name}). Lower max_new_tokens, raise "
            "data.max_tokens where that is the limit, or set data.too_long: drop to leave them out"
        )
    return fitting
