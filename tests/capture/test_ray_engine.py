"""The cluster's engine: refused in words where Ray is not installed, and the same records where it is."""

import importlib.util
import os
import sys
from functools import partial

import pytest

from potstill.cache.records import RecordFormat
from potstill.cache.store import CacheReader, CacheWriter
from potstill.capture import ray_engine
from potstill.capture.capture import work_left
from potstill.capture.config import CaptureConfig
from potstill.capture.ray_engine import RayCapture, capture_with_ray
from potstill.capture.units import Share
from potstill.errors import UsageError
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
