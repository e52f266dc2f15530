"""An OTLP/HTTP collector on loopback that keeps what it is sent."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver:
    """Answers while the body of `with` runs; where it is `stuck`, only when that ends."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.paths: set[str] = set()
        self.spans: list[Span] = []
        #: The attributes of each process that sent something.
        self.senders: list[dict[str, str]] = []
        #: Set when the first batch is here.
        self.arrived = threading.Event()
        self._answering = threading.Event()
        if not stuck:
            self._answering.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver._take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
                receiver._answering.wait()
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing to the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def named(self, name: str) -> list[Span]:
        """The spans of that name."""
        return [span for span in self.spans if span.name == name]

    def _take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for of_sender in ExportTraceServiceRequest.FromString(body).resource_spans:
            sender = {one.key: one.value.string_value for one in of_sender.resource.attributes}
            if sender not in self.senders:
                self.senders.append(sender)
            self.spans += [span for scope in of_sender.scope_spans for span in scope.spans]
        self.arrived.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._answering.set()
        self._server.shutdown()
        self._server.server_close()
