"""Serve the trained model over HTTP in the OpenAI way, with nothing but NumPy and the standard library.

``GET /health``, ``GET /v1/models``, ``POST /v1/completions``, ``POST /v1/chat/completions``. On SIGTERM it takes no
more connections, finishes the answers it has begun, and ends.

Settings from the environment: PORT (8000), TIDEMILL_INPUT_DIR (input), MODEL_NAME (quickstart-gpt), DRAIN_SECONDS (8).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any, Final

from decode import Model, Sampling, load_model
from openai_api import Choice, CompletionRequest, Envelope, RequestRefusedError, model_list, parse_request

LIMIT_BODY_BYTES: Final = 1 << 20
EVENT_EVERY_S: Final = 0.02
LOOK_FOR_CLIENT_EVERY: Final = 32
_ROUTES: Final = {"/v1/completions": False, "/v1/chat/completions": True}


class ClientGoneError(Exception):
    """Nobody is waiting for this answer any more."""


class ModelServer(ThreadingHTTPServer):
    """One thread per connection; knows how many answers are being made, so that it can drain."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], model: Model, name: str) -> None:
        self.model, self.name, self.created = model, name, int(time.time())
        self.draining = False
        self._busy = 0
        self._changed = threading.Condition()
        super().__init__(address, Handler)

    def __enter__(self) -> ModelServer:
        return self

    def answering(self, by: int) -> None:
        """Count an answer that begins (1) or ends (-1)."""
        with self._changed:
            self._busy += by
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait for the answers that are being made. Whether all of them ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._busy == 0, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Routes of one connection."""

    server: ModelServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = 120

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self._answer(503 if self.server.draining else 200, {"status": "draining" if self.server.draining else "ok"})
        elif path == "/v1/models":
            self._answer(200, model_list(self.server.name, self.server.created))
        else:
            self._refuse(self._no_route(path))

    def do_POST(self) -> None:
        self.server.answering(1)
        try:
            self._complete(self.path.partition("?")[0])
        except RequestRefusedError as refused:
            self._refuse(refused)
        except (ClientGoneError, ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self.server.answering(-1)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name that the base class gives)
        """Quiet: one line per request is the gateway's to write."""

    def _complete(self, path: str) -> None:
        body = self._read_body()
        if path not in _ROUTES:
            raise self._no_route(path)
        if self.server.draining:
            raise RequestRefusedError("the server is stopping; try again", status=503, code="draining")
        request = parse_request(body, chat=_ROUTES[path], served=self.server.name)
        choices = [Choice(self.server.model, request, index) for index in range(request.choices)]
        if request.stream:
            self._stream(request, choices)
        else:
            texts = ["".join(self._while_client_waits(choice)) for choice in choices]
            self._answer(200, Envelope(request).whole(choices, texts))

    def _stream(self, request: CompletionRequest, choices: list[Choice]) -> None:
        """Server-sent events. The first character goes out at once, later ones in groups of some milliseconds."""
        envelope = Envelope(request)
        self._begin(200, "text/event-stream; charset=utf-8", length=None)
        for choice in choices:
            pending, first, sent = "", True, 0.0
            for text in self._while_client_waits(choice):
                pending += text
                if pending and time.monotonic() - sent >= EVENT_EVERY_S:
                    self._event(json.dumps(envelope.event(choice.index, pending, first=first)))
                    pending, first, sent = "", False, time.monotonic()
            last = envelope.event(choice.index, pending, first=first, finish_reason=choice.finish_reason)
            self._event(json.dumps(last))
        if request.include_usage:
            self._event(json.dumps(envelope.usage_event(choices)))
        self._event("[DONE]")
        if not self.close_connection:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _while_client_waits(self, choice: Choice) -> Any:
        for place, text in enumerate(choice):
            if place % LOOK_FOR_CLIENT_EVERY == 0 and self._client_is_gone():
                raise ClientGoneError
            yield text

    def _client_is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True

    def _event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(line if self.close_connection else b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.flush()

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self._begin(status, "application/json", length=len(body))
        self.wfile.write(body)
        self.wfile.flush()

    def _begin(self, status: int, content_type: str, *, length: int | None) -> None:
        """Send the head. ``length`` None: a stream, in chunks where the client speaks HTTP/1.1."""
        self.close_connection |= self.server.draining
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        if length is not None:
            self.send_header("Content-Length", str(length))
        elif self.request_version == "HTTP/1.1" and not self.close_connection:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _refuse(self, refused: RequestRefusedError) -> None:
        self._answer(refused.status, refused.to_json())

    def _no_route(self, path: str) -> RequestRefusedError:
        return RequestRefusedError(f"no route {self.command} {path}", status=404, code="not_found")

    def _read_body(self) -> bytes:
        """The whole body. What is left unread makes the connection unusable, so refusals here close it."""
        try:
            if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
                return self._read_chunks()
            return self._read_exactly(int(self.headers.get("Content-Length", "0")), LIMIT_BODY_BYTES)
        except ValueError as error:
            self.close_connection = True
            raise RequestRefusedError(f"the length of the body is malformed: {error}") from error
        except RequestRefusedError:
            self.close_connection = True
            raise

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(64).partition(b";")[0], 16):
            body += self._read_exactly(size, LIMIT_BODY_BYTES - len(body))
            self.rfile.readline(8)
        while self.rfile.readline(4096).strip():
            """Trailers: of no use here."""
        return body

    def _read_exactly(self, size: int, limit: int) -> bytes:
        if size < 0:
            raise ValueError("it is negative")
        if size > limit:
            raise RequestRefusedError(f"the body is larger than {LIMIT_BODY_BYTES} bytes", status=413)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ClientGoneError
        return body


def main() -> int:
    env = os.environ
    folder = Path(env.get("TIDEMILL_INPUT_DIR", "input")) / "model"
    name = env.get("MODEL_NAME", "quickstart-gpt")
    model = load_model(folder)
    warm_up(model)
    server = ModelServer(("127.0.0.1", int(env.get("PORT", "8000"))), model, name)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: stop.set())
    threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
    print(f"serving  {name}  http://127.0.0.1:{server.server_port}/v1", flush=True)
    stop.wait()
    server.draining = True
    server.shutdown()
    server.server_close()
    drained = server.drain(float(env.get("DRAIN_SECONDS", "8")))
    print("stopped  every answer finished" if drained else "stopped  some answers were cut off", flush=True)
    return 0


def warm_up(model: Model) -> None:
    """Touch every weight, so that the first request does not pay for it."""
    for _byte, _place in zip(chain(model.generate(b"def ", Sampling(seed=0))), range(8), strict=False):
        """Only the work counts."""


if __name__ == "__main__":
    sys.exit(main())
