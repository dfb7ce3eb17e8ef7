"""Whether the hub can be asked at all, so that a machine without a network hears it at once and not after five retries."""

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from huggingface_hub import constants, try_to_load_from_cache

from potstill.errors import ModelError

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@lru_cache
def hub_is_reachable() -> bool:
    """False where the client is told to stay offline, or where the hub's name does not resolve and no proxy is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True  # the proxy resolves names
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


def require_on_hub(name: str, file: str, revision: str | None) -> bool:
    """Whether to look into the cache alone. Raises ModelError where that is so and `file` of the repository `name` is not there."""
    if hub_is_reachable():
        return False
    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:
        cached = None  # not a name that a repository can have
    if not isinstance(cached, str):
        raise ModelError(
            f"{name}: neither a folder here nor a model that the hub gives: there is no network (or HF_HUB_OFFLINE is set), "
            "and it is not in the cache; download it where there is one, or name a folder"
        )
    return True
