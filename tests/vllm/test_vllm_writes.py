"""A real vLLM server that writes: its text and its log-probabilities are those of the model in this process, and follow its weights.

The served folder's generation_config is full of settings that must not leak, and the server states processed log-probabilities.
"""

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potstill.batch import Batch
from potstill.errors import GeneratorError
from potstill.models.adapters import add_lora
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoraConfig
from potstill.rollouts.config import VllmGeneratorConfig
from potstill.rollouts.drawing import truncated
from potstill.rollouts.local import LocalGenerator
from potstill.rollouts.vllm import VllmGenerator
from potstill.rollouts.writing import Completion, Prompt, Sampling, seed_of
from potstill.signals import Needs, TargetOutcomes
from potstill.teachers.config import ServerTeacherConfig
from potstill.teachers.server import ServerTeacher
from served_vllm import START_SECONDS, VllmServer, free_port, require_vllm
from small_recipe import potstill, write_small_recipe
from tiny import save_pair, tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

VOCABULARY, STOPS = 320, [2, 200, 201]
MODEL = {"width": 128, "head_dim": 32, "initializer_range": 0.08}
# What a model's own settings could do to its text, all of it at once.
LEAKS = {
    "do_sample": True, "temperature": 0.3, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5, "min_p": 0.2,
    "eos_token_id": [2, *range(20, 120)], "max_new_tokens": 20,
}  # fmt: skip
FLAGS = ("--enable-lora", "--max-lora-rank", "8", "--enable-prefix-caching", "--logprobs-mode", "processed_logprobs",
         "--weight-transfer-config", '{"backend": "nccl"}')  # fmt: skip
SETTINGS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
LENGTHS = (5, 1, 9, 140, 3, 12, 7)
PROMPTS = [
    Prompt(tuple(torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(row)).tolist()), seed_of(0, row))
    for row, length in enumerate(LENGTHS)
]
GREEDY = Sampling(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    made = save_pair(tmp_path_factory.mktemp("writes") / "student", 1, **MODEL)
    path = made / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | LEAKS))
    return made


@pytest.fixture(scope="session")
def running(folder, tmp_path_factory) -> Iterator[VllmServer]:
    require_vllm()
    started = VllmServer(folder, tmp_path_factory.mktemp("vllm") / "log", free_port(), *FLAGS, **SETTINGS)
    yield started.wait()
    started.kill()


def post(server: VllmServer, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=120).read())


@pytest.fixture
def server(running, folder) -> Iterator[VllmServer]:
    """With the weights that it was started with, whatever a test has given it."""
    yield running
    post(running, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    post(running, "/reset_prefix_cache", {})


def writing(server: VllmServer, student: CausalLM | None = None, place: Path | None = None, weights: str = "fixed", stops=STOPS):
    config = VllmGeneratorConfig(kind="vllm", url=server.url, model="tiny", weights=weights, max_outage_seconds=START_SECONDS)
    return closing(VllmGenerator(config, stop_ids=stops, vocabulary_size=VOCABULARY, student=student, folder=place))


def llama(seed: int = 1) -> CausalLM:
    return CausalLM(tiny_llama(seed, **MODEL), VOCABULARY)


def adapted() -> CausalLM:
    """The served base with an adapter that says something."""
    model = add_lora(tiny_llama(1, **MODEL), LoraConfig(rank=4, alpha=8))
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=numbers)
    return CausalLM(model, VOCABULARY)


def greedy(student: CausalLM) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in LocalGenerator(student, stop_ids=STOPS, pad_token=0).generate(PROMPTS, GREEDY)]


def forced(student: CausalLM, prompt: Prompt, answer: Completion, sampling: Sampling) -> torch.Tensor:
    """The log-probability of each written token by one forward pass over prompt and answer."""
    tokens = torch.tensor([prompt.tokens + answer.tokens])
    with torch.no_grad():
        logits = student.inner(tokens).logits[0, len(prompt.tokens) - 1 : -1]
    rows = truncated(logits, sampling).double().log_softmax(-1)
    return rows.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]


# ---------------------------------------------------------------- the text is the model's


