"""One HTTP exchange with a server: its bytes, or which of four ways it failed. Knows no retries and nothing of what is asked.

The key goes into one header and nowhere else; no redirect is followed, so it goes to no other host.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from potstill.environment import redact_text
from potstill.serving.service import Service, read_key

_CONNECT_SECONDS = 10.0
_KEPT_SECONDS = 4.0   # uvicorn, under vLLM and SGLang, drops a connection that is idle for 5 s
_MOST_WORDS = 500     # characters of a server's own words in a message
_TRY_LATER = {408, 425, *range(500, 600)} - {501, 505}
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


class keeping:
    """Gives the body to an Unbelievable that is raised inside."""

    def __init__(self, body: bytes):
        self._body = body

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Unbelievable) and not error.body:
            error.body = self._body


class _Redacting(logging.Filter):
    """The HTTP library's own log lines may hold headers that a server sends back."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact_text(record.getMessage()), ()
        return True


_redacting = _Redacting()


class Endpoint:
    """A server's address. Used on one event loop."""

    def __init__(self, service: Service):
        self.url = service.url.rstrip("/").removesuffix("/v1")
        self.opened = 0
        """Connections made so far."""
        self._key = read_key(service)
        self._service = service
        self._client: httpx2.AsyncClient | None = None
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_redacting)

    def _connected(self) -> httpx2.AsyncClient:
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._key.reveal()}"} if self._key else {}
            limits = httpx2.Limits(max_keepalive_connections=self._service.concurrency, keepalive_expiry=_KEPT_SECONDS)
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
        """The body of a 200. Raises Unanswered, Busy, Unbelievable, and the service's refusal for what another try would not change."""
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
            raise Unanswered(f"no whole answer within {seconds:.3g} s ({self._service.section}.request_seconds)") from None
        except httpx2.DecodingError as error:
            raise Unbelievable(f"a body that does not unpack ({clean(str(error))})", bytes(received)) from None
        except (httpx2.RemoteProtocolError, httpx2.NetworkError, httpx2.TimeoutException, httpx2.ProxyError) as error:
            raise Unanswered(clean(str(error)) or type(error).__name__) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._service.refusal(f"{self._service.section}.url {self.url}: {clean(str(error)) or type(error).__name__}") from None
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
        address = f"{self._service.section}.url {self.url}{path}"
        if 300 <= status < 400:
            target = clean(response.headers.get("Location", "nowhere"))
            raise self._service.refusal(
                f"{address}: the server sends on to {target} (status {status}); no redirect is followed, so that a key goes to no other "
                f"host: write the address that is meant in {self._service.section}.url"
            )
        hint = self._service.hint(path, status, said)
        refusal = self._service.refusal(f"{address}: the server refuses with status {status}: {said}" + (f"; {hint}" if hint else ""))
        refusal.status = status
        raise refusal

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
