"""The strict, frozen base of every configuration: an unknown key is an error, and nothing changes after reading."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of the configurations that a recipe holds. Durations, counts and paths are validated where they are declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, use_attribute_docstrings=True)
