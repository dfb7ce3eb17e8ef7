"""A real vLLM server on loopback, on a small real Llama: what it says is what the model says in this process, and trains the same.

vLLM lives in an environment of its own (`make vllm` makes it); VLLM_PYTHON names its interpreter, `.venv-vllm/bin/python` if unset.
"""

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from potstill.batch import Batch
from potstill.cache.store import CacheReader
from potstill.errors import IncompatibleError, TeacherError
from potstill.models.causal_lm import CausalLM
from potstill.signals import Needs, TopKOutcomes
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.local import LocalTeacher
from potstill.teachers.server import ServerTeacher
from served_vllm import LONGEST, MOST_LOGPROBS, START_SECONDS, VllmServer, free_port, require_vllm
from small_recipe import potstill, write_small_recipe
from tiny import save_pair, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

VOCABULARY, K = 320, 20
# vLLM's attention on a CPU takes heads of 32 and more. Wide initial weights, so that its distributions are not all flat.
MODEL = {"width": 128, "head_dim": 32, "initializer_range": 0.08}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return save_pair(tmp_path_factory.mktemp("served") / "teacher", 1, **MODEL)


@pytest.fixture(scope="session")
def server(model, tmp_path_factory) -> Iterator[VllmServer]:
    require_vllm()
    started = VllmServer(model, tmp_path_factory.mktemp("vllm") / "log", free_port())
    yield started.wait()
    started.kill()


def config(server: VllmServer, **changes) -> ServerTeacherConfig:
    return ServerTeacherConfig(kind="server", url=server.url, model="tiny", **{"top_k": K, **changes})


def served(server: VllmServer, **changes):
    return closing(ServerTeacher(config(server, **changes), vocabulary_size=VOCABULARY, tokenizer=tiny_tokenizer()))


def batch(rows: int = 9, length: int = 40, seed: int = 0) -> Batch:
    tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, torch.arange(length).repeat(rows, 1), torch.zeros_like(tokens), torch.arange(length).repeat(rows, 1) > length // 3)


def expected(given: Batch) -> torch.Tensor:
    """[N, V] from the same model in this process, in float64 from its logits on."""
    with torch.no_grad():
        logits = tiny_llama(1, **MODEL)(input_ids=given.tokens).logits
    return logits.reshape(-1, VOCABULARY)[given.target_rows()[0]].double().log_softmax(-1)


def ask(server: VllmServer, body: dict) -> dict:
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


