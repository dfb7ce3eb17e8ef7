"""Text becomes token ids, and a place in the text becomes a place among the tokens. Knows tokenizers; knows no template.

What a row's own text says is text: a literal `<|im_end|>` in an answer must never become the special token. Where a row holds such
a literal, template and content change names: the template's special tokens are renamed to names nobody can write, and a copy of
the tokenizer knows them under these names alone. Normalising, splitting and merging stay what they are, so that rows without
literals get the same ids from either; that is checked when the copy is made.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from potstill.data.lines import RowFault
from potstill.errors import ModelError

_PROBES = ("", "Hello world", " two  spaces\n\nand 123 lines\n", "Ünïcödé 漢字 🙂", "{0}", "{0}{0}a {0} b\n{0}\nuser", "a{0}")


Names = dict[str, int]  # a special token as it stands in the texts -> its id


class NestFault(RowFault):
    """Tokens of a part are not the first tokens of the whole."""


class Encoder:
    """Encodes rendered texts whose special tokens stand under the names of `pattern`."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], offsets: Callable[[str], list[tuple[int, int]]], names: Names):
        """`encode`: texts -> ids, nothing added; `offsets`: text -> the characters of each token."""
        self._encode = encode
        self._offsets = offsets
        self.special_ids = frozenset(names.values())
        self.pattern = _any_of(names)
        self._short: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self._encode(texts) if texts else []

    def _encode_part(self, text: str) -> list[int]:
        """One part of a text; a header such as "<|im_start|>assistant\\n" is the same in every row and is kept."""
        if len(text) > 64:
            return self._encode([text])[0]
        if text not in self._short:
            self._short[text] = self._encode([text])[0]
        return self._short[text]

    def token_spans(self, text: str, ids: list[int], spans: list[tuple[int, int]], *, proven: bool) -> list[tuple[int, int]]:
        """The spans of characters as spans of tokens.

        Special tokens cut a text into parts that are encoded apart, so a place in the text needs proof only against the tokens
        since the last special token: encoded alone, that part must give the first tokens of what the whole has there. Where it
        does not, a token straddles the place: `proven` then raises NestFault with the first difference, else the token counts
        as inside the span, as transformers counts it.
        """
        found = [(match.start(), match.end()) for match in self.pattern.finditer(text)]
        at = [position for position, token in enumerate(ids) if token in self.special_ids]
        anchors = list(zip(found, at, strict=True)) if len(found) == len(at) else []
        result = []
        for span in spans:
            ends = []
            for place, is_start in zip(span, (True, False), strict=True):
                (start, end), position = next((anchor for anchor in reversed(anchors) if anchor[0][1] <= place), ((0, -1), 0))
                if place in (end, len(text)):
                    ends.append(position + 1 if place == end else len(ids))
                    continue
                part = self._encode_part(text[start:place]) if place > start else []
                whole = ids[position : position + len(part)]
                if part == whole:
                    ends.append(position + len(part))
                elif proven:
                    raise NestFault(_differing(text, start, place, part, whole))
                else:
                    ends.append(self._straddled(text, place, is_start))
            result.append((ends[0], ends[1]))
        return result

    def _straddled(self, text: str, place: int, is_start: bool) -> int:
        """The first token that reaches beyond `place` (a start), or the number of tokens that begin before it (an end)."""
        offsets = self._offsets(text)
        if is_start:
            return next((i for i, (_, end) in enumerate(offsets) if end > place), len(offsets))
        return next((i for i, (start, _) in enumerate(offsets) if start >= place), len(offsets))


def _differing(text: str, start: int, place: int, part: list[int], whole: list[int]) -> str:
    first = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    a, b = (str(ids[first]) if first < len(ids) else "nothing" for ids in (part, whole))
    return (
        f"the tokens up to {text[max(start, place - 20):place]!r} are not the first tokens of the whole, which goes on with "
        f"{text[place:place + 20]!r}: token {first + 1} there is {a}, in the whole it is {b}. "
        "Let them meet where a token ends (often a line end after the prompt, or a space that begins the answer), "
        "or use a template with {% generation %} marks"
    )


