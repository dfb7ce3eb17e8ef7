"""A chat model answers prompts, turn by turn, each later turn behind its own earlier answers; every answer is kept once it is written.

An answer is a function of the model, the prompt's turns, how it is drawn and the seed: neither of its place in the file nor of what was
written beside it, so that what is kept is found again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from potstill import storage
from potstill.data.formats import Conversation, Reading
from potstill.data.lines import Rejects, Row
from potstill.data.questions import questions
from potstill.data.rendering import Rendered, Renderer
from potstill.errors import ModelError
from potstill.evaluation.exact_match import answer_ends
from potstill.evaluation.judging.answers import Answers
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.settings import WritingConfig
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.identity import template_digest, tokenizer_digest, weights_digest
from potstill.models.loading import Precision, load_model, load_tokenizer, longest_context, read_model_config
from potstill.models.tokenizers import vocabulary_size
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.writing import Prompt, Sampling, seed_of

VERSION = 1
"""Of how an answer is written: raised when a change of code changes answers."""
_MANY_CUT = 0.1


class Author:
    """A model that writes, loaded when the first answer is missing. Raises ModelError for one that has no chat template."""

    def __init__(self, name: str, config: LoadingConfig, writing: WritingConfig, kept: KeptLines, *, device: str, precision: Precision):
        self.name, self._config, self._writing, self._kept = name, config, writing, kept
        self._device = device
        self._precision: Precision = precision
        self._tokenizer = load_tokenizer(config)
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"{config.path}: its tokenizer has no chat template, and prompts are put to a chat model; name a file with one: "
                "--set first.model.chat_template=FILE (or second)"
            )
        self._longest = longest_context(read_model_config(config))
        self._renderer = Renderer(self._tokenizer)
        self._ends = sorted({*answer_ends(config, self._tokenizer), *end_of_turn(self._renderer)})
        self._statement = [
            VERSION, weights_digest(config), tokenizer_digest(self._tokenizer), template_digest(self._tokenizer), precision, config.dtype,
            config.attention, self._ends,
        ]  # fmt: skip
        self._generator: LocalGenerator | None = None
        self._check: Callable[[], None] = lambda: None

    def heed(self, check: Callable[[], None]) -> None:
        """`check` is called before each token; what it raises ends the writing."""
        self._check = check

    def missing(self, prompts: Sequence[JudgedPrompt]) -> int:
        """How many answers are still to be written."""
        return sum(self._find(prompt, turn) is None for prompt in prompts for turn in range(len(prompt.turns)))

    def write(self, prompts: Sequence[JudgedPrompt], wrote: Callable[[int, int], None] = lambda answers, tokens: None) -> Answers:
        """Every answer to `prompts`; `wrote` is called with how many answers and tokens were just kept."""
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            due = {
                self._key(prompt, turn): prompt for prompt in prompts if turn < len(prompt.turns) and self._find(prompt, turn) is None
            }
            if due:
                self._write_turn(list(due.values()), turn, wrote)
        found = {prompt.item: [self._found(prompt, turn) for turn in range(len(prompt.turns))] for prompt in prompts}
        texts = {item: tuple(str(line["text"]) for line in lines) for item, lines in found.items()}
        every = [line for lines in found.values() for line in lines]
        stated = self._writing.model_dump(include={"sampling", "category_temperatures", "seed"})
        facts = {"model": self._config.path, **stated}
        return Answers(self.name, texts, facts, tuple(self._warnings(every)))

    def _warnings(self, every: Sequence[Mapping[str, Any]]) -> list[str]:
        cut = sum(line["ended"] is False and line["tokens"] > 0 for line in every)
        unread = sum(line["tokens"] == 0 and line["ended"] is False for line in every)
        found = []
        if cut > _MANY_CUT * len(every):
            found.append(f"{self.name}: {cut:,} of {len(every):,} answers did not end by themselves and were cut")
        if unread:
            found.append(f"{self.name}: {unread:,} of {len(every):,} prompts leave no room for an answer in its {self._longest} positions; "
                         "their answers are empty")  # fmt: skip
        return found

    # ---------------------------------------------------------------- what is kept

    def _key(self, prompt: JudgedPrompt, turn: int) -> str:
        drawn = self._writing.sampling_of(prompt.category).model_dump()
        return xxhash.xxh3_128_hexdigest(storage.to_json([self._statement, drawn, self._writing.seed, prompt.digest(turn), turn]).encode())

    def _find(self, prompt: JudgedPrompt, turn: int) -> Mapping[str, Any] | None:
        lines = self._kept.get(self._key(prompt, turn))
        return lines[0] if lines else None

    def _found(self, prompt: JudgedPrompt, turn: int) -> Mapping[str, Any]:
        line = self._find(prompt, turn)
        assert line is not None, "an answer to every turn was written above"
        return line

    # ---------------------------------------------------------------- what is written

    def _write_turn(self, due: Sequence[JudgedPrompt], turn: int, wrote: Callable[[int, int], None]) -> None:
        asked = self._rendered(due, turn)
        groups: dict[Sampling, list[int]] = {}
        for place, prompt in enumerate(due):
            groups.setdefault(self._sampling(prompt, len(asked[place])), []).append(place)
        for sampling, places in groups.items():
            # Long prompts first: what does not fit in memory fails at once.
            places.sort(key=lambda place: -len(asked[place]))
            for start in range(0, len(places), self._writing.batch_size):
                some = places[start : start + self._writing.batch_size]
                lines = self._answer([due[place] for place in some], turn, [asked[place] for place in some], sampling)
                self._kept.add(lines)
                wrote(len(lines), sum(line["tokens"] for line in lines))

    def _rendered(self, due: Sequence[JudgedPrompt], turn: int) -> list[list[int]]:
        rows = []
        for prompt in due:
            messages = []
            for number in range(turn):
                messages.append({"role": "user", "content": prompt.turns[number]})
                messages.append({"role": "assistant", "content": str(self._found(prompt, number)["text"])})
            messages.append({"role": "user", "content": prompt.turns[turn]})
            rows.append(Row({"messages": messages}, f"prompt {prompt.item}, turn", turn + 1))
        return [question.tokens for question in questions(rows, Reading("chat", {}), self._renderer, Rejects())]

    def _sampling(self, prompt: JudgedPrompt, length: int) -> Sampling:
        """As much room as the model's positions leave; 0 new tokens where they leave none."""
        drawn = Sampling(**self._writing.sampling_of(prompt.category).model_dump())
        if self._longest is None or length + drawn.max_new_tokens - 1 <= self._longest:
            return drawn
        return Sampling(drawn.temperature, drawn.top_p, drawn.top_k, max(0, self._longest - length + 1))

    def _answer(
        self, some: Sequence[JudgedPrompt], turn: int, tokens: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[dict[str, Any]]:
        if sampling.max_new_tokens == 0:
            return [self._line(prompt, turn, "", 0, ended=False) for prompt in some]
        seeds = [seed_of(self._writing.seed, int(prompt.digest(turn), 16), turn) for prompt in some]
        prompts = [Prompt(tuple(ids), seed) for ids, seed in zip(tokens, seeds, strict=True)]
        lines = []
        for prompt, done in zip(some, self._loaded().generate(prompts, sampling), strict=True):
            ids = list(done.tokens[: len(done.tokens) - done.ended])
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            lines.append(self._line(prompt, turn, text, len(done.tokens), ended=done.ended))
        return lines

    def _line(self, prompt: JudgedPrompt, turn: int, text: str, tokens: int, *, ended: bool) -> dict[str, Any]:
        return {"key": self._key(prompt, turn), "item": prompt.item, "turn": turn + 1, "text": text, "tokens": tokens, "ended": ended}

    def _loaded(self) -> LocalGenerator:
        if self._generator is None:
            size = vocabulary_size(self._tokenizer)
            model = CausalLM(load_model(self._config, precision=self._precision, device=self._device), size)
            self._generator = LocalGenerator(model, stop_ids=self._ends, pad_token=_padding(self._tokenizer))
            self._generator.heed(lambda: self._check())
        return self._generator


def end_of_turn(renderer: Renderer) -> frozenset[int]:
    """The special token with which the chat template ends an answer, which need not be the tokenizer's EOS."""
    (read,) = renderer.render([Conversation([{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}])])
    last = read.tokens[read.spans[-1][1] - 1] if isinstance(read, Rendered) and read.spans else None
    return frozenset([last] if last is not None and last in renderer.ending_ids else [])


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else 0