def test_the_most_likely_text_is_the_local_generators(server):
    with writing(server) as theirs:
        answers = theirs.generate(PROMPTS, GREEDY)
    assert [answer.tokens for answer in answers] == greedy(llama())


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.7), Sampling(top_k=5), Sampling(1.3, top_p=0.8)],
    ids=["whole", "cooler", "top-k", "top-p"],
)
def test_log_probabilities_are_those_of_the_model_in_this_process(server, sampling):
    student, sampling = llama(), replace(sampling, max_new_tokens=60)
    with writing(server) as theirs:
        answers = theirs.generate(PROMPTS, sampling)
        again = theirs.generate(PROMPTS, sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = forced(student, prompt, answer, sampling)
        assert (torch.tensor(answer.log_probs, dtype=torch.float64) - expected).abs().max() < 1e-4
        assert answer.ended == (answer.tokens[-1] in STOPS)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in answers]


def test_an_answer_does_not_depend_on_what_is_beside_it(server):
    sampling = Sampling(max_new_tokens=40)
    with writing(server) as theirs:
        together = theirs.generate(PROMPTS, sampling)
        assert [theirs.generate([prompt], sampling)[0].tokens for prompt in PROMPTS] == [answer.tokens for answer in together]


def test_the_models_own_settings_do_not_leak(server):
    """Neither its truncation, its penalty, its ends nor its limit; asked without them, the server does obey them."""
    plain = {"model": "tiny", "prompt": list(PROMPTS[0].tokens), "seed": 5, "max_tokens": 100, "return_token_ids": True}
    leaking = post(server, "/v1/completions", plain)["choices"][0]
    assert len(leaking["token_ids"]) < 100, "the settings of this test do nothing"
    long = Sampling(max_new_tokens=90)
    with writing(server, stops=[319]) as theirs:
        answers = theirs.generate(PROMPTS[:3] + PROMPTS[4:], long)
    found = [token for answer in answers for token in answer.tokens]
    assert all(len(answer.tokens) == 90 or answer.tokens[-1] == 319 for answer in answers)
    assert any(20 <= token < 120 for token in found), "no end of the model's own came, so nothing is shown"
    # The mean rank of a drawn token: 1 to 3 with the model's truncation.
    student, ranks = llama(), []
    for prompt, answer in zip(PROMPTS[:3] + PROMPTS[4:], answers, strict=True):
        with torch.no_grad():
            logits = student.inner(torch.tensor([prompt.tokens + answer.tokens])).logits[0, len(prompt.tokens) - 1 : -1]
        ranks += (logits > logits.gather(-1, torch.tensor(answer.tokens)[:, None])).sum(-1).tolist()
    assert max(ranks) > 50


def test_drawn_tokens_have_the_models_frequencies(server):
    """The first token of 600 answers to one prompt, against its probabilities: chi-square by classes, with fixed seeds."""
    with torch.no_grad():
        row = llama().inner(torch.tensor([PROMPTS[0].tokens])).logits[0, -1].double().softmax(-1)
    with writing(server) as theirs:
        answers = theirs.generate([Prompt(PROMPTS[0].tokens, seed_of(1, n)) for n in range(600)], Sampling(max_new_tokens=1))
    drawn = torch.bincount(torch.tensor([answer.tokens[0] for answer in answers]), minlength=VOCABULARY).double()
    order = row.argsort(descending=True)
    classes = (row[order].cumsum(0) * 12).floor().clamp_max(11).long()
    expected, found = (torch.zeros(12, dtype=torch.float64).index_add_(0, classes, values[order]) for values in (row * 600, drawn))
    kept = expected > 5
    statistic = ((found - expected) ** 2 / expected)[kept].sum()
    assert statistic < 31.3   # the 0.999 quantile at 11 degrees of freedom


# ---------------------------------------------------------------- it follows the student


@pytest.mark.parametrize("weights", ["reload", "adapter"])
def test_new_weights_take_effect_at_once(server, weights, tmp_path):
    student = llama(5) if weights == "reload" else adapted()
    former = greedy(llama())
    with writing(server, student, tmp_path / "w", weights) as theirs:
        for step in range(3):
            theirs.refresh(step)
            answers = theirs.generate(PROMPTS, GREEDY)
            assert [answer.tokens for answer in answers] == greedy(student) != former
            assert {answer.version for answer in answers} == {step}
            former = greedy(student)
            sampled = theirs.generate(PROMPTS, Sampling(max_new_tokens=20))
            for prompt, answer in zip(PROMPTS, sampled, strict=True):
                expected = forced(student, prompt, answer, Sampling())
                assert (torch.tensor(answer.log_probs, dtype=torch.float64) - expected).abs().max() < 1e-4
            with torch.no_grad():
                for parameter in student.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(0.6)
    assert not (tmp_path / "w").exists()


