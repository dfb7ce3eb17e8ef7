"""What every test needs: no network, one thread (so that bits repeat), and shape annotations that are checked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Installed before anything of potstill is imported: the annotations of these rooms are then checked at every call.
install_import_hook(["potstill.batch", "potstill.head", "potstill.signals", "potstill.objectives"], "beartype.beartype")

# The same examples in every run: a check either passes or fails for what was changed. HYPOTHESIS_PROFILE=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data and models beside the checkout; a test that wants them skips where they are not."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
