"""What the quickstart's trainings start from: a byte-level tokenizer, configurations without weights, and a scrambled teacher.

Knows tokenizers and configurations; nothing of tasks beyond their text, and nothing of training.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from potstill import storage

SPECIAL = PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' -}}{%- generation -%}{{- message['content'] + '" + END + "' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '" + USER + "' + message['content'] -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Size:
    """A Llama's size. `initializer_range` is near 1 / sqrt(width): the small one that is usual for large models learns slowly here."""

    width: int
    layers: int
    heads: int
    initializer_range: float


def train_tokenizer(rows: Iterable[Mapping[str, str]], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE with four special tokens and a chat template that marks what is to be learned.

    Digits stand alone, each with the space before it: a number beside a word is then one token beside another.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((row[part] for row in rows for part in ("instruction", "input", "output")), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    wrapped.chat_template = TEMPLATE
    return wrapped


def write_start(folder: Path, tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, Size], *, longest: int) -> None:
    """`folder`/NAME for each size: a configuration and the tokenizer, for `weights: random`."""

    def write(at: Path) -> None:
        for name, size in sizes.items():
            config = LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=2 * size.width, num_hidden_layers=size.layers,
                num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=longest,
                initializer_range=size.initializer_range, tie_word_embeddings=True, bos_token_id=None,
                eos_token_id=SPECIAL.index(END), pad_token_id=SPECIAL.index(PAD),
                # Short texts: with the usual base most rotations would hardly turn within them.
                rope_parameters={"rope_type": "default", "rope_theta": 300.0}, architectures=["LlamaForCausalLM"],
            )  # fmt: skip
            config.save_pretrained(at / name)
            tokenizer.save_pretrained(at / name)

    storage.commit_folder(folder, write)


def scramble(source: Path, target: Path) -> None:
    """A copy of the model in `source` with the values of every weight shuffled: the same numbers, and nothing learned in them."""
    if target.is_dir():
        return
    generator = torch.Generator().manual_seed(0)

    def shuffled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape).contiguous()

    def write(at: Path) -> None:
        for file in sorted(source.iterdir()):
            if file.name == WEIGHTS:
                weights = {name: shuffled(tensor) for name, tensor in sorted(load_file(file).items())}
                storage.write_tensors(at / WEIGHTS, weights, {"format": "pt"})
            elif file.suffix in (".json", ".jinja") and file.name != storage.MANIFEST:
                storage.write_bytes(at / file.name, file.read_bytes())

    storage.commit_folder(target, write)
