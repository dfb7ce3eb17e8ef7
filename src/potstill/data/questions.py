"""Rows as questions: what stands before a row's answer, as tokens; and what training will read of a row with a new answer.

It knows the renderer; which column an answer stands in is answer_columns.py's affair, and who answers nobody's here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from potstill.data.answer_columns import Question, own_answer
from potstill.data.config import wording_parts
from potstill.data.formats import Conversation, Item, PlainText, PromptCompletion, Reading, read_item
from potstill.data.lines import Rejects, Row, RowFault, check_row
from potstill.data.rendering import Rendered, Renderer
from potstill.data.teacher_prompt import ANSWER, TeacherPrompt

_ROWS_AT_ONCE = 1024
# Where the answer is to stand, for a template that is rendered whole; the second where the first runs into the prompt's last token.
_STANDINS = ("Answer", "1")


def questions(
    rows: list[Row], reading: Reading, renderer: Renderer, rejects: Rejects, prompt_tokens: int | None = None, wording: str | None = None
) -> Iterator[Question]:
    """The prompts of the rows, in their order. Of the format text it is the first `prompt_tokens` tokens; a shorter row is one whole.

    A conversation that ends with an answer is asked for that one again; one that ends otherwise is asked for the next. `wording` is what
    is asked in place of the last user turn (data.teacher_prompt). A row that cannot be rendered goes to `rejects`.
    """
    otherwise = TeacherPrompt.of(wording)
    tells = wording is not None and any(name == ANSWER for _, name in wording_parts(wording))
    if otherwise is not None:
        rows = otherwise.checked(rows, rows[0].source if rows else "", rejects)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = rows[start : start + _ROWS_AT_ONCE]
        items = [_caught(_asked, row, reading, otherwise, tells) for row in chunk]
        for row, item, found in zip(chunk, items, _prompts(items, renderer), strict=True):
            if isinstance(found, RowFault) or isinstance(item, RowFault):
                rejects.refuse(row.origin, str(found), repr(row.values)[:1000])
            elif not found:
                rejects.refuse(row.origin, "its prompt is empty, so there is nothing to answer", repr(row.values)[:1000])
            else:
                yield Question(row, reading, found[:prompt_tokens] if reading.format == "text" else found, own_answer(row, reading))


def _caught(function, *arguments):
    try:
        return function(*arguments)
    except RowFault as fault:
        return fault


def _asked(row: Row, reading: Reading, otherwise: TeacherPrompt | None, tells: bool) -> Item:
    """The row's content without its answer, in the wording of the one who is asked; `tells`: which names the row's own answer."""
    item = read_item(row, reading)
    if otherwise is None:
        return _open(item)
    answer = own_answer(row, reading).strip()
    if tells and not answer:
        raise RowFault("data.teacher_prompt names {answer}, and the row has no answer of its own")
    if isinstance(item, Conversation) and not answer:
        item = _with_standin(_open(item), _STANDINS[0])
    return _open(otherwise.item(row, item))


def _open(item: Item) -> Item:
    if isinstance(item, Conversation):
        ends_in_answer = item.messages[-1]["role"] == "assistant"
        return Conversation(item.messages[:-1] if ends_in_answer else item.messages, item.tools)
    return PlainText(item.prompt) if isinstance(item, PromptCompletion) else item


def _prompts(items: Sequence[Item | RowFault], renderer: Renderer) -> list[list[int] | RowFault]:
    found: list[list[int] | RowFault] = [item if isinstance(item, RowFault) else RowFault("") for item in items]
    for number, standin in enumerate(_STANDINS):
        # What is no conversation is rendered once: nothing stands in for its answer.
        open_ones = [place for place, item in enumerate(items) if not isinstance(item, RowFault) and isinstance(found[place], RowFault)
                     and (number == 0 or isinstance(item, Conversation))]  # fmt: skip
        rendered = renderer.render([_with_standin(items[place], standin) for place in open_ones])
        for place, result in zip(open_ones, rendered, strict=True):
            found[place] = result if isinstance(result, RowFault) else _before_the_answer(result, items[place], renderer)
    return found


def _with_standin(item: Item | RowFault, standin: str) -> Item:
    assert not isinstance(item, RowFault)
    if isinstance(item, Conversation):
        return Conversation([*item.messages, {"role": "assistant", "content": standin}], item.tools)
    return item


def _before_the_answer(rendered: Rendered, item: Item | RowFault, renderer: Renderer) -> list[int]:
    tokens = rendered.tokens
    if isinstance(item, Conversation):
        return tokens[: rendered.spans[-1][0]]
    # A text alone is ended by the renderer; here it goes on.
    return tokens[:-1] if rendered.spans and tokens[-1] in renderer.ending_ids else tokens


def as_trained(written: Sequence[tuple[dict[str, Any], Reading]], renderer: Renderer) -> list[Rendered | RowFault]:
    """What training will read of written rows, or why it will refuse them."""
    items = [_caught(_read_back, values, reading) for values, reading in written]
    results = iter(renderer.render([item for item in items if not isinstance(item, RowFault)]))
    return [item if isinstance(item, RowFault) else next(results) for item in items]


def _read_back(values: dict[str, Any], reading: Reading) -> Item:
    return read_item(Row(check_row(values), "", 0), reading)
