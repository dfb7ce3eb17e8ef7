"""An item becomes tokens and the spans of them that are targets: what the assistant writes, its end-of-turn token included.

Targets come from the template's own {% generation %} marks; a template without them is rendered once for each prefix that ends
before or after an answer, and the prefixes are proven to nest, as text and as tokens. It knows no files, no lengths, no batches.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from potstill.data.encoding import Encoder, Encoders
from potstill.data.formats import Conversation, Item, PromptCompletion
from potstill.data.lines import RowFault
from potstill.data.templates import adds_bos, single_id
from potstill.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Llama 3.1 and its kin print the day into the system prompt; this is the day that their own templates fall back to. Without it
# the same data would be other tokens tomorrow.
_FIXED_DATE = {"date_string": "26 Jul 2024"}
# The same day for the templates that ask strftime_now themselves: a macro of that name stands before transformers' function.
# The line end goes with the macro's block, so that the template begins a line as it did.
_FIXED_NOW = (
    "{% macro strftime_now(format) %}{{- format | replace('%Y', '2024') | replace('%y', '24') | replace('%m', '07') | replace('%B', 'July')"
    " | replace('%b', 'Jul') | replace('%d', '26') -}}{% endmacro %}\n"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens, and the spans [start, end) of tokens that are targets; a teacher's prompt stands for all tokens before the only span."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    teacher_prompt: list[int] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longer of what the student reads and what the teacher reads."""
        return len(self.tokens) + self.ahead

    @property
    def ahead(self) -> int:
        """By how many tokens the teacher's prompt is longer than the student's; 0 where it is not."""
        return 0 if self.teacher_prompt is None else max(0, len(self.teacher_prompt) - self.spans[-1][0])


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A rendered text, the character spans that are targets, and whether it stands under the hidden names."""

    text: str
    spans: list[tuple[int, int]]
    hidden: bool
    proven: bool = True
    raw: bool = False           # no template: the tokenizer's BOS and the EOS are still to be added


class Renderer:
    """Renders items with one tokenizer and its chat template. Raises RowFault for a row, DataError for the template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, end_of_text: Sequence[int] = (), template_variables: dict[str, Any] | None = None
    ):
        """`end_of_text`: further ids at which the model stops; the first ends a text where the tokenizer has no EOS."""
        self._tokenizer = tokenizer
        self._encoders = Encoders(tokenizer)
        self._variables = {**_FIXED_DATE, **tokenizer.special_tokens_map, **(template_variables or {})}
        self._bos = single_id(tokenizer.bos_token_id) if adds_bos(tokenizer) else []
        self._eos = single_id(tokenizer.eos_token_id) or list(end_of_text[:1])
        self._header_checked = False
        self.ending_ids = self._encoders.ordinary.special_ids | {*self._eos, *end_of_text}

    def render(self, items: Sequence[Item]) -> list[Rendered | RowFault]:
        """One result an item, in their order: its tokens, or why it has none."""
        drawn = [self._try(self._draw, item) for item in items]
        encoded: dict[int, list[int]] = {}
        for hidden in (False, True):
            places = [place for place, one in enumerate(drawn) if isinstance(one, _Drawn) and one.hidden is hidden]
            if places:
                encoder = self._encoders.hidden if hidden else self._encoders.ordinary
                encoded.update(zip(places, encoder.encode([drawn[place].text for place in places]), strict=True))  # type: ignore[union-attr]
        return [one if isinstance(one, RowFault) else self._try(self._finish, one, encoded[place]) for place, one in enumerate(drawn)]

    @staticmethod
    def _try(function, *arguments):
        try:
            return function(*arguments)
        except RowFault as fault:
            return fault

    # ---- text and character spans

    def _draw(self, item: Item) -> _Drawn:
        if isinstance(item, Conversation):
            return self._draw_conversation(item)
        if isinstance(item, PromptCompletion):
            whole = item.prompt + item.completion
            spans = [(len(item.prompt), len(whole))] if item.completion.strip() else []
        else:
            whole = item.text
            spans = [(0, len(whole))] if whole.strip() else []
        hidden = self._encoders.holds_literal(whole)
        # Everything here is content, so there is nothing to exchange: under the hidden names a literal simply is no token.
        return _Drawn(whole, spans, hidden, raw=True)

    def _draw_conversation(self, item: Conversation) -> _Drawn:
        messages, tools = item.messages, item.tools
        hidden = self._encoders.holds_literal(messages) or self._encoders.holds_literal(tools)
        if hidden:
            messages, tools = self._encoders.disguise(messages), self._encoders.disguise(tools)
        template = self._tokenizer.get_chat_template(None, tools)
        if "strftime_now" in template:
            template = _FIXED_NOW + template
        marked = _GENERATION.search(template) is not None
        if marked:
            text, spans = self._apply(template, messages, tools, mask=True)
        else:
            text, spans = self._nested(template, messages, tools)
        if hidden:
            text, places = self._encoders.exchange(text, [place for span in spans for place in span])
            spans = list(zip(places[::2], places[1::2], strict=True))
        encoder = self._encoders.hidden if hidden else self._encoders.ordinary
        kept = _with_answers(text, spans, encoder)
        if not marked:
            kept = [_without_tail(text, span, encoder) for span in kept]
        if not kept and _has_answer(item.messages):
            raise DataError(
                "the chat template marks no token of a row whose assistant has an answer "
                + ("(its {% generation %} block stays empty)" if marked else "(it renders nothing for the assistant)")
                + "; set data.chat_template to a template that renders the assistant's turns"
            )
        return _Drawn(text, kept, hidden, proven=not marked)

    def _apply(self, template: str, messages: list, tools: list | None, *, mask: bool = False, prompt: bool = False) -> tuple[str, list]:
        try:
            texts, spans = render_jinja_template(
                [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=mask,
                add_generation_prompt=prompt, **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages) or "no message"
            raise RowFault(f"the chat template refuses the messages ({roles}): {error}") from None
        return texts[0], list(spans[0]) if mask else []

    def _nested(self, template: str, messages: list, tools: list | None) -> tuple[str, list[tuple[int, int]]]:
        """Character spans from prefixes: from the prompt before an answer to the end of the rendering that ends with it."""
        whole, _ = self._apply(template, messages, tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._apply(template, messages[:number], tools, prompt=True)
            through = whole if number + 1 == len(messages) else self._apply(template, messages[: number + 1], tools)[0]
            for part, what in ((before, "prompt before"), (through, "conversation up to")):
                if not whole.startswith(part):
                    raise RowFault(_not_nested(part, whole, f"{what} message {number + 1}"))
            if not self._header_checked:
                self._check_header(template, messages[:number], tools, before, through, message)
            spans.append((len(before), len(through)))
        return whole, spans

    def _check_header(self, template: str, messages: list, tools: list | None, before: str, through: str, answer: dict[str, Any]) -> None:
        """A template that ignores add_generation_prompt would make the assistant's header a target."""
        content = str(answer.get("content") or "").strip()
        found = through.find(content, len(before)) if content else -1
        if found < 0:
            return
        header = through[len(before) : found]
        if header.strip() and before == self._apply(template, messages, tools)[0]:
            raise DataError(
                f"the chat template writes {header!r} before an answer but not as its generation prompt, so that the student would be "
                "trained to write it; use a template with {% generation %} marks or one that obeys add_generation_prompt"
            )
        self._header_checked = True

    # ---- tokens and token spans

    def _finish(self, drawn: _Drawn, ids: list[int]) -> Rendered:
        encoder = self._encoders.hidden if drawn.hidden else self._encoders.ordinary
        spans = encoder.token_spans(drawn.text, ids, drawn.spans, proven=drawn.proven)
        if not drawn.raw:
            return Rendered(ids, spans)
        tokens = self._bos + ids
        spans = [(start + len(self._bos), end + len(self._bos)) for start, end in spans]
        if spans:
            tokens += self._eos
            spans[-1] = (spans[-1][0], len(tokens))
        return Rendered(tokens, spans)


def _has_answer(messages: list[dict[str, Any]]) -> bool:
    return any(message["role"] == "assistant" and str(message.get("content") or "").strip() for message in messages)


def _with_answers(text: str, spans: list[tuple[int, int]], encoder: Encoder) -> list[tuple[int, int]]:
    """The spans of answers that say something. A span of special tokens alone belongs to the span right before it, if any: some
    templates mark an answer and its end of turn one after the other."""
    kept: list[tuple[int, int]] = []
    for start, end in spans:
        follows = bool(kept) and not text[kept[-1][1] : start].strip()
        if encoder.pattern.sub("", text[start:end]).strip() or (follows and end > start):
            kept.append((start, end))
    return kept


def _without_tail(text: str, span: tuple[int, int], encoder: Encoder) -> tuple[int, int]:
    """The span without the white space that a template writes after its end-of-turn token."""
    start, end = span
    ends = [match.end() for match in encoder.pattern.finditer(text, start, end)]
    return (start, ends[-1]) if ends and not text[ends[-1] : end].strip() else span


def _not_nested(part: str, whole: str, what: str) -> str:
    first = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return (
        f"the chat template does not nest: the {what} is rendered differently within the whole; at character {first} it has "
        f"{part[first:first + 30]!r}, the whole has {whole[first:first + 30]!r}. "
        "Use a template with {% generation %} marks (data.chat_template)"
    )
