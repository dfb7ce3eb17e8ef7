"""A Llama whose next token depends on the last one alone, by a table: what it writes is known, and so is how likely."""

from pathlib import Path

END = "<|im_end|>"
# After a chat's header: two sentences, two numbers; "4", "2" are two tokens where the tokenizer has one.
NEXT = {
    "\n": {"The": 0.5, "4": 0.3, " 42": 0.2},
    "The": {" answer": 1.0}, " answer": {".": 0.75, " 42": 0.25}, ".": {END: 1.0},
    "4": {"2": 0.5, "5": 0.5}, "2": {END: 1.0}, "5": {END: 1.0}, " 42": {END: 0.6, " 42": 0.4},
}  # fmt: skip


def save_bigram(folder: Path, following: dict[str, dict[str, float]] | None = None, **changes) -> Path:
    """The model and its tokenizer. A token that the table does not name is followed by the end."""
    import torch

    from tiny import tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_llama(0, width=320, layers=1, **changes)

    def number(text: str) -> int:
        (found,) = tokenizer.encode(text, add_special_tokens=False)
        return found

    table = torch.full((320, 320), -40.0)
    table[:, number(END)] = 0.0
    for last, shares in (following or NEXT).items():
        table[number(last)] = -40.0
        for token, share in shares.items():
            table[number(last), number(token)] = torch.tensor(share).log()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()  # the layers add nothing: what the head sees is the last token's own row
        model.model.embed_tokens.weight.copy_(torch.eye(320))
        model.lm_head.weight.copy_(table.T / 320**0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
