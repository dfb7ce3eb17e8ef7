"""`potstill generate` by a real vLLM server: its greedy data set is that of the same model in this process, and goes on after a stop."""

import json
from pathlib import Path

import pytest

from bigram_model import save_bigram
from potstill.rollouts.vllm import VllmGenerator
from served_vllm import START_SECONDS, VllmServer, free_port, require_vllm
from small_recipe import potstill, write_small_recipe

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = write_small_recipe(tmp_path_factory.mktemp("generate"))
    save_bigram(folder / "speaker", head_dim=32)
    return folder


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    require_vllm()
    started = VllmServer(place / "speaker", tmp_path_factory.mktemp("vllm") / "log", free_port())
    yield started.wait()
    started.kill()


def generate(place: Path, teacher: str, name: str, sampling: str, *, samples: int = 1) -> list[dict]:
    section = f"generate={{path: {place}/{name}, samples: {samples}, batch_size: 12, filters: {{same: keep}}, sampling: {sampling}}}"
    assert potstill("generate", place / "r.yaml", "--quiet", f"teacher={teacher}", section) == 0
    return [json.loads(line) for line in (place / name).read_text().splitlines()]


def test_a_server_writes_what_the_model_writes_here(place, server, monkeypatch):
    served = f"{{kind: server, url: '{server.url}', model: tiny, max_outage_seconds: {START_SECONDS}}}"
    greedy = "{temperature: 0, max_new_tokens: 6}"
    there = generate(place, served, "served.jsonl", greedy)
    assert there == generate(place, f"{{path: {place}/speaker}}", "local.jsonl", greedy)
    assert {row["output"] for row in there} == {"The answer."}
    drawn = generate(place, served, "drawn.jsonl", "{max_new_tokens: 6}", samples=4)
    share = sum(row["output"].startswith("The") for row in drawn) / len(drawn)
    assert abs(share - 0.5) < 4 * 0.5 / len(drawn) ** 0.5
    monkeypatch.setattr(VllmGenerator, "generate", lambda *_: pytest.fail("an answer was asked for again"))
    assert generate(place, served, "drawn.jsonl", "{max_new_tokens: 6}", samples=4) == drawn
