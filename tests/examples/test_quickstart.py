"""The quickstart example: its data split, its checkpoints, its server, and (where JAX is) its training."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
HAS_JAX = importlib.util.find_spec("jax") is not None
needs_jax = pytest.mark.skipif(not HAS_JAX, reason="jax is not installed")


@pytest.fixture(scope="module", autouse=True)
def _example_on_path() -> Iterator[None]:
    """The example's modules import each other by plain name, as they do in a job's working folder."""
    names = {path.stem for path in EXAMPLE.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def tiny_model(folder: Path, *, seed: int = 1) -> Path:
    """A model folder with small random weights."""
    architecture, checkpoint = module("architecture"), module("checkpoint")
    config = architecture.Config(width=16, depth=2, heads=2, context=16, ngram_bits=4)
    rng = np.random.default_rng(seed)
    weights = architecture.init_weights(config, seed=seed)
    weights = {name: (w + rng.normal(0, 0.3, w.shape)).astype(np.float32) for name, w in weights.items()}
    checkpoint.write_archive(folder / "model" / "weights.npz", {"step": 0}, weights)
    checkpoint.write_json(folder / "model" / "config.json", config.to_json())
    return folder


# --- data ---


def write_sources(root: Path, count: int = 80) -> None:
    for place in range(count):
        (root / f"m{place}.py").write_text(f"x = {place}\n" * 30)


def test_every_file_is_in_exactly_one_split(tmp_path: Path) -> None:
    write_sources(tmp_path)
    corpus = module("data").read_corpus(tmp_path)
    train, val = (set(part.tobytes().split(b"\0")[1:]) for part in (corpus.train, corpus.val))
    assert corpus.files == 80
    assert len(train) + len(val) == 80
    assert not train & val
    assert val


def test_the_corpus_is_the_same_every_time_and_leaves_out_what_is_not_library_text(tmp_path: Path) -> None:
    write_sources(tmp_path)
    data = module("data")
    before = data.read_corpus(tmp_path)
    for folder in ("test", "site-packages", "__pycache__", "json/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "left_out.py").write_text("secret\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\x01")
    (tmp_path / "latin.py").write_bytes("# caf\u00e9".encode("latin-1"))
    after = data.read_corpus(tmp_path)
    assert np.array_equal(before.train, after.train)
    assert np.array_equal(before.val, after.val)


def test_no_source_text_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python source text"):
        module("data").read_corpus(tmp_path)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    data = module("data")
    text = np.arange(5000, dtype=np.int64).astype(np.uint8)

    def batch(seed: int, step: int) -> bytes:
        windows: np.ndarray = data.train_batch(text, seed=seed, step=step, rows=4, context=8)
        assert windows.shape == (4, 9)
        return windows.tobytes()

    assert batch(1, 7) == batch(1, 7)
    assert len({batch(1, 7), batch(1, 8), batch(2, 7)}) == 3


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 0), ("a b", 3), ("    x", 2), ("     x", 3), (" " * 32 + "x", 2), (" " * 36, 2), ("\tx\u20ac", 5)],
)
def test_tokens_come_back_as_the_text(text: str, size: int) -> None:
    tokens = module("tokens")
    folded = tokens.encode(text.encode())
    assert len(folded) == size
    assert tokens.decode(folded).decode() == text


# --- checkpoints ---


def arrays(value: float) -> dict[str, np.ndarray]:
    return {"weights/a": np.full((64, 64), value, np.float32)}


def test_a_checkpoint_comes_back_as_saved_and_old_ones_go(tmp_path: Path) -> None:
    checkpoint = module("checkpoint")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, arrays(step))
    saved, damaged = checkpoint.restore(tmp_path)
    assert saved.header == {"step": 3}
    assert np.array_equal(saved.arrays["weights/a"], arrays(3)["weights/a"])
    assert damaged == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002.npz", "step-00000003.npz"]


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit_of_an_array(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(bytes(body))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(500))


def pickled(path: Path) -> None:
    np.savez(path, a=np.array([object()], dtype=object))


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit_of_an_array, empty, noise, pickled])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: Any) -> None:
    checkpoint = module("checkpoint")
    checkpoint.save(tmp_path, 1, {"step": 1}, arrays(1))
    newest = checkpoint.save(tmp_path, 2, {"step": 2}, arrays(2))
    damage(newest)
    saved, damaged = checkpoint.restore(tmp_path)
    assert saved.header == {"step": 1}
    assert damaged == (newest,)


def test_a_damaged_file_does_not_crowd_out_what_is_saved_after_it(tmp_path: Path) -> None:
    checkpoint = module("checkpoint")
    for step in (8, 9):
        empty(checkpoint.save(tmp_path, step, {}, arrays(0)))
    assert checkpoint.restore(tmp_path)[0] is None
    checkpoint.save(tmp_path, 5, {"step": 5}, arrays(5))
    saved, damaged = checkpoint.restore(tmp_path)
    assert saved.header == {"step": 5}
    assert damaged == ()


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    checkpoint = module("checkpoint")
    checkpoint.save(tmp_path, 1, {"step": 1}, arrays(1))

    def fail_midway(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(tmp_path / "step-00000001.npz", fail_midway)
    assert checkpoint.restore(tmp_path)[0].header == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.npz"]


# --- generation ---


def test_reading_byte_by_byte_scores_as_reading_at_once(tmp_path: Path) -> None:
    decode = module("decode")
    model = decode.load_model(tiny_model(tmp_path) / "model")
    text = b"def f(x): return"
    at_once = decode._Session(model.config, model.weights).extend(text)
    session = decode._Session(model.config, model.weights)
    for byte in text:
        scores = session.extend(bytes([byte]))
    assert np.allclose(at_once, scores, atol=1e-3)
    shuffled = decode._Session(model.config, model.weights).extend(text[::-1])
    assert not np.allclose(at_once, shuffled, atol=1e-1), "the order of the text must matter"


def test_the_window_slides_past_the_context(tmp_path: Path) -> None:
    decode = module("decode")
    model = decode.load_model(tiny_model(tmp_path) / "model")
    session = decode._Session(model.config, model.weights)
    for byte in b"x" * (3 * model.config.context):
        scores = session.extend(bytes([byte]))
    assert np.isfinite(scores).all()
    assert session._cache[0][0].shape[1] == model.config.context - 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "drawn"), [(0.0, 1.0, {2}), (1.0, 0.0, {2}), (1.0, 0.6, {1, 2}), (1.0, 1.0, {0, 1, 2})]
)
def test_only_bytes_within_top_p_are_drawn(temperature: float, top_p: float, drawn: set[int]) -> None:
    decode = module("decode")
    scores = np.log(np.array([0.15, 0.35, 0.5]))
    sampling = decode.Sampling(temperature=temperature, top_p=top_p)
    rng = np.random.default_rng(0)
    assert {decode.draw(scores, sampling, rng) for _ in range(300)} == drawn


# --- answers ---


class Script:
    """A model that says what it is told: the fake of ``decode.Model`` for the shapes of answers."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def generate(self, _prompt: bytes, _sampling: Any) -> Iterator[int]:
        yield from self.text


