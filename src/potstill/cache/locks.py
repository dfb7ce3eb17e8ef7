"""Who may write a cache: one writer of each name, and one maker of its description at a time. An object store knows no locks."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from potstill.errors import CacheError, RunFolderError
from potstill.place import Place

_CREATION_SECONDS = 60.0  # the ranks of one capture start together, and each waits for those before it


@contextmanager
def writer_lock(place: Place, writer: str) -> Iterator[None]:
    """Raises CacheError at once where a writer of this name is at work."""
    with ExitStack() as stack:
        try:
            stack.enter_context(place.lock(f".lock-{writer}", held=f"another writer {writer} is at work here", remedy="or stop it"))
        except RunFolderError as error:
            raise CacheError(str(error)) from error
        yield


@contextmanager
def creation_lock(place: Place) -> Iterator[None]:
    """Waits for others that make or compare the same description."""
    deadline = time.monotonic() + _CREATION_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(place.lock(".lock-creation", held="another writer is making this cache", remedy="or stop it"))
                break
            except RunFolderError as error:
                if time.monotonic() > deadline:
                    raise CacheError(str(error)) from error
                time.sleep(0.02)
        yield
