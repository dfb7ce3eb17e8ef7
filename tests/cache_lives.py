"""Imports once, then forks one writer of answers after another; each may be killed from outside while it works.

Reads one JSON request a line: the cache, the log of asked answers, and after how many seconds to kill (null: never). The teacher is a
function of the key; every question to it is a line in the log, written before the answer exists. Answers with what became of the child.
"""

import json
import os
import random
import signal
import sys
import time

from potstill import storage
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheWriter

RECORDS, WINDOW, SHARD = 150, 5, 30_000
PROVENANCE, FORMAT = Provenance({"teacher weights": "aa"}), RecordFormat("top_k", 100, k=8)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def answer(number: int) -> tuple[int, bytes]:
    return number % 50, random.Random(number).randbytes(10 * (number % 50))


def capture(path: str, log: str) -> None:
    asked = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with CacheWriter(path, PROVENANCE, FORMAT, shard_bytes=SHARD) as writer:
        left = [number for number in range(RECORDS) if not writer.has(key(number))]
        for first in range(0, len(left), WINDOW):
            for number in left[first : first + WINDOW]:
                os.write(asked, f"{number}\n".encode())
                writer.add(key(number), *answer(number))
            writer.commit()


def serve() -> None:
    # What is synced survives a kill anyway; only power loss needs it, and test_cache_crash.py has that.
    storage.OPERATIONS.fsync = lambda descriptor: None
    storage.OPERATIONS.sync_folder = lambda path: None
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                capture(request["path"], request["log"])
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, time.monotonic() - began]), flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    serve()