def say(text: bytes, **fields: Any) -> tuple[list[str], Any]:
    api = module("openai_api")
    body = json.dumps({"model": "m", "prompt": "p", **fields}).encode()
    choice = api.Choice(Script(text), api.parse_request(body, chat=False, served="m"), 0)
    return [piece for piece in choice if piece], choice


def test_a_character_of_many_bytes_is_never_cut() -> None:
    pieces, choice = say("a\u00e9\u20ac\U0001f600".encode())
    assert pieces == ["a", "\u00e9", "\u20ac", "\U0001f600"]
    assert choice.tokens == 10
    pieces, choice = say("\u20ac\u20ac".encode(), max_tokens=4)
    assert pieces == ["\u20ac"]
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "text", "finish_reason"),
    [
        ("cd", "ab", "stop"),
        (["xx", "e"], "abcd", "stop"),
        ("abcdefg", "abcdef", "stop"),
        ("zz", "abcdef", "stop"),
        (["f", "bc"], "a", "stop"),
    ],
)
def test_text_ends_before_a_stop_string_and_nothing_of_it_is_sent(stop: Any, text: str, finish_reason: str) -> None:
    pieces, choice = say(b"abcdef", stop=stop)
    assert "".join(pieces) == text
    assert choice.finish_reason == finish_reason


