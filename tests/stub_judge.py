"""A judge for tests: a real HTTP server on loopback that answers chat completions by a rule that the test knows, and a script of faults."""

import json
import re
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import Fault, Json, Loopback, Script

Rule = Callable[[list[str]], str]
"""From the last answers shown, one or two, to what the judge says."""


def shown(body: dict[str, Any]) -> list[str]:
    """The answers that a question is about: A's and B's, or the one that is graded."""
    text = body["messages"][1]["content"]
    found: dict[str, str] = {}
    for mark, answer in re.findall(r"<(assistant-(?:[AB]-)?[0-9a-f]{16})>\n(.*?)\n</\1>", text, re.DOTALL):
        found[mark] = answer  # of several turns the last
    return list(found.values())


def always_first(answers: list[str]) -> str:
    return "The first one. [[A]]"


def longer(answers: list[str]) -> str:
    a, b = map(len, answers)
    return "[[A]]" if a > b else "[[B]]" if b > a else "[[C]]"


def better(quality: Callable[[str], float]) -> Rule:
    """Judges by a number that the test reads off an answer."""

    def rule(answers: list[str]) -> str:
        a, b = map(quality, answers)
        return f"Seen {a:g} and {b:g}.\n\n[[{'A' if a > b else 'B' if b > a else 'C'}]]"

    return rule


class StubJudge(Loopback):
    """`questions` counts how often each question (without reminders) was answered, `bodies` holds every request."""

    def __init__(self, rule: Rule, script: Script | None = None, *, model: str = "stub-1", port: int = 0):
        self.rule, self.script, self.model = rule, script or (lambda number, body: None), model
        self.bodies: list[dict[str, Any]] = []
        self.questions: Counter[str] = Counter()
        super().__init__(_handler(self), port)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.rule(shown(body))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": self.model, "choices": [choice]}


def _handler(stub: StubJudge) -> type[BaseHTTPRequestHandler]:
    class Handler(Json):
        def do_GET(self) -> None:
            self._send(200, json.dumps({"object": "list", "data": [{"id": stub.model, "object": "model"}]}).encode(), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with stub.lock:
                number, stub.calls = stub.calls, stub.calls + 1
                stub.bodies.append(body)
                stub.headers.append(dict(self.headers))
                stub.under_way += 1
                stub.most_under_way = max(stub.most_under_way, stub.under_way)
            try:
                self._answer(stub.script(number, body) or Fault(), body)
            finally:
                with stub.lock:
                    stub.under_way -= 1

        def _answer(self, fault: Fault, body: dict[str, Any]) -> None:
            if fault.delay:
                stub.closing.wait(fault.delay)
            if fault.drop:
                self.close_connection = True
                return
            data = fault.body
            if data is None and fault.status == 200:
                answer = stub.completion(body)
                data = json.dumps(fault.mutate(answer) if fault.mutate else answer).encode()
                with stub.lock:
                    stub.questions[json.dumps(body["messages"][:2])] += 1
            self._send(fault.status, data or b"", fault.headers)

    return Handler
