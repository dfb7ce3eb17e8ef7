"""A teacher's server for tests of faults: real sockets on loopback, answers of a small known model, and a script of what goes wrong.

The model is a bigram: the distribution after a token is a row of a table, so that a test knows every log-probability without the server.
"""

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np

from loopback import Fault, Json, Loopback, Script

Body = Any


class Bigram:
    """log p(next | token) [V, V] in float64."""

    def __init__(self, vocabulary_size: int = 320, seed: int = 0, spread: float = 2.0):
        logits = np.random.default_rng(seed).normal(0, spread, (vocabulary_size, vocabulary_size))
        self.log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def after(self, tokens: list[int]) -> np.ndarray:
        """[T - 1, V]: row t predicted token t + 1."""
        return self.log_probs[tokens[:-1]]


class StubServer(Loopback):
    """`calls` counts prompts requests (probes among them), `asked` holds their prompts and `answered` how often each was paid for."""

    def __init__(
        self, script: Script | None = None, *, model: Bigram | None = None, vocabulary_size: int = 320, max_model_len: int | None = 256,
        texts: Callable[[int], str | None] = lambda number: None, port: int = 0,
    ):  # fmt: skip
        self.script = script or (lambda number, body: None)
        self.model = model or Bigram(vocabulary_size)
        self.max_model_len, self.texts = max_model_len, texts
        self.processed = False   # log-probabilities of what was drawn from, not of the model
        self.adapters: dict[str, str] = {}
        self.steered: list[tuple[str, Any]] = []
        self.weight_version: str | None = None
        self.asked: list[list[list[int]]] = []
        self.answered: list[list[list[int]]] = []
        super().__init__(_handler(self), port)

    # ------------------------------------------------------------ answers

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM says it."""
        if "prompt_logprobs" not in body:
            return self.written(body)
        k, prompts = body["prompt_logprobs"], body["prompt"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        choices = [
            {"index": number, "text": "", "logprobs": None, "finish_reason": "length", "prompt_logprobs": self._entries(prompt, k),
             "prompt_token_ids": None}
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
        tokens = sum(map(len, prompts))
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens + len(prompts), "completion_tokens": len(prompts)}}  # fmt: skip

    def steer(self, path: str, body: Any) -> "Fault | None":
        """What changes the server: adapters and weights. A test may put its own in this place."""
        self.steered.append((path, body))
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return Fault(status=400, body=b'{"error": {"message": "has already been loaded"}}')
            self.adapters[body["lora_name"]] = body["lora_path"]
        elif path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        elif path in ("/update_weight_version", "/finish_weight_update"):
            self.weight_version = body.get("new_version", body.get("weight_version"))
        return None

    def _entries(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        entries: list[dict[str, Any] | None] = [None]
        for row, came in zip(self.model.after(prompt), prompt[1:], strict=True):
            order = np.argsort(-row, kind="stable")
            rank = int(np.flatnonzero(order == came)[0]) + 1
            ranked = [(came, rank), *((int(number), place + 1) for place, number in enumerate(order[:k]))]
            entries.append({
                str(number): {"logprob": float(np.float32(row[number])), "rank": rank, "decoded_token": self.texts(number)}
                for number, rank in ranked
            })  # fmt: skip
        return entries

    def written(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM says what it has drawn: from the bigram, by the request's own seed."""
        prompt, numbers = body["prompt"], np.random.default_rng(body["seed"])
        tokens: list[int] = []
        log_probs: list[float] = []
        reason = "length"
        while len(tokens) < body["max_tokens"]:
            row = self.model.log_probs[(tokens or prompt)[-1]].copy()
            for number, bias in body.get("logit_bias", {}).items():
                row[int(number)] += bias
            order = np.argsort(-row, kind="stable")
            kept = order[: body["top_k"]] if body["top_k"] else order
            weights = np.exp(row[kept] / (body["temperature"] or 1.0))
            token = int(kept[0] if body["temperature"] == 0 else numbers.choice(kept, p=weights / weights.sum()))
            tokens.append(token)
            drawn = float(np.log(weights[kept == token][0] / weights.sum()))
            log_probs.append(drawn if self.processed else float(row[token]))
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        logprobs = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": log_probs, "text_offset": [0] * len(tokens)}
        choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason, "stop_reason": None, "token_ids": tokens,
                  "prompt_token_ids": prompt}  # fmt: skip
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "total_tokens": len(prompt) + len(tokens)}
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    def generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """As SGLang says it, in lists."""
        k, answers = body["top_logprobs_num"], []
        for prompt in body["input_ids"]:
            rows = self.model.after(prompt)
            tops: list[Any] = [None]
            for row in rows:
                tops.append([[float(row[number]), int(number), self.texts(int(number))] for number in np.argsort(-row, kind="stable")[:k]])
            tokens = [[None, prompt[0], None], *([float(row[came]), came, None] for row, came in zip(rows, prompt[1:], strict=True))]
            meta = {"id": "1", "prompt_tokens": len(prompt), "input_token_logprobs": tokens, "input_top_logprobs": tops}
            answers.append({"text": "", "meta_info": meta})
        return answers


def _handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(Json):
        def do_GET(self) -> None:
            cards = [{"id": name, "object": "model", "max_model_len": stub.max_model_len} for name in ("tiny", *stub.adapters)]
            answers = {
                "/v1/models": {"object": "list", "data": cards}, "/weight_info": {"weight_version": stub.weight_version},
                "/get_world_size": {"world_size": 2},
            }  # fmt: skip
            self._send(200, json.dumps(answers[self.path]).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path not in ("/v1/completions", "/generate"):
                with stub.lock:
                    fault = stub.steer(self.path, body) or Fault()
                if fault.drop:
                    self.close_connection = True
                    return
                self._send(fault.status, fault.body or b"{}", fault.headers)
                return
            prompts = body.get("prompt", body.get("input_ids"))
            with stub.lock:
                number, stub.calls = stub.calls, stub.calls + 1
                stub.asked.append(prompts)
                stub.headers.append(dict(self.headers))
                stub.under_way += 1
                stub.most_under_way = max(stub.most_under_way, stub.under_way)
                fault = stub.script(number, body) or Fault()
            try:
                self._answer(fault, body, prompts)
            finally:
                with stub.lock:
                    stub.under_way -= 1

        def _answer(self, fault: Fault, body: dict[str, Any], prompts: Any) -> None:
            if fault.delay:
                stub.closing.wait(fault.delay)
            if fault.drop:
                self.close_connection = True
                return
            if fault.drip:
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                while not stub.closing.is_set():
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            data = fault.body
            if data is None and fault.status == 200:
                answer = stub.completions(body) if self.path.endswith("/completions") else stub.generate(body)
                answer = fault.mutate(answer) if fault.mutate else answer
                data = json.dumps(answer).encode()
                data = fault.mutate_bytes(data) if fault.mutate_bytes else data
                if not fault.mutate and not fault.mutate_bytes:
                    with stub.lock:
                        stub.answered.append(prompts)
            self._send(fault.status, data or b"", fault.headers)

    return Handler
