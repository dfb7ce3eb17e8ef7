"""Named chat templates for tokenizers that have none, and the choice among them. Each marks what the assistant writes.

Knows Jinja text and the special tokens that a text needs; renders nothing.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from potstill.errors import ConfigError

_TURN = "{%- if message['role'] == 'assistant' -%}"
_ALPACA_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# Jinja text by name. `plain` is for tokenizers with nothing but an end-of-text token: turns apart by a line end.
TEMPLATES: dict[str, str] = {
    "chatml": (
        "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}" + _TURN
        + "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}"
        "{%- else -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "alpaca": (
        "{%- for message in messages -%}{%- if message['role'] == 'system' -%}{{- message['content'] + '\\n\\n' -}}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- if loop.first -%}{{- '" + _ALPACA_PREAMBLE + "\\n\\n' -}}{%- endif -%}"
        "{{- '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}"
        "{%- else -%}{{- raise_exception('the alpaca template knows system, user and assistant, not ' + message['role']) -}}"
        "{%- endif -%}{%- endfor -%}"
    ),
    "plain": (
        "{%- for message in messages -%}" + _TURN
        + "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + '\\n' -}}{%- endif -%}{%- endfor -%}"
    ),
}
# The special tokens without which a template's ends of turns would be mere text, which no model stops at.
_NEEDED = {"chatml": ("<|im_start|>", "<|im_end|>"), "alpaca": (), "plain": ()}


def single_id(token_id: object) -> list[int]:
    """[id], or [] where the tokenizer has no such token."""
    return [token_id] if isinstance(token_id, int) else []


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with its BOS."""
    bos = single_id(tokenizer.bos_token_id)
    return bool(bos) and list(tokenizer("a", verbose=False)["input_ids"])[:1] == bos


def named_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of a named default for this tokenizer, or the contents of a .jinja file."""
    if name.endswith(".jinja"):
        try:
            return Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template: {name} cannot be read ({error})") from error
    if name not in TEMPLATES:
        raise ConfigError(f"data.chat_template: no template is called {name!r}; there are {', '.join(TEMPLATES)}, or a .jinja file")
    if name != "chatml" and tokenizer.eos_token is None:
        raise ConfigError(f"data.chat_template: {name} ends an answer with the tokenizer's EOS, and this tokenizer has none")
    known = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in _NEEDED[name] if token not in known]
    if missing:
        raise ConfigError(f"data.chat_template: {name} needs the special tokens {' and '.join(missing)}, which this tokenizer lacks; "
                          "choose alpaca or plain")
    return ("{{- bos_token -}}" if adds_bos(tokenizer) else "") + TEMPLATES[name]


def settle_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Gives the tokenizer the named template (it then is exported with the student), or makes sure that it has its own."""
    if name is not None:
        tokenizer.chat_template = named_template(name, tokenizer)
    elif not tokenizer.chat_template:
        raise ConfigError(f"the tokenizer of {tokenizer.name_or_path or 'the student'} has no chat template; "
                          f"set data.chat_template to {', '.join(TEMPLATES)} or a .jinja file")
