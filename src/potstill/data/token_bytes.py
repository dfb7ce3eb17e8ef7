"""How many bytes of text each token stands for, so that bits per byte needs no decoding. Knows vocabularies; knows no data."""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """UTF-8 bytes of each id, int32 [len(tokenizer)]; a special token is no text and counts 0.

    In a byte-level vocabulary every character of a piece is one byte. In a SentencePiece one "▁" is a space and `<0x0A>` one
    byte; the space that it puts before a text is counted, being part of what the model must predict.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if not token.special}
    byte_level = _is_byte_level(tokenizer)
    counts = np.zeros(len(pieces), dtype=np.int32)
    for index, piece in enumerate(pieces):
        if piece is None or index in special:
            continue
        if index in added:
            counts[index] = len(added[index].encode())
        elif byte_level:
            counts[index] = len(piece)
        elif _BYTE.fullmatch(piece):
            counts[index] = 1
        else:
            counts[index] = len(piece.replace("▁", " ").removeprefix("##").encode("utf-8", "surrogatepass"))
    return counts


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a two-byte character that no vocabulary holds is written as two characters of a byte alphabet."""
    space = tokenizer.convert_ids_to_tokens(tokenizer(" a", add_special_tokens=False, verbose=False)["input_ids"])
    return any("Ġ" in str(piece) for piece in space)
