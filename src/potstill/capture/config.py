"""What is recorded of a teacher, and where. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from potstill.config import Config


class CaptureConfig(Config):
    """The cache that `potstill capture` writes."""

    path: Annotated[str, Field(min_length=1)]
    """A folder, or any path that fsspec knows (s3://..., memory://...)."""
    outcomes: Literal["top_k", "sampled", "top_k_sampled", "hidden", "projected"] = "top_k"
    """The K most probable tokens and the mass of the rest; random tokens; the K most probable and random ones of the rest; the
    last hidden rows, exact; or the probabilities projected on the student's frozen head, exact for forward KL."""
    k: Annotated[int, Field(ge=1)] = 64
    """Tokens kept at each position."""
    num_samples: Annotated[int, Field(ge=1, le=127)] = 50
    """Tokens drawn at each position."""
    proposal_exponent: Annotated[float, Field(gt=0)] = 1.0
    """Draws come from the teacher's probabilities raised to this power and made to add up to 1; the weights undo it."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the teacher's logits before the softmax that is recorded; a run that trains at it needs the same."""
    precision: Literal["quantised", "exact"] | None = None
    """Of log-probabilities: quantised to under 1e-4 nats of divergence, or float32. Unset: exact where k is the whole vocabulary."""
    batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """Tokens that the teacher reads at once, padding included."""
    shard_mib: Annotated[int, Field(ge=1, le=4096)] = 64
    """The largest shard."""
    commit_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Answers are committed at least this often: what a killed capture asks again at most."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self):
        fields = type(self).model_fields
        idle = {
            "k": "top_k" not in self.outcomes, "num_samples": "sampled" not in self.outcomes,
            "proposal_exponent": "sampled" not in self.outcomes, "precision": self.outcomes != "top_k",
            "temperature": self.outcomes == "hidden",
        }  # fmt: skip
        for name, has_none in idle.items():
            if has_none and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: {self.outcomes} outcomes do not use it; leave it out")
        return self
