"""How a model is to be loaded, as a recipe says it. Imports neither torch nor transformers, so a recipe is read in no time."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.config import Config

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]

# Ways in which people say "the head" to peft: the layer's own name in the families that transformers knows.
HEAD_NAMES = ("lm_head", "embed_out", "output")

_COMMIT = re.compile(r"[0-9a-f]{40}")


class LoraConfig(Config):
    """A low-rank adapter: the base stays as it is, `alpha / rank` (or `alpha / sqrt(rank)`) times `up @ down` is learned."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rows of the narrow side."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The numerator of the scaling."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter (`q_proj`, ... and `lm_head`), or every linear layer but the head."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Layers that are trained whole beside the adapter, such as `lm_head` or `embed_tokens`."""
    rank_stabilised: bool = False
    """Divide by the square root of the rank (rsLoRA)."""

    @model_validator(mode="after")
    def _targets_are_sensible(self):
        if not self.targets:
            raise ValueError("targets is empty: name the layers that get an adapter, or write all-linear")
        both = sorted(set(self.modules_to_save) & set(self.targets)) if isinstance(self.targets, list) else []
        if both:
            raise ValueError(f"{', '.join(both)} stands in targets and in modules_to_save: a layer is adapted or trained whole, not both")
        return self

    @property
    def on_head(self) -> bool:
        """Whether the head learns, by an adapter or whole."""
        named = [*self.modules_to_save, *(self.targets if isinstance(self.targets, list) else [])]
        return any(name.rsplit(".", 1)[-1] in HEAD_NAMES for name in named)


class LoadingConfig(Config):
    """What a student and a teacher say alike: which model, and how it is loaded."""

    path: Annotated[str, Field(min_length=1)]
    """A folder, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    adapter: str | None = None
    """A saved peft adapter to put on the model: a folder, or a name on the hub."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Quantise while loading, by bitsandbytes: NF4 with double quantisation, or LLM.int8. A model that is saved in
    quantised form (AWQ, GPTQ, compressed-tensors, bitsandbytes) says so itself and needs nothing here."""
    dtype: Dtype | None = None
    """Of the weights. Unset: chosen from the training precision."""
    attention: Attention | None = None
    """The attention kernel; unset is the choice of transformers."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only with a commit as `revision`."""
    chat_template: str | None = None
    """A file with a Jinja template, or the template itself; replaces the tokenizer's own."""
    eos_token: str | None = None
    """The token that ends an answer, where the tokenizer's own is another: a base model that learns from an instruction model."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the model from its configuration and the run's seed, without reading weights."""

    @model_validator(mode="after")
    def _code_is_pinned(self):
        if self.trust_remote_code and not (self.revision and _COMMIT.fullmatch(self.revision)):
            raise ValueError(
                f"trust_remote_code runs code that ships with {self.path}, so the code must be pinned: "
                f"set revision to a commit of 40 hexadecimal digits (got {self.revision!r})"
            )
        if self.weights == "random" and (self.quantization or self.adapter):
            raise ValueError("weights: random cannot be combined with quantization or adapter, which need trained weights")
        return self


class ModelConfig(LoadingConfig):
    """A student, or the model that `finetune` trains."""

    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of the whole model. Needed where the weights are quantised."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: less memory, a forward more time."""

    @model_validator(mode="after")
    def _quantised_weights_are_not_trained(self):
        if self.quantization and self.lora is None and self.adapter is None:
            raise ValueError(f"quantization: {self.quantization} freezes the weights, so something else must learn: add lora")
        return self
