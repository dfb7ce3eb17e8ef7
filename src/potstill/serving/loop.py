"""An event loop on a thread of its own, for callers that are not asynchronous. Waiting for it can be broken off at any moment."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_LOOK_SECONDS = 0.2
_FAREWELL_SECONDS = 5.0


class Loop:
    """Runs coroutines to their end. `check` is called several times a second meanwhile, and may raise."""

    def __init__(self):
        self.check: Callable[[], None] = lambda: None
        self._loop = asyncio.new_event_loop()
        # A daemon: a server that does not answer must not keep a process from leaving.
        self._thread = threading.Thread(target=self._loop.run_forever, name="potstill-server", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, heedless: bool = False) -> T:
        """The result of `work`; where the caller is interrupted, `work` is cancelled and its connections are closed."""
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("what is closed is not asked again")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not wait([future], _LOOK_SECONDS, FIRST_COMPLETED).done:
                if not heedless:
                    self.check()
            return future.result()
        finally:
            future.cancel()

    def close(self, farewell: Coroutine[Any, Any, None]) -> None:
        """Ends what is under way, runs `farewell`, both for a moment at most, and ends the thread. A second time it does nothing."""
        if not self._thread.is_alive():
            farewell.close()
            return
        future = asyncio.run_coroutine_threadsafe(_leave(farewell), self._loop)
        with suppress(Exception):
            future.result(_FAREWELL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_FAREWELL_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _leave(farewell: Coroutine[Any, Any, None]) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await farewell
    await asyncio.sleep(0.01)  # a transport that was told to close does so in one of the next turns


async def together(awaited: Sequence[Awaitable[T]]) -> list[T]:
    """All results, in order; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one) for one in awaited]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
