"""One HTTP exchange with a teacher's server: its bytes, or which of four ways it failed. Knows no retries and no log-probabilities.

The key goes into one header and nowhere else; no redirect is followed, so it goes to no other host.
"""

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from potstill.environment import HIDDEN, keep_secret, redact_text
from potstill.errors import ConfigError, TeacherError
from potstill.teachers.config import ServerTeacherConfig

_CONNECT_SECONDS = 10.0
_KEPT_SECONDS = 4.0   # uvicorn, under vLLM and SGLang, drops a connection that is idle for 5 s
_MOST_WORDS = 500     # characters of a server's own words in a message
_TRY_LATER = {408, 425, *range(500, 600)} - {501, 505}
_HINTS = {
    401: "check the key: teacher.api_key_env or teacher.api_key_file",
    403: "check the key: teacher.api_key_env or teacher.api_key_file",
    404: "check teacher.url, teacher.model and teacher.backend",
}
_LOGGERS = ("httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.http2", "httpcore2.proxy", "httpcore2.socks")


class Unanswered(Exception):
    """No answer this time: a lost connection, a silence, a 5xx. `wait` is what the server asks for, in seconds."""

    def __init__(self, words: str, wait: float | None = None):
        super().__init__(words)
        self.wait = wait


class Busy(Unanswered):
    """429: the server asks for fewer requests."""


class Unbelievable(Exception):
    """An answer came and is not one; `body` is what came, as far as it was read."""

    def __init__(self, words: str, body: bytes = b""):
        super().__init__(words)
        self.body = body


class Secret:
    """A key that shows itself to nobody who does not ask for it."""

    def __init__(self, value: str):
        self._value = value
        keep_secret(value)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return HIDDEN


def read_key(config: ServerTeacherConfig) -> Secret | None:
    """The key from where the recipe says it is, without blanks around it. Raises ConfigError that names the place and not the key."""
    if config.api_key_env is not None:
        place, found = f"teacher.api_key_env: the environment variable {config.api_key_env}", os.environ.get(config.api_key_env)
        if found is None:
            raise ConfigError(f"{place} is not set")
    elif config.api_key_file is not None:
        place = f"teacher.api_key_file: {config.api_key_file}"
        try:
            found = Path(config.api_key_file).expanduser().read_text(encoding="utf-8")
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


class _Redacting(logging.Filter):
    """The HTTP library's own log lines may hold headers that a server sends back."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_text(record.getMessage()), ()
        return True


_redacting = _Redacting()


class Endpoint:
    """A server's address. Used on one event loop."""

    def __init__(self, config: ServerTeacherConfig, key: Secret | None):
        self.url = config.url.rstrip("/").removesuffix("/v1")
        self.opened = 0
        """Connections made so far."""
        self._key = key
        self._config = config
        self._client: httpx2.AsyncClient | None = None
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_redacting)

    def _connected(self) -> httpx2.AsyncClient:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else {}
            limits = httpx2.Limits(max_keepalive_connections=self._config.concurrency, keepalive_expiry=_KEPT_SECONDS)
            timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)  # the whole exchange is timed, below
            self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=timeout, follow_redirects=False)
        return self._client

    async def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self.opened += 1

    async def get(self, path: str, *, seconds: float, most_bytes: int) -> bytes:
        return await self._exchange("GET", path, None, seconds, most_bytes)

    async def post(self, path: str, body: Any, *, seconds: float, most_bytes: int) -> bytes:
        return await self._exchange("POST", path, json.dumps(body, separators=(",", ":")).encode(), seconds, most_bytes)

    async def _exchange(self, method: str, path: str, content: bytes | None, seconds: float, most_bytes: int) -> bytes:
        """The body of a 200. Raises Unanswered, Busy, Unbelievable, and TeacherError for what another try would not change."""
        received = bytearray()
        try:
            async with asyncio.timeout(seconds):
                request = self._connected().build_request(
                    method, self.url + path, content=content, headers={"Content-Type": "application/json"} if content else None,
                    extensions={"trace": self._trace},
                )  # fmt: skip
                response = await self._connected().send(request, stream=True)
                try:
                    async for chunk in response.aiter_bytes():
                        received += chunk
                        if len(received) > most_bytes:
                            raise Unbelievable(f"more than {most_bytes:,} bytes", bytes(received))
                finally:
                    await response.aclose()
        except TimeoutError:
            raise Unanswered(f"no whole answer within {seconds:.3g} s (teacher.request_seconds)") from None
        except httpx2.DecodingError as error:
            raise Unbelievable(f"a body that does not unpack ({clean(str(error))})", bytes(received)) from None
        except (httpx2.RemoteProtocolError, httpx2.NetworkError, httpx2.TimeoutException, httpx2.ProxyError) as error:
            raise Unanswered(clean(str(error)) or type(error).__name__) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise TeacherError(f"teacher.url {self.url}: {clean(str(error)) or type(error).__name__}") from None
        self._judge(response, path, bytes(received))
        return bytes(received)

    def _judge(self, response: httpx2.Response, path: str, body: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = words(body) or clean(response.reason_phrase)
        if status == 429:
            raise Busy(f"status 429: {said}", retry_after(response.headers.get("Retry-After")))
        if status in _TRY_LATER:
            raise Unanswered(f"status {status}: {said}", retry_after(response.headers.get("Retry-After")))
        if 200 < status < 300:
            raise Unbelievable(f"status {status} where 200 is meant", body)
        if 300 <= status < 400:
            target = clean(response.headers.get("Location", "nowhere"))
            raise TeacherError(f"teacher.url {self.url}{path}: the server sends on to {target} (status {status}); no redirect is followed, "
                               "so that a key goes to no other host: write the address that is meant in teacher.url")  # fmt: skip
        hint = _HINTS.get(status, "")
        if status in (400, 422) and "logprobs" in said:
            hint = f"lower teacher.top_k ({self._config.top_k}), or start the server with a larger limit (vLLM: --max-logprobs)"
        raise TeacherError(f"teacher.url {self.url}{path}: the server refuses with status {status}: {said}" + (f"; {hint}" if hint else ""))

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def clean(text: str, most: int = _MOST_WORDS) -> str:
    """A stranger's text for a message: redacted whole, then on one line, without control characters, and cut."""
    shown = "".join(letter if letter.isprintable() else " " for letter in redact_text(text))
    shown = " ".join(shown.split())
    return shown if len(shown) <= most else shown[:most] + "..."


def words(body: bytes) -> str:
    """The server's own words of why it refuses: OpenAI's error object, FastAPI's detail, or the text as it stands."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return clean(text)
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return clean(found if isinstance(found, str) else json.dumps(found))


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a number of seconds or an HTTP date; None where neither stands there."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if seconds == seconds and seconds != float("inf") else None
