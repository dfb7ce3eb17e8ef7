"""How a vLLM server comes to the student's weights: what is sent under which name, what happens when it forgets them, on one rank and two.

The server is a stub whose model is no student; what the real one makes of the weights is in tests/vllm.
"""

import json
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from potstill.errors import GeneratorError, IncompatibleError, OutageError, UsageError
from potstill.models.adapters import add_lora
from potstill.models.causal_lm import CausalLM
from potstill.models.config import LoraConfig
from potstill.models.merging import checkpoint_weights, merged_weights
from potstill.rollouts import vllm
from potstill.rollouts.config import VllmGeneratorConfig
from potstill.rollouts.vllm import VllmGenerator
from potstill.rollouts.vllm_push import PushWeights
from potstill.rollouts.writing import Prompt, Sampling
from potstill.serving import pool
from stub_server import Fault, StubServer
from tiny import tiny_llama

VOCABULARY = 320
PROMPTS = [Prompt((40 + row, 50), row) for row in range(4)]
SAMPLING = Sampling(max_new_tokens=4)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(pool, "_LONGEST_PAUSE", 0.3)
    monkeypatch.setattr(vllm, "_OTHER", float("inf"))   # the stub is no student


def student(lora: bool = False) -> CausalLM:
    model = tiny_llama(1)
    if lora:
        model.config.name_or_path = "the-base"
        model = add_lora(model, LoraConfig(rank=2, alpha=4))
    return CausalLM(model, VOCABULARY)


def move(model: CausalLM) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)


def generator(stub: StubServer, model: CausalLM | None, place: Path | None = None, *, group=None, **changes):
    given = VllmGeneratorConfig(
        kind="vllm", url=stub.url, model="tiny", **{"concurrency": 3, "request_seconds": 5, "max_outage_seconds": 5, **changes}
    )
    return closing(VllmGenerator(given, stop_ids=[2], vocabulary_size=VOCABULARY, student=model, folder=place, group=group))


def names_asked(stub: StubServer) -> list[str]:
    asked: list[str] = []
    stub.script = lambda number, body: asked.append(body["model"])
    return asked


# ---------------------------------------------------------------- as an adapter


def test_an_adapter_comes_under_a_new_name_each_time(tmp_path):
    model = student(lora=True)
    with StubServer() as stub, generator(stub, model, tmp_path / "w", weights="adapter") as ours:
        asked = names_asked(stub)
        for step in range(3):
            move(model)
            ours.refresh(step)
            asked.clear()
            assert [answer.version for answer in ours.generate(PROMPTS, SAMPLING)] == [step] * 4
            [name] = set(asked)
            assert list(stub.adapters) == [name]   # the former one was taken back
            saved = load_file(Path(stub.adapters[name]) / "adapter_model.safetensors")
            live = {key.replace(".default", ""): value for key, value in model.model.state_dict().items() if "lora_" in key}
            assert saved.keys() == live.keys()
            assert all(torch.equal(saved[key], live[key]) for key in saved)
        assert json.loads((tmp_path / "w" / "adapter" / "adapter_config.json").read_text())["r"] == 2
        assert "load_inplace" not in str(stub.steered)   # vLLM would read the files again for every request
    assert not (tmp_path / "w").exists()


def test_an_adapter_whose_arrival_was_not_heard_of_is_not_refused(tmp_path):
    """The answer to the first request is lost, and the second is told that the name is taken."""
    with StubServer() as stub:
        steer, lost = stub.steer, []

        def deaf(path, body):
            found = steer(path, body)
            if path == "/v1/load_lora_adapter" and not lost:
                lost.append(path)
                return Fault(drop=True)
            return found

        stub.steer = deaf
        with generator(stub, student(lora=True), tmp_path, weights="adapter") as ours:
            ours.refresh(0)
            assert len(stub.adapters) == 1
            assert ours.generate(PROMPTS, SAMPLING)


