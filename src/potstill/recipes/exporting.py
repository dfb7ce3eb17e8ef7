"""Writes the student of a finished run once more, merged or not. It trains nothing and knows no data."""

from pathlib import Path

from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoadingConfig
from potstill.models.export import export_student
from potstill.models.loading import load_model, load_tokenizer
from potstill.models.tokenizers import vocabulary_size
from potstill.reporting.card import model_cards


def export_run(config: LoadingConfig, output: Path, *, merge: bool, run: Path | None = None) -> list[Path]:
    """Loads the model with its adapter and commits `output/student` (and `output/adapter`); returns the folders written.

    With a `run` each gets a card of what its folder says now: also of what was evaluated since it was trained.
    """
    tokenizer = load_tokenizer(config)
    model = load_model(config, precision="float32" if config.dtype is None else "bf16", trainable=False)
    return export_student(CausalLM(model, vocabulary_size(tokenizer)), tokenizer, output.absolute(), merge=merge,
                          cards=None if run is None else model_cards(run))  # fmt: skip