def test_an_adapter_on_another_base_is_noticed(server, tmp_path):
    student = CausalLM(add_lora(tiny_llama(9, **MODEL), LoraConfig(rank=4, alpha=8)), VOCABULARY)
    with writing(server, student, tmp_path, "adapter") as theirs, pytest.raises(GeneratorError, match="does not write like the student"):
        theirs.refresh(0)


def test_push_finds_the_workers_and_needs_a_gpu(server):
    with writing(server, llama(), weights="push") as theirs:
        assert theirs._loop.run(theirs._asker.fetch("/get_world_size")) == {"world_size": 1}
        assert not theirs._weights.is_there("a tag that nobody has sent")
        with pytest.raises(GeneratorError, match="over NCCL, and the student is on cpu"):
            theirs.refresh(0)


def test_a_run_on_its_text_equals_the_run_on_text_written_here(server, tmp_path):
    """The most likely text, so that both write the same while their weights are the same; the student moves at each step."""
    recipe = write_small_recipe(tmp_path)
    save_pair(recipe / "student", 1, **MODEL)
    losses, far = {}, {"kind": "vllm", "url": server.url, "model": "tiny", "weights": "reload"}
    for name, generator in (("far", far), ("near", {"kind": "local"})):
        writes = f"rollouts={{author: student, sampling: {{temperature: 0, max_new_tokens: 12}}, generator: {json.dumps(generator)}}}"
        assert potstill("distill", recipe / "r.yaml", f"run.folder={recipe / name}", writes, "training.learning_rate=1e-2", "--quiet") == 0
        lines = [json.loads(line) for line in (recipe / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
        assert [line["rollouts/staleness"] for line in lines if "rollouts/staleness" in line] == [0] * 4
    assert len(losses["far"]) == 4
    assert losses["far"] == pytest.approx(losses["near"], abs=1e-4)
    assert abs(losses["far"][0] - losses["far"][-1]) > 1e-2, "the student did not move, so nothing is shown"


# ---------------------------------------------------------------- it scores


def test_the_target_alone_is_what_the_model_says(server):
    tokens = torch.randint(VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(0))
    given = Batch(tokens, torch.arange(40).repeat(5, 1), torch.zeros_like(tokens), torch.arange(40).repeat(5, 1) > 13)
    # One at a time: the engine of this vLLM dies of several prompts' log-probabilities at once where adapters were loaded.
    config = ServerTeacherConfig(kind="server", url=server.url, model="tiny", top_k=4, sequences_per_request=1, concurrency=1)
    with closing(ServerTeacher(config, vocabulary_size=VOCABULARY)) as teacher:
        outcomes = teacher.score(given, Needs("target")).outcomes
    assert isinstance(outcomes, TargetOutcomes)
    with torch.no_grad():
        rows = llama().inner(tokens).logits.double().log_softmax(-1)[:, :-1]
    expected = rows.gather(-1, tokens[:, 1:, None])[..., 0][given.is_target[:, 1:]]
    assert (outcomes.log_probs - expected).abs().max() < 1e-4


# ---------------------------------------------------------------- it dies


def test_a_server_that_was_started_again_gets_the_adapter_again(running, folder, tmp_path):
    """Depends on `running` so that two do not start at once. Nothing is written by the bare base."""
    port, student = free_port(), adapted()
    first = VllmServer(folder, tmp_path / "log", port, *FLAGS, **SETTINGS).wait()
    again: list[VllmServer] = []
    with writing(first, student, tmp_path / "w", "adapter") as theirs:
        theirs.refresh(4)
        assert [answer.tokens for answer in theirs.generate(PROMPTS, GREEDY)] == greedy(student)
        first.kill()
        restart = threading.Timer(1.0, lambda: again.append(VllmServer(folder, tmp_path / "log", port, *FLAGS, **SETTINGS)))
        restart.start()
        assert [answer.tokens for answer in theirs.generate(PROMPTS, GREEDY)] == greedy(student)
    again[0].kill()