def test_a_server_that_refuses_an_adapter_says_how_it_must_be_started(tmp_path):
    with StubServer() as stub, generator(stub, student(lora=True), tmp_path, weights="adapter") as ours:
        stub.steer = lambda path, body: Fault(status=404, body=b'{"detail":"Not Found"}')
        with pytest.raises(GeneratorError, match=r"status 404: Not Found; start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            ours.refresh(0)


# ---------------------------------------------------------------- from a folder


@pytest.mark.parametrize("lora", [False, True])
def test_a_whole_model_is_read_again_from_a_folder(lora, tmp_path):
    model = student(lora)
    with StubServer() as stub, generator(stub, model, tmp_path / "w", weights="reload") as ours:
        salts = []
        stub.script = lambda number, body: salts.append(body.get("cache_salt"))
        for step in range(2):
            move(model)
            ours.refresh(step)
            path, body = stub.steered[-3]
            assert path == "/collective_rpc"
            assert body["method"] == "reload_weights"
            saved = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            expected = merged_weights(model.inner, torch.float32)
            assert all(torch.equal(saved[key], expected[key]) for key in saved)
            assert len(saved) == len(expected)
            assert [path for path, _ in stub.steered[-2:]] == ["/reset_prefix_cache", "/update_weight_version"]
            assert [answer.version for answer in ours.generate(PROMPTS, SAMPLING)] == [step] * 4
        assert len(set(salts) - {None}) == 2, "keys and values of former weights could be read again"
    assert not (tmp_path / "w").exists()


def test_a_folder_of_the_recipe_goes_before(tmp_path):
    with StubServer() as stub:
        with generator(stub, student(), tmp_path / "run", weights="reload", folder=str(tmp_path / "shared")) as ours:
            ours.refresh(0)
            assert stub.steered[0][1]["kwargs"]["weights_path"] == str(tmp_path / "shared" / "student")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lora", "changes", "said"),
    [
        (False, {"weights": "adapter"}, "has none; add student.lora"), (True, {"weights": "adapter"}, r"generator\.folder: adapter needs"),
        (False, {"weights": "reload"}, r"generator\.folder: reload needs"),
    ],
)  # fmt: skip
def test_a_way_that_cannot_be_gone_is_refused(lora, changes, said):
    folder = Path("anywhere") if not lora and changes["weights"] == "adapter" else None
    with StubServer() as stub, pytest.raises((UsageError, IncompatibleError), match=said):
        generator(stub, student(lora), folder, **changes)
    assert not Path("anywhere").exists()


# ---------------------------------------------------------------- when, and when they are lost


def test_weights_go_out_every_so_many_steps_and_when_a_run_goes_on(tmp_path):
    with StubServer() as stub, generator(stub, student(), tmp_path, weights="reload", every=3) as ours:
        versions = []
        for step in (4, 5, 6, 7, 8, 9):   # a run that goes on after its fourth step
            ours.refresh(step)
            versions += [answer.version for answer in ours.generate(PROMPTS[:1], SAMPLING)]
    assert versions == [4, 4, 6, 6, 6, 9]


@pytest.mark.parametrize("way", ["adapter", "reload"])
def test_a_server_that_has_forgotten_the_weights_gets_them_again(way, tmp_path, caplog):
    """It was started again between two steps: nothing is written with the weights that it was started with."""
    model = student(lora=way == "adapter")
    with StubServer() as stub, generator(stub, model, tmp_path, weights=way, every=10) as ours:
        ours.refresh(0)
        before = len(stub.steered)
        ours.generate(PROMPTS, SAMPLING)
        assert len(stub.steered) == before
        stub.adapters.clear()
        stub.weight_version = None
        ours.refresh(3)
        assert {answer.version for answer in ours.generate(PROMPTS, SAMPLING)} == {3}
        assert len(stub.steered) > before
    assert "has lost the student's weights" in caplog.text


@pytest.mark.parametrize("way", ["adapter", "reload"])
def test_a_server_that_is_started_again_while_it_writes_writes_everything_anew(way, tmp_path):
    model = student(lora=way == "adapter")
    with StubServer() as stub, generator(stub, model, tmp_path, weights=way, concurrency=1) as ours:
        ours.refresh(0)
        clean = ours.generate(PROMPTS, SAMPLING)
        stub.calls, asked = 0, []

        def script(number, body):
            asked.append(body["model"])
            if number == 2:
                stub.adapters.clear()
                stub.weight_version = None
                return Fault(drop=True)
            if body["model"] not in {"tiny", *stub.adapters}:
                return Fault(status=404, body=b'{"error": {"message": "The model does not exist"}}')
            return None

        stub.script = script
        assert ours.generate(PROMPTS, SAMPLING) == clean
        assert sum(path in ("/v1/load_lora_adapter", "/collective_rpc") for path, _ in stub.steered) == 2
        assert len(asked) >= 2 + 1 + len(PROMPTS)


