"""The flat arrays give back what went in, and bytes of targets are the bytes of their text."""

import numpy as np
import pytest

from potstill.data.examples import ExampleSetBuilder
from potstill.data.formats import PlainText
from potstill.data.rendering import Renderer
from potstill.data.token_bytes import token_bytes
from tiny import CORPUS, tiny_tokenizer

ADDED = [
    ([1, 2, 3], [(1, 3)], "a.jsonl", 4),
    ([5], [(0, 1)], "b.jsonl", 1),
    ([7, 8, 9, 10], [(0, 1), (3, 4)], "a.jsonl", 9),
    ([1, 2, 3], [(1, 3)], "a", 1),
]


def _examples():
    builder = ExampleSetBuilder(np.arange(20))
    for item in ADDED:
        builder.add(*item)
    return builder.build()


def test_what_goes_in_comes_out():
    examples = _examples()
    assert len(examples) == len(list(examples)) == 4
    assert [example.tokens for example in examples] == [tokens for tokens, _, _, _ in ADDED]
    assert [example.is_target for example in examples] == [
        [False, True, True],
        [True],
        [True, False, False, True],
        [False, True, True],
    ]
    assert [(example.index, example.origin) for example in examples] == [
        (0, "a.jsonl:4"),
        (1, "b.jsonl:1"),
        (2, "a.jsonl:9"),
        (3, "a:1"),
    ]
    assert examples.lengths.tolist() == [3, 1, 4, 3]
    assert examples.target_counts.tolist() == [example.num_targets for example in examples] == [2, 0, 1, 2]
    assert (examples.num_targets, examples.num_tokens) == (5, 11)
    assert examples.target_bytes.tolist() == [5, 0, 10, 5]  # here a token's number is its bytes
    assert examples[-1].tokens == examples[3].tokens
    assert examples.digest(0) == examples.digest(3) != examples.digest(2)
    with pytest.raises(IndexError):
        examples[4]
    assert ExampleSetBuilder(np.arange(20)).build().num_targets == 0


def test_a_selection_is_numbered_anew():
    chosen = _examples().select([2, 0])
    assert [(example.tokens, example.index, example.origin) for example in chosen] == [
        ([7, 8, 9, 10], 0, "a.jsonl:9"),
        ([1, 2, 3], 1, "a.jsonl:4"),
    ]
    assert chosen.target_bytes.tolist() == [10, 5]
    assert [example.tokens for example in _examples()[1:3]] == [[5], [7, 8, 9, 10]]
    assert len(_examples().select([])) == 0


TEXTS = [*CORPUS, "a", "é漢🙂\u200d\U0001f9d1", "  spaces  and\r\nlines\n", "0x0A <0x0A> ▁ Ġ ##a"]


def test_bytes_of_tokens_are_the_bytes_of_the_text():
    tokenizer = tiny_tokenizer()
    bytes_of = token_bytes(tokenizer)
    for text, rendered in zip(TEXTS, Renderer(tokenizer).render([PlainText(text) for text in TEXTS]), strict=True):
        assert bytes_of[rendered.tokens].sum() == len(text.encode())  # the EOS is no text


@pytest.mark.parametrize(
    "name", ["tokenizers/gpt2", "tokenizers/llama3", "tokenizers/qwen2", "tokenizers/llama2", "models/stories260K-llama-hf"]
)
def test_bytes_of_real_tokens(name, shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / name)
    bytes_of = token_bytes(tokenizer)
    assert len(bytes_of) == len(tokenizer)
    prefix = 1 if "llama2" in name or "stories" in name else 0  # the space that a SentencePiece puts before a text
    texts = [text for text in TEXTS if "▁" not in text or not prefix]
    for text, rendered in zip(texts, Renderer(tokenizer).render([PlainText(text) for text in texts]), strict=True):
        assert bytes_of[rendered.tokens].sum() == len(text.encode()) + prefix, text
