"""The cluster's engine: refused in words where Ray is not installed, and the same records where it is."""

import importlib.util
import os
import sys
from functools import partial

import numpy as np
import pytest

from potstill.cache.codec import make_codec
from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.capture import ray_engine
from potstill.capture.capture import work_left
from potstill.capture.config import CaptureConfig
from potstill.capture.ray_engine import RayCapture, capture_with_ray
from potstill.capture.units import Scorer, Share, units
from potstill.data.examples import ExampleSetBuilder
from potstill.errors import TeacherError, UsageError
from potstill.teachers.local import LocalTeacher
from small_captures import PROVENANCE, example_set, keys_of, make_format, make_teacher_on, require_same, run_capture

SETS = [example_set(24), example_set(8, seed=1)]


def job(path, counter, format: RecordFormat) -> RayCapture:
    config = CaptureConfig(path=str(path), batch_tokens=128)
    return RayCapture(partial(make_teacher_on, counter=counter), PROVENANCE, format, config, 5, 0, 24, {})


def left(path, format):
    with CacheWriter(str(path), PROVENANCE, format) as writer:
        return work_left(SETS, writer, Share())


def test_without_ray_it_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'potstill\[ray\]'"):
        capture_with_ray(job(tmp_path, None, make_format()), left(tmp_path, make_format()))


def test_a_row_goes_through_ray_with_its_teacher_and_its_place(tmp_path):
    """An ensemble needs the route; a message the row's place."""
    builder = ExampleSetBuilder(np.ones(320, np.int32))
    for number, route in enumerate(["large", "", "small", "large"]):
        builder.add([5, 6, 7 + number, 8][: 4 - number % 2], [(1, 3)], "rows.jsonl", number, route)
    examples = builder.build()
    with CacheWriter(str(tmp_path), PROVENANCE, make_format()) as writer:
        work = work_left([examples], writer, Share())
    for unit in units(work.sequences.lengths, 16):
        item = ray_engine._item(work, unit)
        for [found], number in zip(ray_engine._rows(*(item[name] for name in ray_engine._COLUMNS)), unit.numbers, strict=True):
            expected = work.sequences.example(number)
            assert (found.tokens, found.is_target) == (expected.tokens, expected.is_target)
            assert (found.origin, found.route) == (expected.origin, expected.route)


class Watched(LocalTeacher):
    """Counts how often it was asked whether it is still the same."""

    confirmed = 0

    def heed(self, check):
        raise AssertionError("no signal is heeded inside an actor")

    def confirm(self):
        self.confirmed += 1
        if self.confirmed > 1:
            raise TeacherError("another model")


def test_an_actor_adds_nothing_that_its_teacher_may_not_have_said(tmp_path):
    """The probe of a served teacher passes after a unit was answered and before it can be committed."""
    format, actor = make_format(), ray_engine.UnitActor.__new__(ray_engine.UnitActor)
    with CacheWriter(str(tmp_path), PROVENANCE, format) as writer:
        work = work_left(SETS[1:], writer, Share())
        actor._scorer = Scorer(Watched(make_teacher_on("cpu").causal_lm), format, 5, 0, 24)
        actor._codec, actor._writer = make_codec(format), writer
        first, second = (ray_engine._item(work, unit) for unit in units(work.sequences.lengths, 24 * 4)[:2])
        done = actor({name: [value] for name, value in first.items()})
        with pytest.raises(TeacherError):
            actor({name: [value] for name, value in second.items()})
        assert len(writer) == done["sequences"][0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_of_two_actors_makes_the_same_cache(tmp_path):
    import ray

    format = make_format("top_k_sampled", exact=True)
    cache, counter = tmp_path / "cache", tmp_path / "asked"
    found_here = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=found_here)
    try:
        run_capture(cache, SETS, format=format, share=Share(0, 3))  # somebody has begun it
        work = left(cache, format)
        summary = capture_with_ray(job(cache, counter, format), work, actors=2, quiet=True)
        nothing = capture_with_ray(job(cache, counter, format), left(cache, format), actors=2, quiet=True)
    finally:
        ray.shutdown()
    run_capture(tmp_path / "alone", SETS, format=format)
    reader = CacheReader(str(cache))
    assert sorted(reader.keys()) == sorted(keys_of(*SETS))
    require_same(reader, CacheReader(str(tmp_path / "alone")), keys_of(*SETS), atol=1e-5)
    assert sorted(counter.read_text().split()) == sorted(key.hex() for key in work.sequences.keys)
    assert (summary.sequences, summary.rows) == (len(work.sequences), work.rows)
    assert nothing.sequences == 0
    writers = {path.name.split("-")[0] for path in cache.glob("*.index")}
    assert writers == {"0", "ray"}