def test_a_server_that_forgets_again_and_again_is_given_up(tmp_path):
    with StubServer() as stub, generator(stub, student(), tmp_path, weights="reload", max_outage_seconds=20) as ours:
        ours.refresh(0)

        def script(number, body):
            stub.weight_version = None
            return Fault(drop=True) if number % 3 == 0 else None

        stub.script = script
        with pytest.raises(GeneratorError, match="lost the student's weights 3 times"):
            ours.generate(PROMPTS, SAMPLING)


def test_a_server_that_writes_like_another_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm, "_OTHER", 0.5)
    with StubServer() as stub, generator(stub, student(), tmp_path, weights="reload") as ours:  # noqa: SIM117
        with pytest.raises(GeneratorError, match=r"does not write like the student: [\d.]+ nats a token apart"):
            ours.refresh(0)


# ---------------------------------------------------------------- push


class RecordingLine:
    """In NCCL's place: what went through, and whether the other side was there when it did."""

    def __init__(self, server: "PushServer", joins: bool = True):
        self.server, self.joins, self.sent, self.closed = server, joins, [], None
        server.lines.append(self)

    unique_id = "QUJD"

    def join(self, world_size):
        self.world_size = world_size
        assert self.server.waiting.wait(5), "the workers were not asked to join"

    def send(self, tensor):
        assert self.server.waiting.wait(5), "the workers were not asked to receive"
        self.sent.append(tensor.clone())

    def finish(self):
        self.server.received.set()

    def close(self, *, broken=False):
        self.closed = broken


class PushServer:
    """Answers the four requests as vLLM does: those in which workers and sender meet stay open until they have met."""

    def __init__(self, stub: StubServer):
        self.stub, self.steer = stub, stub.steer
        self.waiting, self.received = threading.Event(), threading.Event()
        self.lines: list[RecordingLine] = []
        self.refusals: dict[str, Fault] = {}
        stub.steer = self.answer

    def answer(self, path, body):
        self.steer(path, body)
        if path in self.refusals:
            return self.refusals.pop(path)
        if path in ("/init_weight_transfer_engine", "/update_weights"):
            self.waiting.set()
            time.sleep(0.05)
        return None


def pushing(stub: StubServer, model: CausalLM):
    """A generator whose line records."""
    server = PushServer(stub)
    made = generator(stub, model, weights="push")
    made.thing._weights = PushWeights(model, made.thing._asker, made.thing._loop, dial=lambda device: RecordingLine(server))
    return made, server


def test_push_tells_names_and_shapes_and_sends_tensors_in_their_order():
    model = student()
    with StubServer() as stub:
        made, server = pushing(stub, model)
        with made as ours:
            for step in (1, 2):
                move(model)
                ours.refresh(step)
            assert {answer.version for answer in ours.generate(PROMPTS, SAMPLING)} == {2}
        [line] = server.lines
    paths = [path for path, _ in stub.steered]
    round_trip = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert paths == ["/init_weight_transfer_engine", *round_trip, *round_trip]
    init = stub.steered[0][1]["init_info"]
    assert init == {"rank_offset": 1, "world_size": 3, "nccl_unique_id_b64": "QUJD", "packed": False}
    assert line.world_size == 3
    about = stub.steered[-2][1]["update_info"]
    expected = model.inner.state_dict()
    assert about["names"] == [name for name in expected if name in checkpoint_weights(model.inner)]
    assert len(about["names"]) == len(expected)
    assert set(about["dtype_names"]) == {"float32"}
    last = line.sent[len(about["names"]) :]
    for name, shape, tensor in zip(about["names"], about["shapes"], last, strict=True):
        assert tensor.shape == torch.Size(shape)
        assert torch.equal(tensor, expected[name])
    assert stub.weight_version == stub.steered[-1][1]["weight_version"]
    assert line.closed is False


