"""Imports torch once, then lives through one capture after another in forked children, each killed where or when it is told.

Reads one JSON request a line and answers with the exit statuses of its children; see tests/faults/test_capture_kill.py.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from potstill import storage
from potstill.cache.store import CacheWriter
from potstill.capture.recording import Recorder
from potstill.capture.units import Scorer, Share
from potstill.errors import PotstillError
from small_captures import example_set, make_format, make_teacher, run_capture

torch.set_num_threads(1)
FORMAT = make_format("top_k_sampled", exact=True)
SETS = [example_set(30), example_set(12, seed=1)]
BATCH_TOKENS = 128


def _at(number: int, act):
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == number:
            act()

    return reached


def _wrap(holder, name: str, before) -> None:
    inner = getattr(holder, name)

    def wrapped(*arguments, **named):
        before()
        return inner(*arguments, **named)

    setattr(holder, name, wrapped)


def arm(request: dict) -> None:
    """Kills itself at the n-th passage through a point."""
    reached = _at(request["number"], lambda: os.kill(os.getpid(), request.get("signal", signal.SIGKILL)))
    point = request["at"]
    if point == "ask":
        _wrap(Scorer, "__call__", reached)
    elif point == "put":
        _wrap(Recorder, "put", reached)
    elif point == "commit":
        _wrap(CacheWriter, "commit", reached)
    elif point == "operation":
        for name in ("create", "append", "write", "rename", "unlink", "mkdir", "sync_folder"):
            _wrap(storage.OPERATIONS, name, reached)
    else:
        raise ValueError(point)


def live(request: dict, rank: int, ranks: int) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # What is synced survives a kill anyway; only power loss needs it, and the store's own tests have that.
    storage.OPERATIONS.fsync = lambda descriptor: None
    storage.OPERATIONS.sync_folder = lambda path: None
    if request.get("at"):
        arm(request)
    if request.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    share = Share(*request.get("share", (0, 1)))
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{request['log']}.group", rank=rank, world_size=ranks)
        share = share.split(torch.distributed.get_rank(), torch.distributed.get_world_size())
    settings = {"batch_tokens": BATCH_TOKENS, "commit_seconds": request.get("commit_seconds", 1e-6)}
    summary = run_capture(
        request["path"], SETS, format=FORMAT, teacher=make_teacher(Path(request["counter"])), share=share, config=settings, quiet=False
    )
    print(json.dumps({"redone_rows": summary.redone_rows, "rows": summary.rows, "in_flight": summary.most_in_flight}), flush=True)


def child_of(request: dict, rank: int, ranks: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        live(request, rank, ranks)
    except PotstillError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException as error:
        print(f"traceback: {error!r}", file=sys.stderr, flush=True)
        code = 99
    os._exit(code)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        ranks = request.get("ranks", 1)
        children = [child_of(request, rank, ranks) for rank in range(ranks)]
        if "seconds" in request:
            time.sleep(request["seconds"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    make_teacher()  # imports what is imported late, once for all children
    print("ready", flush=True)
    serve()
