"""Small real models and tokenizers, made on the spot: real classes of transformers and tokenizers, no mock and no download."""

from functools import lru_cache
from pathlib import Path

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Add 12 and 30: 12 + 30 = 42. The answer is 42.",
    "Reverse the list [3, 1, 2]: the list becomes [2, 1, 3].",
    "user assistant system question answer instruction input response",
    "Ünïcödé, 漢字, emoji 🙂 and tabs\tand new\nlines stay what they are.",
]

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHATML_WITHOUT_MASK = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@lru_cache
def _backend(vocabulary_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(vocabulary_size: int = 320, chat_template: str | None = CHATML, pad_token: str | None = "<|endoftext|>"):
    """A byte-level BPE of 256 bytes, 3 special tokens and a few merges; EOS is <|im_end|>."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(vocabulary_size)), eos_token="<|im_end|>", pad_token=pad_token
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(seed: int = 0, *, vocabulary_size: int = 320, width: int = 32, layers: int = 2, tied: bool = False, **changes):
    """A Llama of a few ten thousand parameters in float32, from `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_pair(folder: Path, seed: int = 0, **model) -> Path:
    """A tiny model and its tokenizer as a folder that `from_pretrained` reads."""
    tiny_llama(seed, **model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
