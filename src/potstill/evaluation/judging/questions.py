"""Every question to the judge, and what is known of its verdict from the lines that are kept. Knows no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from potstill import storage
from potstill.evaluation.judging.answers import Answers
from potstill.evaluation.judging.kept_lines import KeptLines
from potstill.evaluation.judging.prompts import JudgedPrompt
from potstill.evaluation.judging.settings import JudgeConfig
from potstill.evaluation.judging.wording import VERSION, Message, grade_messages, pair_messages

Verdict = str | float


@dataclass(frozen=True)
class JudgeQuestion:
    """One question: the prompt's item and turn, and who is shown, in the order of places (A, then B); one name where it is graded."""

    item: str
    turn: int
    shown: tuple[str, ...]
    messages: tuple[Message, ...]

    def body(self, judge: JudgeConfig) -> dict[str, Any]:
        """What is sent the first time; a key that `judge.body` sets to null is left out."""
        values = {"model": judge.model, "messages": list(self.messages), "temperature": judge.temperature, "max_tokens": judge.max_tokens}
        return {key: value for key, value in {**values, **judge.body}.items() if value is not None}

    def key(self, judge: JudgeConfig) -> str:
        """Equal for what is asked word for word alike of a judge of the same name, at whatever address."""
        return xxhash.xxh3_128_hexdigest(storage.to_json([VERSION, self.body(judge)]).encode())


def pair_questions(prompts: Sequence[JudgedPrompt], first: Answers, second: Answers) -> list[JudgeQuestion]:
    """Each pair in both orders, turn by turn. Equal conversations are a tie and not asked."""
    return [
        JudgeQuestion(prompt.item, turn, (a.name, b.name),
                      tuple(pair_messages(prompt, turn, a.texts[prompt.item][: turn + 1], b.texts[prompt.item][: turn + 1])))
        for prompt in prompts for turn in range(len(prompt.turns)) if not are_equal(prompt, turn, first, second)
        for a, b in ((first, second), (second, first))
    ]  # fmt: skip


def are_equal(prompt: JudgedPrompt, turn: int, first: Answers, second: Answers) -> bool:
    """Whether both answered word for word alike up to this turn."""
    return first.texts[prompt.item][: turn + 1] == second.texts[prompt.item][: turn + 1]


def grade_questions(prompts: Sequence[JudgedPrompt], contestants: Sequence[Answers]) -> list[JudgeQuestion]:
    """Each answer alone, turn by turn."""
    return [
        JudgeQuestion(prompt.item, turn, (one.name,), tuple(grade_messages(prompt, turn, one.texts[prompt.item][: turn + 1])))
        for prompt in prompts for turn in range(len(prompt.turns)) for one in contestants
    ]  # fmt: skip


@dataclass(frozen=True)
class Heard:
    """What the judge has said to a question so far. `settled`: it is not asked again."""

    verdict: Verdict | None
    settled: bool
    lines: Sequence[Mapping[str, Any]] = ()

    @property
    def words(self) -> str:
        """The answer that holds the verdict, or the last one."""
        return str(self.lines[-1].get("answer", "")) if self.lines else ""


def heard(question: JudgeQuestion, judge: JudgeConfig, kept: KeptLines) -> Heard:
    """The first verdict; a question that was refused, or asked as often as allowed, is settled without one."""
    lines = kept.get(question.key(judge))
    for number, line in enumerate(lines, start=1):
        if line.get("verdict") is not None:
            return Heard(line["verdict"], True, lines[:number])
    return Heard(None, len(lines) >= judge.tries or any("refused" in line for line in lines), lines)
