"""Imports torch once, then runs the real command line in one forked child after another and lets each be killed where it is told.

Reads one JSON request a line (see command_runs.Server.run) and answers with the exit status. Points are moments of a run, counted
from 1 within the child; what is done there is a signal to itself or one of ACTIONS.
"""

import json
import os
import resource
import shutil
import sys

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch

from potstill import cli, storage
from potstill.recipes import assemble
from potstill.rollouts import local
from potstill.training import checkpoint, saving, seam

torch.set_num_threads(1)


def _wrap(holder, name: str, before) -> None:
    inner = getattr(holder, name)

    def wrapped(*arguments, **named):
        before()
        return inner(*arguments, **named)

    setattr(holder, name, wrapped)


def listening_sockets() -> list[str]:
    """Local addresses on which this process listens."""
    mine = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
    rows = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}").read().splitlines()[1:]]  # noqa: SIM115
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


ACTIONS = {
    "vanish": lambda request: shutil.rmtree(request["run"]),
    "say_sockets": lambda request: print("listening on", listening_sockets(), flush=True),
}


def _counter(number: int, act):
    count = 0

    def reached() -> None:
        nonlocal count
        count += 1
        if count == number:
            act()

    return reached


def arm(request: dict) -> None:
    """Acts at the n-th passage through a point; everything else is run as it is."""
    point, action = request["at"], request["action"]
    act = (lambda: ACTIONS[action](request)) if action in ACTIONS else (lambda: os.kill(os.getpid(), action))
    reached = _counter(request["number"], act)
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
    elif point == "drawing":  # a token of text that a model writes here
        _wrap(local, "draw", reached)
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
                arm(request)
            if request["file_bytes"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
            os.environ.update(request["environment"])
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
