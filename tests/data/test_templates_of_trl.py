"""The templates that TRL carries for real model families: marks as transformers sees them, and never a silently wrong mask."""

from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from potstill.data.formats import Conversation
from potstill.data.lines import RowFault
from potstill.data.rendering import Renderer
from potstill.errors import DataError
from tiny import tiny_tokenizer

pytestmark = pytest.mark.peers

TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4"},
]
ENDS = [
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<|user|>",
    "<|eot|>",
]


def _templates() -> list[Path]:
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    # Templates for images want content in parts; those are another format.
    return [path for path in sorted(folder.glob("*.jinja")) if not path.name.startswith(("llava", "idefics", "smolvlm"))]


class _TheDayThatIsWritten(datetime):
    """Ours never depends on the day; transformers' rendering is asked for the same one."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def test_every_template(monkeypatch):
    monkeypatch.setattr(chat_template_utils, "datetime", _TheDayThatIsWritten)
    templates = _templates()
    assert len(templates) > 40
    refused = []
    for path in templates:
        tokenizer = tiny_tokenizer(chat_template=path.read_text(encoding="utf-8"))
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
        for turns in (TURNS[:2], TURNS):
            try:
                (rendered,) = Renderer(tokenizer).render([Conversation(turns)])
            except DataError as error:
                rendered = RowFault(str(error))
            if isinstance(rendered, RowFault):
                assert "{% generation" not in str(tokenizer.chat_template), path.name
                refused.append(path.name)
                continue
            mask = [any(start <= place < end for start, end in rendered.spans) for place in range(len(rendered.tokens))]
            said = tokenizer.decode([token for token, marked in zip(rendered.tokens, mask, strict=True) if marked])
            unsaid = tokenizer.decode([token for token, marked in zip(rendered.tokens, mask, strict=True) if not marked])
            for turn in turns:
                assert turn["content"] in (said if turn["role"] == "assistant" else unsaid), path.name
                assert turn["content"] not in (unsaid if turn["role"] == "assistant" else said), path.name
            if "_training" in path.name:
                theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
                assert (rendered.tokens, mask) == (theirs["input_ids"], [bool(mark) for mark in theirs["assistant_masks"]]), (
                    path.name
                )
    assert len(set(refused)) < len(templates) / 3  # those that rewrite earlier turns, or prompt for thoughts that no row has
