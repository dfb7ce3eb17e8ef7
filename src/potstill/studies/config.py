"""What a study file says: a base recipe, what its cells change, which seeds, and how the students are measured.

Imports neither torch nor transformers, so a study is read in no time. What a cell's recipe may say is the recipe's own affair.
"""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from potstill.capture.config import CaptureConfig
from potstill.config import Config
from potstill.evaluation.config import MeasuringConfig

SFT = "sft"
"""The name of the twin without a teacher, and of comparing each cell with its own."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_OF_THE_STUDY = ("run.folder", "run.seed")

Overrides = dict[str, Any]
Bundles = dict[str, Overrides]


class BeforeConfig(Config):
    """A run that cells need, such as a teacher that is tuned first."""

    recipe: Annotated[str, Field(min_length=1)] | dict[str, Any] | None = None
    """A recipe of the library, a file, or the recipe itself; by default the study's base."""
    set: Overrides = Field(default_factory=dict)
    """Keys of the recipe that are set here, as in `training.steps: 200`."""

    @field_validator("set")
    @classmethod
    def _keys_of_a_recipe(cls, given: Overrides) -> Overrides:
        return refuse_own_keys(given)


class SharedCaptureConfig(CaptureConfig):
    """What is recorded of the teachers, once, for all cells whose objective needs no more."""

    path: Annotated[str, Field(min_length=1)] = "caches"
    """Where the caches go; a relative path lies in the study's folder."""


class StudyConfig(Config):
    """Runs that differ in what `grid` says, each with every seed, beside their twins without a teacher."""

    title: Annotated[str, Field(min_length=1)]
    """What the study asks."""
    published: str | None = None
    """What is known of it from elsewhere, with its source: shown beside the result."""
    base: Annotated[str, Field(min_length=1)] | dict[str, Any]
    """A recipe of the library, a file, or the recipe itself."""
    set: Overrides = Field(default_factory=dict)
    """Keys of the recipe that are set for every cell, as in `training.steps: 200`."""
    before: dict[str, BeforeConfig] = Field(default_factory=dict)
    """Runs that must exist first, in this order. `{NAME}` in a cell, a later run of this list or the evaluation is the student of one;
    `{NAME.adapter}` its adapter, `{NAME.run}` its folder."""
    grid: dict[str, list[Any] | Bundles] = Field(default_factory=dict)
    """The axes: a key of the recipe with its values, or any name with bundles of keys by name. A cell takes one of each."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Every cell is trained with each: initial weights where they are random, the order of the data, dropout."""
    baseline: Annotated[str, Field(min_length=1)] = SFT
    """sft: each cell is compared with its own twin without a teacher. Otherwise the name of the cell that all are compared with."""
    capture: SharedCaptureConfig | None = None
    """Record the teachers' answers once, for the cells whose support the record serves; unset: teachers are asked live."""
    evaluation: MeasuringConfig | None = None
    """How the students are measured when all have been trained; null measures nothing."""
    folder: Annotated[str, Field(min_length=1)]
    """Everything that the study writes goes here."""

    @field_validator("set")
    @classmethod
    def _keys_of_a_recipe(cls, given: Overrides) -> Overrides:
        return refuse_own_keys(given)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, given: list[int]) -> list[int]:
        twice = sorted({seed for seed in given if given.count(seed) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands twice; each seed counts once")
        return given

    @model_validator(mode="after")
    def _names_can_be_used(self):
        for axis, values in self.grid.items():
            if not values:
                raise ValueError(f"grid.{axis}: has no values; name some, or leave the axis out")
            if isinstance(values, dict):
                for name, bundle in values.items():
                    _refuse_name(f"grid.{axis}", name)
                    refuse_own_keys(bundle)
            else:
                refuse_own_keys({axis: values})
        for name in self.before:
            _refuse_name("before", name)
        return self


def _refuse_name(key: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{key}: the name {name!r} becomes part of a folder's: letters, digits and . _ + - alone")


def refuse_own_keys(given: Overrides) -> Overrides:
    """`given` as it is. Raises ValueError for a key that the study itself sets in every recipe."""
    for key in given:
        if key in _OF_THE_STUDY or key == "run":
            raise ValueError(f"{key}: the study gives every run its folder and its seed (seeds: [0, 1, 2]); leave it out")
    return given
