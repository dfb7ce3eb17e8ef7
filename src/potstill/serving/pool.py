"""How often, how many at once and for how long a server is asked: retries, back-off, 429, outages. Knows nothing of what is asked.

A failure of the server is waited out, for `max_outage_seconds` without any success; a failure of one request alone is not.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from potstill.errors import OutageError
from potstill.serving.endpoint import Busy, Unanswered, Unbelievable
from potstill.serving.service import Service

T = TypeVar("T")
_log = logging.getLogger("potstill")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_LONGEST_BUSY_PAUSE = 10.0
_LAST_TRY = 1.0        # seconds of the try that ends an outage, or patience
# A request that fails so often while others are answered is itself what is wrong; so is an answer that is never believable.
_OWN_FAILURES = 10
_BAD_ANSWERS = 4
# From so many failures of one request on, something else is asked to tell the two cases apart, for so many seconds.
_FAILURES_TO_LOOK, _LOOK_SECONDS = 3, 10.0


def pause(failures: int) -> float:
    """Exponential, and anywhere in its upper half, so that many clients do not come back in step."""
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(failures, 30)) * random.uniform(0.5, 1.0)


class Gate:
    """How many requests are under way: halved by a 429, grown again by one for each round of answers."""

    def __init__(self, most: int):
        self.most, self.allowed, self.under_way = most, float(most), 0
        self._opens = 0.0
        self._waiting: list[asyncio.Future[None]] = []

    async def enter(self) -> None:
        while True:
            closed = self._opens - time.monotonic()
            if closed > 0:
                await asyncio.sleep(closed)
            elif self.under_way >= int(self.allowed):
                self._waiting.append(asyncio.get_running_loop().create_future())
                await self._waiting[-1]
            else:
                self.under_way += 1
                return

    def leave(self) -> None:
        self.under_way -= 1
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def shrink(self, wait: float) -> None:
        now = time.monotonic()
        if now >= self._opens:  # one wave of refusals counts once
            self.allowed = max(1.0, self.allowed / 2)
        self._opens = max(self._opens, now + wait)

    def grow(self) -> None:
        self.allowed = min(float(self.most), self.allowed + 1 / self.allowed)


class Pool:
    """Asks one server on one event loop."""

    def __init__(self, service: Service, name: str, another: Callable[[float], Awaitable[object]]):
        """`another(seconds)` asks for something that a server in order answers."""
        self._service, self._name, self.another = service, name, another
        self._gate = Gate(service.concurrency)
        self._down_since: float | None = None
        self._answered = 0
        self.failures = 0
        """Requests so far that were not answered: a server may have been started again meanwhile."""

    async def ask(self, attempt: Callable[[float], Awaitable[T]]) -> T:
        """What `attempt(seconds)` returns at last. Raises OutageError, and the service's refusal for what no patience mends."""
        failures = busy = bad = own = 0
        answered = self._answered
        while True:
            await self._gate.enter()
            began = time.monotonic()
            try:
                result = await attempt(min(self._service.request_seconds, max(self._left(), _LAST_TRY)))
            except Busy as error:
                self._failed(began, error)
                self._gate.shrink(min(pause(busy), _LONGEST_BUSY_PAUSE, self._left()) if error.wait is None else error.wait)
                busy += 1
                continue
            except Unanswered as error:
                own += self._answered > answered
                answered = self._answered
                if own >= _OWN_FAILURES:
                    raise self._service.refusal(
                        f"{self._name}: one request failed {own} times while others were answered: {error}; {self._service.if_one_fails}"
                    ) from None
                self._failed(began, error)
                wait = pause(failures) if error.wait is None else error.wait
                failures += 1
                if failures >= _FAILURES_TO_LOOK and self._answered == answered:
                    await self._look()
            except Unbelievable as error:
                bad += 1
                if bad >= _BAD_ANSWERS:
                    raise self._service.refusal(
                        f"{self._name}: {bad} answers to one request cannot be believed: {error}; {self._service.if_unbelievable}"
                    ) from None
                wait = pause(bad - 1)
            else:
                self._succeeded()
                return result
            finally:
                self._gate.leave()
            await asyncio.sleep(min(wait, self._left()))

    async def _look(self) -> None:
        """Asks for something else, once: where that is answered the server is there."""
        with suppress(Unanswered, Unbelievable):
            await self.another(min(self._service.request_seconds, _LOOK_SECONDS, max(self._left(), _LAST_TRY)))
            self._succeeded()

    def _left(self) -> float:
        """Seconds until patience ends."""
        if self._down_since is None:
            return math.inf
        return max(self._down_since + self._service.max_outage_seconds - time.monotonic(), 0.0)

    def _failed(self, began: float, error: Unanswered) -> None:
        """Notes a failure of a request that began then. Raises OutageError where waiting is no use any more."""
        limit = self._service.max_outage_seconds
        self.failures += 1
        if self._down_since is None:
            _log.warning(f"{self._name} does not answer ({error}); asking again for at most {limit:g} s")
            self._down_since = began
        self._down_since = min(self._down_since, began)
        gone = time.monotonic() - self._down_since
        if gone >= limit or gone + (error.wait or 0.0) > limit:
            asks = f" and asks to wait {error.wait:.0f} s more" if error.wait and gone < limit else ""
            raise OutageError(
                f"{self._name} has not answered for {gone:.1f} s{asks} ({self._service.section}.max_outage_seconds: {limit:g}); the last "
                f"failure: {error}. Everything committed stays: run the same command again to go on"
            ) from None

    def _succeeded(self) -> None:
        if self._down_since is not None:
            _log.warning(f"{self._name} answers again after {time.monotonic() - self._down_since:.1f} s")
        self._down_since = None
        self._answered += 1
        self._gate.grow()
