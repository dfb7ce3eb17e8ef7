"""What a run states about its surroundings: versions, platform, threads; and how secrets are kept out of everything written.

The process environment is never written. It is read for one purpose: to blank the values that look like credentials. Secrets that
come from elsewhere are made known by whoever reads them.
"""

import logging
import os
import platform
import re
import sys
from importlib import metadata
from typing import Any
from urllib.parse import quote

_PACKAGES = (
    "potstill", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy", "bitsandbytes",
)  # fmt: skip
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,})\b")
_SHORTEST_SECRET = 8  # shorter values ("1", "true") would blank innocent text
_SHORTEST_KNOWN = 4    # of a value that is known to be a secret
HIDDEN = "***"
_known: set[str] = set()


def keep_secret(value: str) -> None:
    """From now on `value`, plain or percent-encoded, is blanked wherever a text is redacted."""
    _known.update(text for text in (value, quote(value, safe="")) if len(text) >= _SHORTEST_KNOWN)


def _secrets() -> list[str]:
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_SECRET}
    # A variable that names a file or a folder (SSH_AUTH_SOCK, GOOGLE_APPLICATION_CREDENTIALS) holds no secret itself.
    return sorted({value for value in values if not value.startswith("/")} | _known, key=len, reverse=True)


def redact_text(text: str) -> str:
    """`text` without URL user names and passwords, access tokens, and values of environment variables that hold credentials."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, _USERINFO.sub(HIDDEN + "@", text))


def redact(value: Any) -> Any:
    """The same for every string inside lists and mappings; other values are returned as they are."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, dict):
        return {key: redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def quiet_libraries() -> None:
    """The libraries' own progress bars and notes stand in the way of ours; their warnings and errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions, platform, threads and devices. Devices and threads are stated only where torch is already imported."""
    torch = sys.modules.get("torch")
    versions = {package: _version(package) for package in _PACKAGES}
    stated: dict[str, Any] = {
        "versions": {package: version for package, version in versions.items() if version},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": redact([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if torch is not None:
        stated["threads"] = torch.get_num_threads()
        stated["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return stated
