"""Whole runs by the command line on text that a served model writes, or with a served teacher that says one number a token: a stub."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from potstill.serving import pool
from small_recipe import potstill, write_small_recipe
from stub_server import Fault, StubServer

SHORT = "sampling: {max_new_tokens: 8}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(pool, "_LONGEST_PAUSE", 0.2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_small_recipe(tmp_path_factory.mktemp("served"))


def writes(stub: StubServer, **changes) -> str:
    """The student writes on the stub, whose weights stay: a bigram takes none."""
    given = {"kind": "vllm", "url": stub.url, "model": "tiny", "weights": "fixed", "max_outage_seconds": 1, **changes}
    return f"rollouts={{author: student, {SHORT}, generator: {json.dumps(given)}}}"


def run(recipe: Path, name: str, *overrides: str) -> int:
    return potstill("distill", recipe / "r.yaml", f"run.folder={recipe / name}", *overrides, "--quiet")


def final(folder: Path):
    return load_file(folder / "student" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    left, right = final(one), final(other)
    return all((left[name] == right[name]).all() for name in left)


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def unbroken(recipe) -> Path:
    with StubServer() as stub:
        assert run(recipe, "unbroken", writes(stub)) == 0
    return recipe / "unbroken"


def test_a_run_learns_from_what_a_server_writes_and_says_how_old_it_is(unbroken):
    assert logged(unbroken, "rollouts/staleness") == [0, 1, 2, 3]
    assert all(0 < length <= 8 for length in logged(unbroken, "rollouts/length"))


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(status=503)], ids=["drop", "503"])
def test_a_run_whose_generator_dies_for_good_goes_on_to_the_same_bits(fault, recipe, unbroken, request):
    name = f"died-{request.node.callspec.id}"
    with StubServer(lambda number, body: fault if number > 11 else None) as stub:
        assert run(recipe, name, writes(stub)) == 75
    assert not (recipe / name / "student").exists()
    with StubServer() as stub:
        assert run(recipe, name, writes(stub)) == 0
    assert same(recipe / name, unbroken)


def test_a_signal_while_it_is_waited_for_commits_and_leaves(recipe, unbroken):
    def script(number, body):
        if number == 11:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return Fault(delay=60) if number >= 11 else None

    with StubServer(script) as stub:
        assert run(recipe, "signal", writes(stub, max_outage_seconds=60)) == 143
    with StubServer() as stub:
        assert run(recipe, "signal", writes(stub)) == 0
    assert same(recipe / "signal", unbroken)


def test_a_served_teacher_writes_what_is_learned(recipe):
    """Sequence-level distillation inside the run: the teacher is asked for text and for nothing else."""
    with StubServer() as stub:
        teacher = f"teacher={{kind: server, url: '{stub.url}', model: tiny, top_k: 4}}"
        asked = []
        stub.script = lambda number, body: asked.append("prompt_logprobs" in body)
        changes = ("rollouts={author: teacher, " + SHORT + "}", "objective={kd_ratio: 0.0}")
        assert run(recipe, "by-teacher", teacher, *changes) == 0
        assert asked.count(False) >= 16
    assert len(logged(recipe / "by-teacher", "loss")) == 4


def test_one_number_a_token_is_enough_for_a_policy_gradient(recipe):
    """The student writes here, and the served teacher is asked for the log-probability of what was drawn alone."""
    with StubServer() as stub:
        teacher = f"teacher={{kind: server, url: '{stub.url}', model: tiny, top_k: 4}}"
        asked = []
        stub.script = lambda number, body: asked.append(body.get("prompt_logprobs"))
        changes = ("rollouts={author: student, " + SHORT + "}", "objective={divergence: reverse_kl, support: written, kd_ratio: 1.0}")
        assert run(recipe, "policy", teacher, *changes) == 0
        assert asked.count(0) >= 8
        assert asked.count(4) <= 3   # probes
    assert len(logged(recipe / "policy", "loss")) == 4
