"""From a teacher to a student through a cache, killed in both halves: the same records, and a student of the same bits."""

import hashlib
import signal
from pathlib import Path

import pytest

from command_runs import ROWS, Server, write_recipe
from potstill.cache.store import CacheReader


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole-path")
    write_recipe(folder)
    server = Server(folder)
    yield server
    server.close()


def capture(server: Server, name: str, **moment) -> int:
    section = f"capture={{path: {server.folder}/{name}, k: 64, batch_tokens: 256, commit_seconds: 0.001}}"
    return server.command(server.folder / name, ["capture", str(server.folder / "recipe.yaml"), section, "--quiet"], **moment)


def from_cache(server: Server, name: str) -> str:
    return f"teacher={{kind: cache, path: {server.folder}/{name}}}"


def student(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def unbroken(server) -> str:
    """The student of a capture and a run that nothing disturbed."""
    assert capture(server, "unbroken-cache") == 0, server.log(server.folder / "unbroken-cache").read_text()
    server.finish(server.folder / "unbroken", from_cache(server, "unbroken-cache"))
    return student(server.folder / "unbroken")


SLOW = [pytest.param(*moment, marks=pytest.mark.slow) for moment in ((12, 3), (40, 14))]


@pytest.mark.parametrize(("operation", "micro_batch"), [(25, 9), *SLOW])
def test_killed_in_both_halves_the_student_has_the_same_bits(server, unbroken, operation, micro_batch):
    name = f"cache-{operation}"
    assert capture(server, name, at="operation", number=operation) == -signal.SIGKILL
    assert capture(server, name) == 0, server.log(server.folder / name).read_text()
    assert len(CacheReader(str(server.folder / name))) == ROWS
    run = server.folder / f"run-{operation}"
    assert server.run(run, from_cache(server, name), at="micro_batch", number=micro_batch) == -signal.SIGKILL
    assert "resuming at step" in server.finish(run, from_cache(server, name)) or micro_batch < 8
    assert student(run) == unbroken


def test_a_capture_listens_on_no_socket(server):
    assert capture(server, "deaf-cache", at="operation", number=20, action="say_sockets") == 0
    assert "listening on []" in server.log(server.folder / "deaf-cache").read_text()