# --- the server ---


class Server:
    """serve.py as a process of its own."""

    def __init__(self, folder: Path, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {"PORT": str(self.port), "TIDEMILL_INPUT_DIR": str(folder), "OMP_NUM_THREADS": "1", **env}
        self.process = subprocess.Popen(
            [sys.executable, "serve.py"],
            cwd=EXAMPLE,
            env={**os.environ, **settings, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("serving  ")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        connection = self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data)
        answer = connection.getresponse()
        value = json.loads(answer.read())
        connection.close()
        return answer.status, value

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def open_stream(self, **fields: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self.connect()
        body = {"model": "quickstart-gpt", "prompt": "def ", "stream": True, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body))
        return connection, connection.getresponse()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tiny_model(tmp_path_factory.mktemp("served")))
    yield running
    assert running.stop() == 0


def events(answer: http.client.HTTPResponse) -> list[str]:
    return [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]


def test_health_and_models(server: Server) -> None:
    assert server.ask("GET", "/health") == (200, {"status": "ok"})
    status, models = server.ask("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in models["data"]] == ["quickstart-gpt"]


def test_a_completion_counts_its_bytes_and_repeats_with_its_seed(server: Server) -> None:
    body = {"model": "quickstart-gpt", "prompt": "def caf\u00e9", "max_tokens": 24, "seed": 5, "n": 2, "temperature": 1}
    status, first = server.ask("POST", "/v1/completions", body)
    assert status == 200
    assert first["object"] == "text_completion"
    assert first["usage"]["prompt_tokens"] == 9
    assert first["usage"]["total_tokens"] == 9 + first["usage"]["completion_tokens"]
    assert [choice["index"] for choice in first["choices"]] == [0, 1]
    assert first["choices"][0]["text"] != first["choices"][1]["text"]
    again = server.ask("POST", "/v1/completions", body)[1]
    assert [choice["text"] for choice in again["choices"]] == [choice["text"] for choice in first["choices"]]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_says_what_the_whole_answer_says(server: Server, path: str) -> None:
    asked = {"prompt": "def f("} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "def f("}]}
    body = {"model": "quickstart-gpt", "max_tokens": 40, "seed": 3, **asked}
    whole = server.ask("POST", path, body)[1]
    connection = server.connect()
    connection.request("POST", path, json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}))
    answer = connection.getresponse()
    assert answer.getheader("Content-Type", "").startswith("text/event-stream")
    lines = events(answer)
    assert lines.pop() == "[DONE]"
    *rows, usage = [json.loads(line) for line in lines]
    if path == "/v1/completions":
        assert "".join(row["choices"][0]["text"] for row in rows) == whole["choices"][0]["text"]
    else:
        said = "".join(row["choices"][0]["delta"].get("content", "") for row in rows)
        assert said == whole["choices"][0]["message"]["content"]
        assert rows[0]["choices"][0]["delta"]["role"] == "assistant"
    assert rows[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200, "the connection stays usable"


GOOD = {"model": "quickstart-gpt", "prompt": "p", "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{not json", 400, None),
        ("/v1/completions", b"\xff\xfe", 400, None),
        ("/v1/completions", b"", 400, None),
        ("/v1/completions", [], 400, None),
        ("/v1/completions", {"prompt": "p"}, 400, "model"),
        ("/v1/completions", {**GOOD, "model": "gpt-9"}, 404, "model"),
        ("/v1/completions", {**GOOD, "model": 7}, 400, "model"),
        ("/v1/completions", {"model": "quickstart-gpt"}, 400, "prompt"),
        ("/v1/completions", {**GOOD, "prompt": [1, 2]}, 400, "prompt"),
        ("/v1/completions", {**GOOD, "max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/completions", {**GOOD, "max_tokens": True}, 400, "max_tokens"),
        ("/v1/completions", {**GOOD, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {**GOOD, "temperature": 3}, 400, "temperature"),
        ("/v1/completions", b'{"model":"quickstart-gpt","prompt":"p","temperature":NaN}', 400, "temperature"),
        ("/v1/completions", {**GOOD, "top_p": -1}, 400, "top_p"),
        ("/v1/completions", {**GOOD, "stop": ["a"] * 5}, 400, "stop"),
        ("/v1/completions", {**GOOD, "stop": ""}, 400, "stop"),
        ("/v1/completions", {**GOOD, "n": 99}, 400, "n"),
        ("/v1/completions", {**GOOD, "stream": "yes"}, 400, "stream"),
        ("/v1/completions", {**GOOD, "logprobs": 3}, 400, "logprobs"),
        ("/v1/chat/completions", {**GOOD, "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {**GOOD, "messages": [{"role": "user", "content": 4}]}, 400, "messages[0].content"),
        ("/v1/nothing", {}, 404, None),
    ],
)
def test_a_wrong_request_gets_an_openai_error(
    server: Server, path: str, body: Any, status: int, param: str | None
) -> None:
    got, value = server.ask("POST", path, body)
    assert (got, value["error"]["param"]) == (status, param)
    assert value["error"]["type"] == "invalid_request_error"
    assert value["error"]["message"]


def test_a_body_that_is_too_large_is_refused_unread(server: Server) -> None:
    connection = server.connect()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert answer.getheader("Connection") == "close"


def test_a_body_in_chunks_is_read(server: Server) -> None:
    connection = server.connect()
    parts = (part.encode() for part in (json.dumps(GOOD)[:10], json.dumps(GOOD)[10:]))
    connection.request("POST", "/v1/completions", parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 200


LONG = {"max_tokens": 4096, "n": 8, "seed": 1, "top_p": 0.2}  # seconds of work; so low a top_p never ends the file


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work(tmp_path: Path, stream: bool) -> None:
    running = Server(tiny_model(tmp_path), DRAIN_SECONDS="0.5")
    try:
        connection = running.connect()
        body = {"model": "quickstart-gpt", "prompt": "def ", "stream": stream, **LONG}
        connection.request("POST", "/v1/completions", json.dumps(body))
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        time.sleep(0.2)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert running.stop() == 0
        assert running.process.stdout is not None
        assert "every answer finished" in running.process.stdout.read()
    finally:
        running.process.kill()


def test_work_that_somebody_waits_for_is_cut_off_after_the_drain_time(tmp_path: Path) -> None:
    """Shows that the work of the test above would have lasted longer than it waited."""
    running = Server(tiny_model(tmp_path), DRAIN_SECONDS="0.5")
    try:
        _connection, answer = running.open_stream(**LONG)
        assert answer.readline().startswith(b"data: ")
        assert running.stop() == 0
        assert running.process.stdout is not None
        assert "some answers were cut off" in running.process.stdout.read()
    finally:
        running.process.kill()


def test_sigterm_finishes_the_open_stream(tmp_path: Path) -> None:
    running = Server(tiny_model(tmp_path))
    try:
        _connection, answer = running.open_stream(max_tokens=2000, top_p=0.2, seed=1)
        first = answer.readline()
        running.process.send_signal(signal.SIGTERM)
        assert first.startswith(b"data: ")
        assert events(answer)[-1] == "[DONE]"
        assert running.process.wait(20) == 0
        with pytest.raises(ConnectionRefusedError):
            running.ask("GET", "/health")
    finally:
        running.process.kill()


def test_the_official_client_reads_answers_streams_and_errors(server: Server) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    whole = client.completions.create(model="quickstart-gpt", prompt="def f(", max_tokens=20, seed=1)
    stream = client.completions.create(model="quickstart-gpt", prompt="def f(", max_tokens=20, seed=1, stream=True)
    assert "".join(event.choices[0].text for event in stream) == whole.choices[0].text
    asked: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": "def f("}]
    chat = client.chat.completions.create(model="quickstart-gpt", messages=asked, max_completion_tokens=20, seed=1)
    assert chat.choices[0].message.content == whole.choices[0].text
    deltas = client.chat.completions.create(
        model="quickstart-gpt",
        messages=asked,
        max_tokens=20,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    *_, last = deltas
    assert last.usage is not None
    assert last.usage.prompt_tokens == 6
    assert [model.id for model in client.models.list()] == ["quickstart-gpt"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="p")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="quickstart-gpt", prompt="p", temperature=9)


# --- training ---


def run_gang(folder: Path, world_size: int, **env: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "WORLD_SIZE": str(world_size),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "TIDEMILL_CHECKPOINT_DIR": str(folder / "checkpoints"),
        "TIDEMILL_OUTPUT_DIR": str(folder / "output"),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    return [
        subprocess.Popen(
            [sys.executable, "train.py"],
            cwd=EXAMPLE,
            env={**os.environ, **settings, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


@needs_jax
def test_jax_and_numpy_compute_the_same_scores(tmp_path: Path) -> None:
    decode, model = module("decode"), module("model")
    served = decode.load_model(tiny_model(tmp_path) / "model")
    text = b"import os\n\nx"
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)[None]
    trained = np.asarray(model.logits(served.weights, tokens, served.config, lambda x: x))[0, -1]
    assert np.allclose(decode._Session(served.config, served.weights).extend(text), trained, atol=1e-3)


@needs_jax
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_short_run_learns_and_leaves_a_model_that_serves(tmp_path: Path, world_size: int) -> None:
    gang = run_gang(tmp_path / "run", world_size, MAX_STEPS="12", TRAIN_SECONDS="60")
    logs = [worker.communicate(timeout=180)[0] for worker in gang]
    assert [worker.returncode for worker in gang] == [0] * world_size, logs
    assert "done  steps 12" in logs[0] or "done  steps 13" in logs[0]
    metrics = json.loads((tmp_path / "run/output/model/metrics.json").read_text())
    assert metrics["val_loss"] < 4.5 < np.log(256)
    model = module("decode").load_model(tmp_path / "run/output/model")
    assert model.config == module("architecture").Config()


@needs_jax
def test_sigterm_to_one_worker_stops_all_and_the_next_attempt_resumes(tmp_path: Path) -> None:
    gang = run_gang(tmp_path / "run", 2, TRAIN_SECONDS="120")
    assert gang[0].stdout is not None
    log = ""
    while "step " not in log:
        log += gang[0].stdout.readline()
    gang[1].terminate()
    log += gang[0].communicate(timeout=60)[0]
    gang[1].communicate(timeout=60)
    assert [worker.returncode for worker in gang] == [143, 143], log
    stopped = int(log.split("stopped  step ")[1].split(":")[0])
    again = run_gang(tmp_path / "run", 2, TRAIN_SECONDS="120", MAX_STEPS=str(stopped + 4))
    logs = [worker.communicate(timeout=180)[0] for worker in again]
    assert f"step {stopped}  elapsed" in logs[0], logs
    assert "done  steps" in logs[0], logs
