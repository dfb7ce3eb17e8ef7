"""Captures on a Ray cluster: units of work go through Ray Data's map_batches to actors that load the teacher once and commit by themselves.

The unit of work is the one of every other way to capture. Ray is an extra and is imported only here, only when it is asked for.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from potstill.batch import Example
from potstill.cache.codec import make_codec
from potstill.cache.provenance import Provenance
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheWriter
from potstill.capture.capture import CaptureSummary, Work
from potstill.capture.config import CaptureConfig
from potstill.capture.disk import predicted_bytes, require_room
from potstill.capture.units import Scorer, Unit, units
from potstill.errors import PotstillError, UsageError
from potstill.head import Head
from potstill.teachers.teacher import Teacher, confirm


def require_ray() -> None:
    """Raises UsageError, before anything is loaded, where Ray is not installed."""
    if find_spec("ray") is None:
        raise UsageError("--engine ray: Ray is not installed; pip install 'potstill[ray]', or leave the engine out")


@dataclass(frozen=True)
class RayCapture:
    """What an actor needs to make its teacher and its writer; Ray carries it to other machines.

    `make_teacher` is called once in each actor, with the actor's device; it must find its weights there.
    """

    make_teacher: Callable[[str], Teacher]
    provenance: Provenance
    format: RecordFormat
    config: CaptureConfig
    seed: int
    pad_token: int
    widest: int
    extra_files: Mapping[str, bytes]
    project_on: Head | None = None


class UnitActor:
    """One actor of the pool. Each call answers units and commits them: what Ray asks again, after a machine is lost, is what was not."""

    def __init__(self, job: RayCapture):
        import ray  # pyright: ignore[reportMissingImports]
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._scorer = Scorer(
            job.make_teacher(device), job.format, job.seed, job.pad_token, job.widest, device, job.project_on
        )
        self._codec = make_codec(job.format)
        self._writer = CacheWriter(
            job.config.path, job.provenance, job.format, writer=f"ray-{ray.get_runtime_context().get_actor_id()}",
            shard_bytes=job.config.shard_mib * 2**20, extra_files=job.extra_files,
        )  # fmt: skip

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Counts of what was done, one row a unit."""
        counts = [self._unit(*unit) for unit in zip(*(batch[name] for name in _COLUMNS), strict=True)]
        self._writer.commit()
        return {name: np.array([count[name] for count in counts], dtype=np.int64) for name in ("sequences", "rows", "tokens", "bytes")}

    def _unit(self, *unit: Any) -> dict[str, int]:
        rows, lengths, written = _rows(*unit), unit[2], 0
        answers = self._scorer(rows)
        confirm(self._scorer.teacher)
        for answer in answers:
            payload = self._codec.encode(answer.record)
            self._writer.add(answer.key, answer.rows, payload)
            written += len(payload)
        return {"sequences": len(rows), "rows": sum(answer.rows for answer in answers), "tokens": int(np.sum(lengths)), "bytes": written}


_COLUMNS = ("tokens", "marks", "lengths", "origins", "routes")


def _rows(tokens: np.ndarray, marks: np.ndarray, lengths: np.ndarray, origins: Sequence[str], routes: Sequence[str]) -> list[list[Example]]:
    """What `_item` was made of, an example a row."""
    ends = np.cumsum(lengths).tolist()
    return [
        [Example(
            np.asarray(tokens[end - length : end]).tolist(), np.asarray(marks[end - length : end]).astype(bool).tolist(), number,
            str(origins[number]), str(routes[number]),
        )]
        for number, (end, length) in enumerate(zip(ends, np.asarray(lengths).tolist(), strict=True))
    ]  # fmt: skip


def _item(work: Work, unit: Unit) -> dict[str, Any]:
    """A unit as plain arrays: an actor on another machine knows nothing of the data's files."""
    examples = [example for row in work.sequences.examples(unit) for example in row]
    return {
        "tokens": np.array([token for example in examples for token in example.tokens], dtype=np.int32),
        "marks": np.array([mark for example in examples for mark in example.is_target], dtype=np.int8),
        "lengths": np.array([len(example.tokens) for example in examples], dtype=np.int32),
        "origins": [example.origin for example in examples], "routes": [example.route for example in examples],
    }


def capture_with_ray(job: RayCapture, work: Work, *, actors: int | None = None, quiet: bool = False) -> CaptureSummary:
    """Does what is left of a capture on the cluster that Ray finds, or on this machine. `actors` is the size of the pool.

    A GPU goes to each actor where the cluster has any. Raises UsageError without Ray, StorageError where the disk cannot hold it.
    """
    require_ray()
    require_room(job.config.path, predicted_bytes(job.format, work.rows, len(work.sequences)))
    if not len(work.sequences):
        return CaptureSummary(found_sequences=work.found_sequences)
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    if not ray.is_initialized():
        ray.init(log_to_driver=not quiet, include_dashboard=False, configure_logging=not quiet)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    size = actors or max(1, gpus or int(resources.get("CPU", 1)))
    planned = units(work.sequences.lengths, job.config.batch_tokens)
    ray.data.DataContext.get_current().enable_progress_bars = not quiet and sys.stderr.isatty()
    began = time.monotonic()
    done = ray.data.from_items([_item(work, unit) for unit in planned]).map_batches(
        UnitActor, batch_size=1, compute=ray.data.ActorPoolStrategy(size=min(size, len(planned))), fn_constructor_args=(job,),
        num_gpus=1 if gpus else 0,
    )  # fmt: skip
    summary = CaptureSummary(found_sequences=work.found_sequences)
    try:
        for row in done.iter_rows():
            summary = replace(
                summary, sequences=summary.sequences + int(row["sequences"]), rows=summary.rows + int(row["rows"]),
                tokens=summary.tokens + int(row["tokens"]), payload_bytes=summary.payload_bytes + int(row["bytes"]),
            )  # fmt: skip
    except ray.exceptions.RayError as error:
        words = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise PotstillError(
            f"--engine ray: {words[-1] if words else type(error).__name__}; what was committed stays; start again for the rest"
        ) from error
    return replace(summary, seconds=time.monotonic() - began)
