"""Imports torch once, then runs the real command line in one forked child after another and lets each be killed where it is told.

Reads one JSON request a line: {"arguments": [...], "at": <point> or null, "number": n, "signal": s, "log": file}; answers with the
exit status as a shell would give it. Points are moments of a run, counted from 1 within the child.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch

from potstill import cli, storage
from potstill.recipes import assemble
from potstill.training import checkpoint, saving, seam

torch.set_num_threads(1)


def _wrap(holder, name: str, before) -> None:
    inner = getattr(holder, name)

    def wrapped(*arguments, **named):
        before()
        return inner(*arguments, **named)

    setattr(holder, name, wrapped)


def _counter(number: int, signal_number: int):
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal_number)

    return reached


def arm(point: str, number: int, signal_number: int) -> None:
    """Sends the signal at the n-th passage through a point; everything between two points of the same kind is run as it is."""
    reached = _counter(number, signal_number)
    if point == "micro_batch":
        _wrap(seam.DistillationTrainer, "training_step", reached)
    elif point == "step_done":
        _wrap(seam.DistillationTrainer, "step_done", reached)
    elif point == "evaluation":
        _wrap(seam.DistillationTrainer, "answer", lambda: reached() if not torch.is_grad_enabled() else None)
    elif point == "commit":
        _wrap(checkpoint, "save_checkpoint", reached)
    elif point == "restore":
        _wrap(saving.Saver, "restore", reached)
    elif point == "export":
        _wrap(assemble, "export_student", reached)
    elif point == "operation":  # a primitive operation of storage, wherever it happens
        for name in ("create", "write", "fsync", "rename", "unlink", "mkdir", "sync_folder"):
            _wrap(storage.OPERATIONS, name, reached)
    else:
        raise ValueError(point)


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            # What is synced survives a kill anyway; only power loss needs it, and test_crash.py has that.
            storage.OPERATIONS.fsync = lambda descriptor: None
            storage.OPERATIONS.sync_folder = lambda path: None
            if request["at"]:
                arm(request["at"], request["number"], request["signal"])
            try:
                cli.main(request["arguments"])
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else 1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    print("ready", flush=True)
    serve()
