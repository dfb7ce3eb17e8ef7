"""Which teacher a recipe names. Imports neither torch nor transformers."""

from typing import Literal

from potstill.models.config import LoadingConfig


class LocalTeacherConfig(LoadingConfig):
    """A teacher in this process, quantised or with an adapter where the recipe says so."""

    kind: Literal["local"] = "local"
    """A model in this process."""
    sharded: bool = False
    """Spread its parameters over the ranks (FSDP2) instead of one copy on each."""
