"""What several ranks do in one launch of torchrun: whole runs, one after the other, whose weights the first rank leaves behind.

Started by test_ranks.py as `torchrun ... ranks_worker.py FOLDER`; the runs stand in ranks_plan.py, for one process runs them too.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file

from potstill.errors import PotstillError
from potstill.rollouts.local import LocalGenerator
from potstill.training import seam
from potstill.training.seam import DistillationTrainer
from ranks_plan import EQUAL, FAULTS, NARROW, RESUMED, Fault
from small_runs import Run, execute, weights

RANK = int(os.environ["RANK"])


def leave(folder: Path, name: str, distiller, facts: dict) -> None:
    tensors = weights(distiller)
    if RANK == 0:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}-{RANK}.json").write_text(json.dumps(facts))


def listening() -> list[str]:
    """Addresses on which this process listens, as /proc writes them."""
    mine = {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink() and entry.exists()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1].rsplit(":", 1)[0])
    return found


def run_whole(folder: Path, name: str, run: Run) -> None:
    distiller, summary = execute(run, folder / name, writer=RANK == 0)
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in distiller.parameters())
    leave(folder, name, distiller, {"sharded": sharded, "best_loss": summary.best_loss, "listening": listening()})


def run_fault(folder: Path, name: str, fault: Fault) -> None:
    """Something goes wrong on rank 1 alone; every rank must end the same way, with the same weights."""
    step_of, guard = DistillationTrainer.training_step, DistillationTrainer.refuse_non_finite
    token_of, tokens = LocalGenerator._step, 0
    calls = 0

    def injected(trainer, model, inputs, count=None):
        nonlocal calls
        calls += 1
        if RANK == 1 and calls == fault.turn:
            if fault.kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif fault.kind == "loss":
                with torch.no_grad():
                    trainer.measures.add(*[torch.tensor(float("nan"))] * 3)
        return step_of(trainer, model, inputs, count)

    def at_token(generator):
        nonlocal tokens
        tokens += 1
        if RANK == 1 and fault.kind == "signal_at_token" and tokens == fault.turn:
            os.kill(os.getpid(), signal.SIGTERM)
        token_of(generator)

    def before(trainer):
        if RANK == 1 and fault.kind == "gradient" and trainer.state.global_step == fault.turn:
            trainer.grad_norm = float("inf")
        guard(trainer)

    seam.DistillationTrainer.training_step, seam.DistillationTrainer.refuse_non_finite = injected, before
    LocalGenerator._step = at_token
    from small_runs import make_distiller

    distiller = make_distiller(fault.run)
    facts = {}
    try:
        _, summary = execute(fault.run, folder / name, distiller=distiller, writer=RANK == 0)
        facts = {"skipped": summary.non_finite_steps}
    except PotstillError as error:
        facts = {"error": type(error).__name__, "exit_code": error.exit_code, "message": str(error)}
    finally:
        seam.DistillationTrainer.training_step, seam.DistillationTrainer.refuse_non_finite = step_of, guard
        LocalGenerator._step = token_of
    leave(folder, name, distiller, facts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    for label, plan in (EQUAL | NARROW | RESUMED).items():
        run_whole(where, label, plan)
    for label, trouble in FAULTS.items():
        run_fault(where, label, trouble)
