"""Which server is asked, how patiently, and how its failures are put into words: what a recipe's section says, whichever section it is.

The key to it is read here, and shows itself to nobody who does not ask for it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from potstill.environment import HIDDEN, keep_secret
from potstill.errors import ConfigError, ServerError


@dataclass(frozen=True)
class Service:
    """`section` is where the keys stand that messages name; `refusal` is what is raised where asking again would change nothing."""

    section: str
    url: str
    refusal: type[ServerError] = ServerError
    api_key_env: str | None = None
    api_key_file: str | None = None
    concurrency: int = 8
    request_seconds: float = 120.0
    max_outage_seconds: float = 600.0
    hint: Callable[[str, int, str], str] = lambda path, status, said: ""
    """What to do about a refusal: of a path, with a status and the server's own words. Empty where nothing comes to mind."""
    if_one_fails: str = "look into the server's log"
    """What to do where one request fails again and again while others are answered."""
    if_unbelievable: str = "is it the server that is meant?"
    """What to look at where no answer to a request can be believed."""


def refuse_address(url: str, api_key_env: str | None, api_key_file: str | None) -> None:
    """Raises ValueError, for a recipe's section, where the address is none or would show a secret, or where the key has two places."""
    if api_key_env is not None and api_key_file is not None:
        raise ValueError("api_key_file: the key comes from one place: leave out one of api_key_env and api_key_file")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: an address of a server begins with http:// or https://; found {url.split('@')[-1]!r}")
    if "@" in url.split("//", 1)[1].split("/", 1)[0] or "?" in url or "#" in url:
        raise ValueError("url: a name or a key in the address would stand in logs; use api_key_env or api_key_file")


class Secret:
    """A key that shows itself to nobody who does not ask for it."""

    def __init__(self, value: str):
        self._value = value
        keep_secret(value)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return HIDDEN


def read_key(service: Service) -> Secret | None:
    """The key from where the recipe says it is, without blanks around it. Raises ConfigError that names the place and not the key."""
    section = service.section
    if service.api_key_env is not None:
        place, found = f"{section}.api_key_env: the environment variable {service.api_key_env}", os.environ.get(service.api_key_env)
        if found is None:
            raise ConfigError(f"{place} is not set")
    elif service.api_key_file is not None:
        place = f"{section}.api_key_file: {service.api_key_file}"
        try:
            found = Path(service.api_key_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{place} cannot be read ({type(error).__name__})") from None
    else:
        return None
    value = found.strip()
    if not value:
        raise ConfigError(f"{place} is empty")
    if not (value.isascii() and value.isprintable() and " " not in value):
        keep_secret(value)
        raise ConfigError(f"{place} holds a blank, a control character or a letter beyond ASCII inside the key; write the key alone")
    return Secret(value)
