"""Writes the student of a finished run once more, merged or not. It trains nothing and knows no data."""

from pathlib import Path

from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.export import export_student
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.tokenizers import vocabulary_size


def export_run(config: LoadingConfig, output: Path, *, merge: bool) -> list[Path]:
    """Loads the model with its adapter and commits `output/student` (and `output/adapter`); returns the folders written."""
    tokenizer = load_tokenizer(config)
    model = load_model(config, precision="float32" if config.dtype is None else "bf16", trainable=False)
    return export_student(CausalLM(model, vocabulary_size(tokenizer)), tokenizer, output.absolute(), merge=merge)
