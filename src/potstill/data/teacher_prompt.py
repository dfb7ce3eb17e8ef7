"""What the teacher reads as the last user turn in place of the student's: a wording filled from the row, rendered beside the row itself.

It knows columns and tokens; who the teacher is, and what it does with its prompt, is not its affair.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from potstill.data.config import wording_parts
from potstill.data.formats import Conversation, Item, PromptCompletion
from potstill.data.lines import Rejects, Row, RowFault, printable
from potstill.data.rendering import Rendered, Renderer
from potstill.errors import DataError

PROMPT, ANSWER = "prompt", "answer"


class TeacherPrompt:
    """A wording with {prompt} (the student's last user turn), {answer} (the row's own answer) and any column of the file in braces."""

    def __init__(self, wording: str):
        """Raises ValueError where the braces do not read."""
        self._parts = wording_parts(wording)
        self.columns = tuple(sorted({name for _, name in self._parts if name not in (None, PROMPT, ANSWER)}))

    @classmethod
    def of(cls, wording: str | None) -> "TeacherPrompt | None":
        return None if wording is None else cls(wording)

    def checked(self, rows: list[Row], path: str, rejects: Rejects) -> list[Row]:
        """The rows that have every column that is named. A column that no row has stops at once; else a row without it is a bad row."""
        present = {column for row in rows for column in row.values}
        for column in self.columns if rows else ():
            if column not in present:
                raise DataError(printable(
                    f"{path}: no column {column!r}, which data.teacher_prompt names; the columns are {', '.join(sorted(present))}; "
                    "{prompt} is the student's last user turn, {answer} the row's answer"
                ))  # fmt: skip
        good = []
        for row in rows:
            lacking = [column for column in self.columns if column not in row.values]
            if lacking:
                reason = f"column {lacking[0]!r} is missing, which data.teacher_prompt names; the row has {', '.join(row.values) or 'none'}"
                rejects.refuse(row.origin, reason, repr(row.values)[:1000])
            else:
                good.append(row)
        return good

    def render(self, renderer: Renderer, pairs: Sequence[tuple[Row, Item]]) -> list[Rendered | RowFault]:
        """What the student reads of each row, with the teacher's prompt beside it. Only the last answer stays a target: what stands before
        it is what the teacher reads otherwise."""
        own = renderer.render([item for _, item in pairs])
        items = [self._try(row, item) for row, item in pairs]
        read = iter(renderer.render([item for item in items if not isinstance(item, RowFault)]))
        seen = [item if isinstance(item, RowFault) else next(read) for item in items]
        return [_beside(*both) for both in zip(own, seen, strict=True)]

    def _try(self, row: Row, item: Item) -> Item | RowFault:
        try:
            return self.item(row, item)
        except RowFault as fault:
            return fault

    def item(self, row: Row, item: Item) -> Item:
        """The item as the teacher reads it. Raises RowFault where the row cannot fill the wording."""
        if isinstance(item, PromptCompletion):
            return replace(item, prompt=self._text(row, item.prompt, item.completion))
        assert isinstance(item, Conversation), "the configuration refuses a text without a prompt"
        answers = [number for number, message in enumerate(item.messages) if message["role"] == "assistant" and _says(message)]
        turns = [number for number, message in enumerate(item.messages) if message["role"] == "user" and number < max(answers, default=0)]
        if not answers:
            return item  # nothing to learn, which is counted as such
        if not turns:
            raise RowFault("no user turn stands before the last answer, so that data.teacher_prompt has nothing to take the place of")
        messages = list(item.messages)
        question, answer = (str(messages[number].get("content") or "") for number in (turns[-1], answers[-1]))
        messages[turns[-1]] = {**messages[turns[-1]], "content": self._text(row, question, answer)}
        return replace(item, messages=messages)

    def _text(self, row: Row, prompt: str, answer: str) -> str:
        given = {PROMPT: prompt, ANSWER: answer}
        return "".join(
            text + ("" if name is None else given[name] if name in given else _value(row, name)) for text, name in self._parts
        )


def _says(message: dict[str, Any]) -> bool:
    return bool(str(message.get("content") or "").strip() or message.get("tool_calls"))


def _value(row: Row, column: str) -> str:
    value = row.values[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise RowFault(f"column {column!r}, which data.teacher_prompt names, is {kind}, not text or a number")
    return str(value)


def _beside(own: Rendered | RowFault, seen: Rendered | RowFault) -> Rendered | RowFault:
    """What the student reads, with the tokens before the teacher's last answer as the teacher's prompt."""
    if isinstance(own, RowFault) or not own.spans:
        return own
    if isinstance(seen, RowFault):
        return seen
    if not own.spans[-1][0]:
        return RowFault("nothing stands before the answer, so that data.teacher_prompt has nothing to take the place of")
    prompt = seen.tokens[: seen.spans[-1][0]] if seen.spans else []
    if not prompt:
        return RowFault("the teacher's prompt has no token; let data.teacher_prompt say something")
    return Rendered(own.tokens, own.spans[-1:], prompt)


def cut_left(tokens: list[int], room: int, bos: object) -> list[int]:
    """The last `room` tokens, a BOS in front kept."""
    front = 1 if tokens[0] == bos else 0
    return tokens if len(tokens) <= room else tokens[:front] + tokens[len(tokens) - room + front :]