def test_its_answers_have_the_shape_that_is_read(server):
    """K entries where the token that came is among the first K, K + 1 where it is not; nothing for the first token."""
    prompts = [[5, 60, 7, 8], [9, 10]]
    answer = ask(server, {"model": "tiny", "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 3})
    sizes = set()
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        entries = choice["prompt_logprobs"]
        assert len(entries) == len(prompt)
        assert entries[0] is None
        for entry, token in zip(entries[1:], prompt[1:], strict=True):
            assert str(token) in entry
            sizes.add(len(entry))
            assert len(entry) == 3 + (entry[str(token)]["rank"] > 3)
    assert 4 in sizes


@pytest.mark.parametrize("k", [1, 20, MOST_LOGPROBS])
def test_log_probabilities_equal_those_of_the_model_in_this_process(server, k):
    given = batch()
    with served(server, top_k=k) as teacher:
        outcomes = teacher.score(given, Needs("top_k")).outcomes
    assert isinstance(outcomes, TopKOutcomes)
    rows = expected(given)
    best = rows.topk(k)
    assert (outcomes.log_probs - best.values).abs().max() < 1e-4
    assert (rows.gather(-1, outcomes.ids) - best.values).abs().max() < 1e-4   # the same ids, but for ties
    assert (outcomes.log_tail - rows.scatter(-1, best.indices, -torch.inf).logsumexp(-1)).abs().max() < 1e-4
    targets = given.target_rows()[1]
    assert (outcomes.target_log_probs - rows.gather(-1, targets[:, None]).squeeze(-1)).abs().max() < 1e-4
    if k == 1:
        assert (best.indices[:, 0] != targets).any(), "no token outside of the first K was read"


def test_more_outcomes_than_it_allows_are_refused_with_its_words(server):
    with pytest.raises(TeacherError, match=r"greater than max allowed: 64.*lower teacher\.top_k \(65\)"):
        served(server, top_k=MOST_LOGPROBS + 1)


def test_its_limits_are_found_before_anything_is_asked(server):
    with served(server) as teacher:
        assert len(teacher.score(batch(1, LONGEST - 1), Needs("top_k")).outcomes)
        with pytest.raises(IncompatibleError, match=f"takes {LONGEST} tokens.* found a document with {LONGEST} "):
            teacher.score(batch(1, LONGEST), Needs("top_k"))


def test_its_tokenizer_is_compared(server):
    tokenizer = tiny_tokenizer()
    other = tiny_tokenizer()
    words = tokenizer.get_vocab()
    first, second = sorted(words, key=words.__getitem__)[40:42]
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["vocab"][first], state["model"]["vocab"][second] = words[second], words[first]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    with pytest.raises(IncompatibleError, match=r"id 4[01] is "):
        ServerTeacher(config(server, top_k=MOST_LOGPROBS), vocabulary_size=VOCABULARY, tokenizer=swapped)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def recipe(model, tmp_path_factory) -> Path:
    folder = write_small_recipe(tmp_path_factory.mktemp("runs"))
    save_pair(folder / "teacher", 1, **MODEL)
    return folder


def final_losses(folder: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["loss/kd"]) for line in lines if "loss/kd" in line]


TOP_K = ("objective.support=top_k_tail", f"objective.top_k={K}", "training.steps=6")


def test_a_run_with_it_equals_the_run_with_the_model_in_this_process(server, recipe):
    address = f"teacher={{kind: server, url: '{server.url}', model: tiny, top_k: {K}}}"
    assert potstill("distill", recipe / "r.yaml", f"run.folder={recipe}/served", address, *TOP_K, "--quiet") == 0
    assert potstill("distill", recipe / "r.yaml", f"run.folder={recipe}/local", *TOP_K, "--quiet") == 0
    far, near = final_losses(recipe / "served"), final_losses(recipe / "local")
    assert len(far) == len(near) >= 6
    for one, other in zip(far, near, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_its_answers_are_captured_and_train_without_it(server, recipe):
    address = f"teacher={{kind: server, url: '{server.url}', model: tiny, top_k: {K}}}"
    section = f"capture={{path: '{recipe}/cache', outcomes: top_k, k: {K}, precision: exact}}"
    assert potstill("capture", recipe / "r.yaml", address, section, *TOP_K, "--quiet") == 0
    reader = CacheReader(str(recipe / "cache"))
    assert len(reader) == 36
    assert "probe" in reader.provenance.fields
    cached = f"teacher={{kind: cache, path: '{recipe}/cache'}}"
    assert potstill("distill", recipe / "r.yaml", f"run.folder={recipe}/cached", cached, *TOP_K, "--quiet") == 0
    assert potstill("distill", recipe / "r.yaml", f"run.folder={recipe}/local2", *TOP_K, "--quiet") == 0
    for one, other in zip(final_losses(recipe / "cached"), final_losses(recipe / "local2"), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# ---------------------------------------------------------------- it dies


def test_it_is_waited_for_when_it_is_killed_and_started_again(model, server, tmp_path):
    """Depends on `server` so that two do not start at once."""
    port = free_port()
    first = VllmServer(model, tmp_path / "log", port).wait()
    again: list[VllmServer] = []
    with served(first, max_outage_seconds=START_SECONDS) as teacher:
        before = teacher.score(batch(), Needs("top_k")).outcomes
        first.kill()
        restart = threading.Timer(1.0, lambda: again.append(VllmServer(model, tmp_path / "log", port)))
        restart.start()
        after = teacher.score(batch(seed=1), Needs("top_k")).outcomes
        rows = expected(batch(seed=1))
        assert (after.log_probs - rows.topk(K).values).abs().max() < 1e-4
        assert (teacher.score(batch(), Needs("top_k")).outcomes.log_probs - before.log_probs).abs().max() < 1e-4
    again[0].kill()


def test_a_local_teacher_offers_the_same_rows(model):
    """What the two runs above compare: the same K of the same model."""
    given = batch(2)
    outcomes = LocalTeacher(CausalLM(tiny_llama(1, **MODEL), VOCABULARY)).score(given, Needs("full")).outcomes
    rows = outcomes.head.logits(outcomes.hidden).double().log_softmax(-1)
    assert (rows - expected(given)).abs().max() < 1e-5
