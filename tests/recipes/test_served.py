"""A served teacher through the command line: looked at, learned from, captured, and noticed when another model answers."""

import pytest
import torch
from safetensors.torch import load_file

from potstill.cache.store import CacheReader
from potstill.run_folder import RunFolder
from small_recipe import potstill
from stub_server import Bigram, Fault, StubServer

CANARY = "canaryCANARYcanaryCANARYcanary12"


def served(url: str) -> str:
    return f"teacher={{kind: server, url: '{url}', model: tiny, top_k: 8, api_key_env: SERVER_API_KEY, max_outage_seconds: 1}}"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", CANARY)


def test_a_served_teacher_is_looked_at_learned_from_and_captured(place, capsys):
    with StubServer() as stub:
        assert potstill("check", place / "r.yaml", served(stub.url)) == 0
        said = " ".join(capsys.readouterr().out.split())
        for part in (f"tiny, served by vllm at {stub.url}", "its 8 most likely tokens at every target, over HTTP", "served tiny (probe"):
            assert part in said, part
        run = ("distill", place / "r.yaml", "--quiet", served(stub.url), "training.scheduler=constant", f"run.folder={place}/served")
        assert potstill(*run, "training.steps=2") == 0
        assert "objective.support=top_k_tail, objective.top_k=8" in capsys.readouterr().err
        assert potstill(*run, "training.steps=4") == 0
        section = f"capture={{path: {place}/served-cache, precision: exact}}"
        assert potstill("capture", place / "r.yaml", "--quiet", served(stub.url), section) == 0
        assert all(headers["Authorization"] == f"Bearer {CANARY}" for headers in stub.headers if "Authorization" in headers)
    cache = CacheReader(str(place / "served-cache"))
    assert (cache.format.k, len(cache)) == (8, 36)
    assert cache.provenance.fields["served model"].startswith("tiny (probe")
    offline = (f"teacher={{kind: cache, path: {place}/served-cache}}", "training.scheduler=constant", f"run.folder={place}/from-served")
    assert potstill("distill", place / "r.yaml", "--quiet", *offline) == 0
    live, cached = (load_file(place / run / "student" / "model.safetensors") for run in ("served", "from-served"))
    for name, tensor in live.items():
        torch.testing.assert_close(cached[name], tensor, rtol=0, atol=1e-5)
    shown = capsys.readouterr()
    assert CANARY not in shown.out + shown.err
    written = [path for folder in ("served", "served-cache") for path in (place / folder).rglob("*") if path.is_file()]
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


def test_another_model_behind_the_same_name_is_refused_on_resume_and_on_capture(place, capsys):
    run = ("distill", place / "r.yaml", "--quiet", f"run.folder={place}/changed")
    section = f"capture={{path: {place}/changed-cache}}"
    with StubServer() as stub:
        assert potstill(*run, served(stub.url), "training.steps=2") == 0
        assert potstill("capture", place / "r.yaml", "--quiet", served(stub.url), section) == 0
    with StubServer(model=Bigram(320, seed=1)) as other:
        assert potstill(*run, served(other.url), "training.steps=4") == 2
        assert "another probe" in capsys.readouterr().err
        assert potstill("capture", place / "r.yaml", "--quiet", served(other.url), section) == 2
        assert "probe" in capsys.readouterr().err
    assert RunFolder.read(place / "changed").read_samples()[-1]["step"] == 2


def test_a_server_that_is_away_is_said_by_check_and_ends_a_run_before_it_begins(place, capsys):
    away = served("http://127.0.0.1:9").replace("max_outage_seconds: 1", "max_outage_seconds: 0")
    assert potstill("check", place / "r.yaml", away) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert potstill("distill", place / "r.yaml", away, f"run.folder={place}/away") == 75
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert RunFolder.look(place / "away", {}) == "new"


def test_answers_that_cannot_be_believed_are_kept_in_the_run_folder(place, capsys):
    with StubServer(lambda number, body: Fault(body=b"<html>not today</html>") if number > 4 else None) as stub:
        assert potstill("distill", place / "r.yaml", "--quiet", served(stub.url), f"run.folder={place}/garbled") != 0
    assert "cannot be believed" in capsys.readouterr().err
    kept = sorted((place / "garbled" / "refused_answers").iterdir())
    assert kept
    assert b"not today" in kept[0].read_bytes()
    with StubServer() as stub:
        assert potstill("distill", place / "r.yaml", "--quiet", served(stub.url), f"run.folder={place}/garbled") == 0
