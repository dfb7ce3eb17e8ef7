"""A judge for tests: a real HTTP server on loopback that answers chat completions by a rule that the test knows, and a script of faults."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from stub_server import Fault, Script, _Server

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


class StubJudge:
    """`questions` counts how often each question (without reminders) was answered, `bodies` holds every request."""

    def __init__(self, rule: Rule, script: Script | None = None, *, model: str = "stub-1", port: int = 0):
        self.rule, self.script, self.model = rule, script or (lambda number, body: None), model
        self.calls = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.questions: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.server = _Server(("127.0.0.1", port), _handler(self))
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "StubJudge":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.server.drop_connections()
        self.thread.join()

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.rule(shown(body))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": self.model, "choices": [choice]}


def _handler(stub: StubJudge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

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

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
