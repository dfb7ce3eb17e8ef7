"""What the stub servers of the tests share: a real HTTP server on loopback that goes away as a killed one does, and a script of faults."""

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What the server does instead of answering. `mutate` changes the answer's JSON, `mutate_bytes` its bytes."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    drop: bool = False             # closes the connection without a word
    drip: bool = False             # sends a byte now and then, for ever
    mutate: Callable[[Any], Any] | None = None
    mutate_bytes: Callable[[bytes], bytes] | None = None


Script = Callable[[int, dict[str, Any]], Fault | None]


class Loopback:
    """Listens from the start; `handler` answers."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], port: int = 0):
        self.calls = self.under_way = self.most_under_way = 0
        self.headers: list[dict[str, str]] = []
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.server = _Server(("127.0.0.1", port), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the port away and drops every connection, as a killed server does."""
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.server.drop_connections()
        self.thread.join()


class Json(BaseHTTPRequestHandler):
    """A handler that says nothing of itself and sends JSON."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *arguments: Any):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def get_request(self):
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """A client that went away is what these tests are about."""

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