def _any_of(literals: Iterable[str]) -> re.Pattern[str]:
    """Longest first, as the tokenizers' own matcher does."""
    return re.compile("|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True)) or r"(?!)")


class Encoders:
    """The tokenizer's two encoders: `ordinary`, and one under `names` nobody can write, made when the first literal turns up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._special = {str(token.content): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ordinary = Encoder(self._encode_ordinary, self._offsets_ordinary, self._special)
        self._hidden: Encoder | None = None
        nonce = secrets.token_hex(8)
        self._names = {literal: f"\U0010fffd{nonce}{number}\U0010fffd" for number, literal in enumerate(self._special)}
        self._swap = {**self._names, **{name: literal for literal, name in self._names.items()}}
        self._either = _any_of(self._swap)

    def _encode_ordinary(self, texts: list[str]) -> list[list[int]]:
        encoded: Any = self._tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, return_token_type_ids=False,
            split_special_tokens=False, verbose=False,
        )
        return encoded["input_ids"]

    def _offsets_ordinary(self, text: str) -> list[tuple[int, int]]:
        if not self._tokenizer.is_fast:
            raise RowFault("a token straddles an end of an answer, and this tokenizer has no fast version that says where")
        encoded: Any = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False, verbose=False
        )
        return encoded["offset_mapping"]

    def holds_literal(self, value: Any) -> bool:
        """Whether a string, or any string inside a message or a tool, holds a special token's literal text."""
        if isinstance(value, str):
            return self.ordinary.pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self.holds_literal(item) for pair in value.items() for item in pair)
        if isinstance(value, list):
            return any(self.holds_literal(item) for item in value)
        return False

    def disguise(self, value: Any) -> Any:
        """The same value with literals under their other names, to be rendered by a template."""
        if isinstance(value, str):
            return self._either.sub(lambda match: self._swap[match[0]], value)
        if isinstance(value, dict):
            return {self.disguise(key): self.disguise(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.disguise(item) for item in value]
        return value

    def exchange(self, text: str, places: list[int]) -> tuple[str, list[int]]:
        """The rendered text with content's literals restored and the template's special tokens renamed; `places` move along."""
        moved, parts, last = list(places), [], 0
        for match in self._either.finditer(text):
            name = self._swap[match[0]]
            parts += [text[last : match.start()], name]
            last, change = match.end(), len(name) - len(match[0])
            moved = [to + change if place >= match.end() else to for place, to in zip(places, moved, strict=True)]
        return "".join([*parts, text[last:]]), moved

    @property
    def hidden(self) -> Encoder:
        if self._hidden is None:
            self._hidden = self._make_hidden()
        return self._hidden

    def _make_hidden(self) -> Encoder:
        if not self._tokenizer.is_fast:
            raise ModelError("the data hold the literal text of a special token, and this tokenizer has no fast version "
                             "(tokenizer.json) that could keep it text; remove these rows or convert the tokenizer")
        backend: Tokenizer = self._tokenizer.backend_tokenizer  # pyright: ignore[reportAssignmentType]
        renamed = Tokenizer.from_str(json.dumps(rename_special(json.loads(backend.to_str()), self._names)))
        renamed.no_padding()
        renamed.no_truncation()
        encoder = Encoder(
            lambda texts: [encoding.ids for encoding in renamed.encode_batch(texts, add_special_tokens=False)],
            lambda text: renamed.encode(text, add_special_tokens=False).offsets,
            {self._names[literal]: index for literal, index in self._special.items()},
        )
        for literal in self._special:
            texts = [probe.format(literal) for probe in _PROBES]
            if encoder.encode([self.exchange(text, [])[0] for text in texts]) != self.ordinary.encode(texts):
                raise ModelError(f"the data hold the literal text of a special token, and a copy of this tokenizer that keeps such text "
                                 f"apart differs on {literal}; remove these rows, or use another tokenizer")
        return encoder


def rename_special(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json whose special tokens are called by `names`; no merge of ordinary text can make one of them."""
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"]) if token["special"] else token["content"]
    model = spec["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {pair[0], pair[1], pair[0] + pair[1]} & names.keys()]
    spec["post_processor"] = None  # only adds special tokens and moves offsets; neither is used here
    spec["truncation"] = spec["padding"] = None
    return spec