def test_push_dials_again_once_where_the_server_was_started_again_and_then_gives_up():
    model = student()
    with StubServer() as stub:
        made, server = pushing(stub, model)
        with made as ours:
            ours.refresh(0)
            server.refusals["/start_weight_update"] = Fault(status=500)
            ours.refresh(1)
            assert [line.closed for line in server.lines] == [True, None]
            stub.steer = lambda path, body: Fault(status=500, body=b"no engine")
            with pytest.raises(OutageError, match=r"not taken the student's weights \(push\), twice: status 500: no engine"):
                ours.refresh(2)


def test_push_of_a_student_on_a_processor_is_refused():
    with StubServer() as stub, generator(stub, student(), weights="push") as ours:  # noqa: SIM117
        with pytest.raises(GeneratorError, match="sends the student's weights over NCCL, and the student is on cpu; use adapter or reload"):
            ours.refresh(0)


def test_weights_of_a_checkpoint_have_its_names_and_stand_once():
    tied = tiny_llama(0, tied=True)
    assert "lm_head.weight" not in checkpoint_weights(tied)
    model = student(lora=True)
    move(model)
    found, merged = checkpoint_weights(model.inner), merged_weights(model.inner, torch.float32)
    assert found.keys() == merged.keys()
    assert all(torch.equal(found[name], merged[name]) for name in found)
    plain = tiny_llama(0)
    assert checkpoint_weights(plain)["lm_head.weight"].data_ptr() == plain.lm_head.weight.data_ptr()


# ---------------------------------------------------------------- ranks


class Threads:
    """Two ranks as two threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, table: list):
        self.rank, self.world_size, self._barrier, self._table = rank, 2, barrier, table

    def gather(self, numbers: np.ndarray) -> list[np.ndarray]:
        self._barrier.wait(10)
        self._table[self.rank] = numbers
        self._barrier.wait(10)
        return list(self._table)

    def sum(self, numbers):
        return np.sum(self.gather(np.asarray(numbers, np.float64)), axis=0).tolist()


def _on_two_ranks(work) -> list:
    barrier, table, results = threading.Barrier(2), [None, None], [None, None]

    def run(rank):
        try:
            results[rank] = work(Threads(rank, barrier, table))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_one_rank_sends_and_all_ask_for_what_it_sent(tmp_path):
    model = student(lora=True)
    with StubServer() as stub:
        asked = names_asked(stub)

        def work(group):
            with generator(stub, model, tmp_path, weights="adapter", group=group) as ours:
                ours.refresh(0)
                if group.rank == 0:
                    asked.clear()
                group.sum([0.0])
                first = ours.generate(PROMPTS[group.rank :: 2], SAMPLING)
                if group.rank == 1:
                    stub.adapters.clear()   # seen by both: each of them would be answered by the base
                group.sum([0.0])
                again = ours.generate(PROMPTS[:2] if group.rank else [], SAMPLING)
                group.sum([0.0])
                return first, again

        one, other = _on_two_ranks(work)
        assert not isinstance(one, Exception), one
        assert not isinstance(other, Exception), other
    loads = [body["lora_name"] for path, body in stub.steered if path == "/v1/load_lora_adapter"]
    assert len(loads) == 2
    assert set(asked) - {"tiny"} == set(loads)
    assert [len(answers) for answers in (one[0], other[0], one[1], other[1])] == [2, 2, 0, 2]


def test_a_rank_that_cannot_send_stops_all_of_them(tmp_path):
    with StubServer() as stub:
        stub.steer = lambda path, body: Fault(status=404, body=b"no")

        def work(group):
            with generator(stub, student(), tmp_path, weights="reload", group=group) as ours:
                ours.refresh(0)

        one, other = _on_two_ranks(work)
    assert isinstance(one, GeneratorError)
    assert "VLLM_SERVER_DEV_MODE=1" in str(one)
    assert isinstance(other, GeneratorError)
    assert "the first rank" in str(other)
