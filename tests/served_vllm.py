"""A real vLLM server as a process on loopback, for tests that are marked vllm. Knows no test."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
LONGEST, MOST_LOGPROBS, START_SECONDS = 256, 64, 600


def require_vllm() -> None:
    if not PYTHON.exists():
        pytest.skip(f"no vLLM at {PYTHON}; `make vllm` installs it")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return taken.getsockname()[1]


class VllmServer:
    """One server process and its children; further `flags` of the command line and `settings` of its environment."""

    def __init__(self, model: Path, log: Path, port: int, *flags: str, **settings: str):
        self.url = f"http://127.0.0.1:{port}"
        settings = {
            "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
            "VLLM_TARGET_DEVICE": "cpu", **settings,
        }  # fmt: skip
        command = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(LONGEST), "--enforce-eager",
            "--max-num-seqs", "8", "--max-logprobs", str(MOST_LOGPROBS), *flags,
        ]  # fmt: skip
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> "VllmServer":
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + "/v1/models", timeout=5).read()
                return self
            except OSError:
                time.sleep(0.5)
        self.kill()
        raise AssertionError("vLLM did not start:\n" + self.log.read_text()[-3000:])

    def kill(self) -> None:
        """At once, with its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
