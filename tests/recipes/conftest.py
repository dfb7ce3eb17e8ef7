"""What tests of whole runs through the command line begin from."""

from pathlib import Path

import pytest

from small_recipe import write_small_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with `r.yaml`, its models and its rows."""
    return write_small_recipe(tmp_path_factory.mktemp("runs"))
