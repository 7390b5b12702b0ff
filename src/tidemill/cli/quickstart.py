"""``tidemill quickstart``: a small model trained by a gang, kept, served and asked, with a receipt at the end.

It starts the cloud when none runs here, and then stops it again at the end and on Ctrl-C, unless ``--keep``. What it
submitted is stopped in any case, so that running it again finds everything free.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from tidemill.cli.output import clip, count, emit, facts, note, paint, say, width
from tidemill.cli.quoting import quote_rows, receipt_rows
from tidemill.cli.ticker import Ticker
from tidemill.cli.training import TrainingView
from tidemill.errors import Conflict, Infeasible, NotFound, TidemillError, Unavailable
from tidemill.sdk import connection
from tidemill.sdk.client import Client
from tidemill.sdk.results import Job, LogChunk, Quote, Receipt
from tidemill.sdk.specfile import SpecFile, load
from tidemill.units import format_size

PROMPT = "def fibonacci("
SEED = 7
"""The same model completes the same prompt alike."""
GPU_PACKAGES = ["jax[cuda12]==0.10.2", "numpy==2.4.6"]
ARTIFACT = "quickstart-gpt"
MODEL_PATH = "model"
"""Where the example puts the trained model in its output folder."""
READY_TIMEOUT_S = 180.0
_STEPS = 5


def quickstart_command(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cloud and the model running.")] = False,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the model goes on from.")] = PROMPT,
    json: Annotated[bool, typer.Option("--json", help="Only the outcome, as JSON.")] = False,
) -> int:
    """Train a small language model on this machine, serve it, ask it, and see what that cost.

    Takes a minute or two the first time, which prepares the environment. Ctrl-C leaves nothing running.
    """
    began = time.monotonic()
    examples = examples_folder()
    _need_openai()
    with (
        _alone(),
        _both_signals() as came,
        Quickstart(examples=examples, keep=keep, is_quiet=json, interrupts=came) as tour,
    ):
        outcome = tour.take(prompt)
    outcome["seconds"] = round(time.monotonic() - began, 1)
    if json:
        emit(outcome)
    else:
        say(f"\n{paint('done', 'green')} in {outcome['seconds']:.0f} s")
        say("\nTry next")
        for command, line in tour.hints():
            say(f"  {paint(command.ljust(48), 'cyan')} {paint(line, 'muted')}")
    return 0


@dataclass
class Quickstart:
    """The tour. Leaving it stops what it submitted, and the cloud if it started it."""

    examples: Path
    keep: bool = False
    is_quiet: bool = False
    did_start: bool = False
    home: Path = field(default_factory=connection.home)
    jobs: list[str] = field(default_factory=list)
    client: Client | None = None
    gateway_url: str = ""
    gpus: int = 0
    interrupts: list[int] = field(default_factory=list)
    """Signals that came: what a library made of the exception, an import or a destructor, does not undo them."""

    def __enter__(self) -> Quickstart:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what is ours; a Ctrl-C here does not keep the rest from being stopped."""
        if self.keep and sys.exc_info()[0] is None:
            return
        with _undisturbed(), Ticker(is_silent=self.is_quiet) as ticker:
            if self.client is not None:
                ticker.say("stopping what is left of the quickstart" if self.jobs else "")
                self._stop_jobs(self.client)
                self.client.close()
            if self.did_start:
                from tidemill import bootstrap

                ticker.say("stopping the cloud that the quickstart started")
                bootstrap.stop_daemon(self.home, stop_jobs=True, timeout_s=60)

    def take(self, prompt: str) -> dict[str, Any]:
        """The five steps, and their outcome for programs."""
        client = self._cloud()
        quote = self._quote(client)
        training = self._train(client)
        answer = self._serve(client, training, prompt)
        receipts = self._receipts(client)
        return {
            "quote": quote.to_json(),
            "prompt": prompt,
            "completion": answer,
            "receipts": [receipt.to_json() for receipt in receipts],
        }

    def hints(self) -> list[tuple[str, str]]:
        """The commands to try next, with what they do."""
        if self.did_start and not self.keep:
            return [
                ("tidemill up", "start the cloud, to keep"),
                ("tidemill run -- echo hello", "run a command in it"),
                (f"tidemill run {_nearest(self.examples / 'train.yaml')}", "train it again, and change it"),
            ]
        return [
            ("tidemill ps --all", "what ran"),
            ("tidemill artifact list", "the model that was kept"),
            (f"tidemill run {_nearest(self.examples / 'train.yaml')}", "train it again, and change it"),
        ]

    # --- the steps ---

    def _cloud(self) -> Client:
        self._title(1, "A cloud on this machine")
        with _deferred():
            from tidemill import bootstrap

        if os.environ.get(connection.URL_VARIABLE):
            self.client = Client()
        else:
            self.did_start = not bootstrap.is_running(self.home)
            if self.did_start:
                with self._waiting("starting the cloud"), _deferred():
                    bootstrap.start_daemon(self.home, {})
            self.client = Client(retry_for_s=20)
        status, nodes = self.client.status(), self.client.nodes()
        self.gpus = max((len(node.devices) for node in nodes), default=0)
        self.gateway_url = status.gateway_url
        from tidemill.cli.cloud import machine_rows

        state = "started; it is stopped again at the end" if self.did_start and not self.keep else "runs"
        self._facts([("address", f"{self.client.url}  {paint(state, 'muted')}"), *machine_rows(nodes, status)])
        return self.client

    def _quote(self, client: Client) -> Quote:
        self._title(2, "What training would take, before anything runs")
        quote = client.quote(self._training_spec())
        self._facts(quote_rows(quote))
        if not quote.feasible:
            raise Infeasible(
                "this machine cannot run the quickstart: " + "; ".join(reason.sentence for reason in quote.reasons)
            )
        return quote

    def _train(self, client: Client) -> Job:
        spec = self._training_spec()
        workers = int(spec.spec.get("nodes") or 1)
        self._title(3, f"Training, {count(workers, 'worker')} that start together")
        job = self._submit(client, spec)
        with TrainingView(is_quiet=self.is_quiet) as view:
            for part in client.logs(job.id):
                if isinstance(part, LogChunk):
                    view.log(part)
                else:
                    job = part.job
                    view.job(job)
        job = job if job.is_terminal else client.wait(job.id)
        self._expect_success(job, view.last_lines)
        return job

    def _serve(self, client: Client, training: Job, prompt: str) -> str:
        self._title(4, "The model, kept and served with an OpenAI address")
        with self._waiting("keeping the model"):
            artifact = client.create_artifact(ARTIFACT, job=training.id, path=MODEL_PATH)
        spec = load(self.examples / "serve.yaml")
        service = self._submit(client, spec)
        with self._waiting("placing the service") as ticker:
            service = client.wait(
                service.id,
                until=lambda job: bool(job.endpoint),
                timeout_s=READY_TIMEOUT_S,
                on_update=lambda job: ticker.say(_service_text(job)),
            )
        if service.is_terminal:
            self._expect_success(service, _tail(client, service))
            raise TidemillError("the service ended before it was ready", mend=f"tidemill logs {service.id}")
        self._facts(
            [
                ("artifact", f"{artifact.name}:{artifact.version}  {paint(format_size(artifact.size), 'muted')}"),
                ("address", f"{self.gateway_url}/v1"),
            ]
        )
        model = str((spec.spec.get("service") or {}).get("model") or service.name)
        return self._ask(client, model, prompt)

    def _ask(self, client: Client, model: str, prompt: str) -> str:
        """The completion, shown as it comes through the official ``openai`` client."""
        with self._waiting("loading the openai client"):
            with _deferred():
                import openai

            asked = openai.OpenAI(
                base_url=f"{self.gateway_url}/v1", api_key=connection.find(None, None).token, max_retries=3, timeout=60
            )
        if not self.is_quiet:
            say()
            sys.stdout.write("  " + paint(prompt, "bold"))
            sys.stdout.flush()
        pieces = []
        began = time.monotonic()
        first = 0.0
        for part in asked.completions.create(model=model, prompt=prompt, max_tokens=120, seed=SEED, stream=True):
            text = part.choices[0].text if part.choices else ""
            first = first or time.monotonic() - began
            pieces.append(text)
            if not self.is_quiet:
                sys.stdout.write(text.replace("\n", "\n  "))
                sys.stdout.flush()
        del client
        if not self.is_quiet:
            say()
            took = time.monotonic() - began
            say(paint(f"\n  first token after {first * 1000:.0f} ms, all of it after {took:.1f} s", "muted"))
        return "".join(pieces)

    def _receipts(self, client: Client) -> list[Receipt]:
        self._title(5, "What it took")
        if not self.keep:
            with self._waiting("stopping the service"):
                self._stop_jobs(client)
        receipts = [client.receipt(ref) for ref in self.jobs]
        for receipt in receipts:
            if not self.is_quiet:
                say(f"  {paint(receipt.name, 'bold')}")
            self._facts(receipt_rows(receipt), indent=4)
        return receipts

    # --- parts of steps ---

    def _training_spec(self) -> SpecFile:
        """The training as it is in the file; on GPUs where a machine has some, one for each worker."""
        file = load(self.examples / "train.yaml")
        if not self.gpus:
            return file
        on_gpus = {
            "nodes": min(int(file.spec.get("nodes") or 1), self.gpus),
            "resources": {**file.spec["resources"], "gpus": 1},
            "env": {**file.spec["env"], "packages": GPU_PACKAGES},
        }
        return replace(file, spec={**file.spec, **on_gpus})

    def _submit(self, client: Client, spec: SpecFile) -> Job:
        """The job, noted as ours before a Ctrl-C can come between."""
        with self._waiting("sending the code"), _deferred():
            job = client.submit(spec).jobs[0]
            self.jobs.append(job.id)
        return job

    def _stop_jobs(self, client: Client) -> None:
        for ref in self.jobs:
            with contextlib.suppress(NotFound, Conflict, Unavailable):
                if not client.job(ref).is_terminal:
                    client.stop(ref)
        for ref in self.jobs:
            with contextlib.suppress(NotFound, Unavailable):
                client.wait(ref, timeout_s=30)

    def _expect_success(self, job: Job, last_lines: list[str]) -> None:
        if job.state == "succeeded":
            return
        told = "".join(f"\n  {clip(line, width() - 4)}" for line in last_lines[-12:])
        why = job.detail or job.cause.replace("_", " ") or f"exit code {job.exit_code}"
        raise TidemillError(f"{job.name} {job.state} ({why}); its last lines:{told}", mend=f"tidemill why {job.id}")

    def _title(self, number: int, text: str) -> None:
        if self.interrupts:
            raise KeyboardInterrupt
        if not self.is_quiet:
            say(f"\n{paint(f'{number}/{_STEPS}', 'cyan')} {paint(text, 'bold')}")

    def _facts(self, rows: list[tuple[str, str]], *, indent: int = 2) -> None:
        if not self.is_quiet:
            facts(rows, indent=indent)

    def _waiting(self, text: str) -> Ticker:
        return Ticker(text, is_silent=self.is_quiet)


def examples_folder() -> Path:
    """Where the quickstart's files are: in the checkout, or packed with the installed package.

    Raises: NotFound.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent.parent / "examples" / "quickstart", package / "_examples" / "quickstart"):
        if (folder / "train.yaml").is_file():
            return folder
    raise NotFound("the quickstart's example files are not installed", mend="Run it from a checkout of Tidemill.")


def _need_openai() -> None:
    """Raises: Unavailable when the client that step 4 asks through is not there; better now than after training."""
    if importlib.util.find_spec("openai") is None:
        raise Unavailable(
            "the quickstart asks the model through the official openai client, which is not installed",
            mend="pip install 'tidemill[quickstart]'  (or make quickstart in a checkout)",
        )


def _service_text(job: Job) -> str:
    if job.state == "queued":
        return "the service waits" + (f": {job.reason.sentence}" if job.reason else "")
    return "the service is being prepared" if job.state == "starting" else "the service loads the model"


def _tail(client: Client, job: Job) -> list[str]:
    chunks = client.logs(job.id, follow=False, tail=12)
    text = "".join(part.text for part in chunks if isinstance(part, LogChunk))
    return text.splitlines()


def _nearest(path: Path) -> str:
    """A path as short as it can be written from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One quickstart at a time in a home. Raises: Conflict when another one runs."""
    home = connection.home()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "quickstart.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"another quickstart runs in {home}",
                mend=f"Wait for it, or give this one its own home: {connection.HOME_VARIABLE}=… tidemill quickstart",
            ) from error
        yield


@contextlib.contextmanager
def _both_signals() -> Iterator[list[int]]:
    """SIGTERM ends it as Ctrl-C does: with everything stopped. Gives the signals that came so far."""
    came: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    with _handling(signal.SIGINT, end), _handling(signal.SIGTERM, end), _handling(signal.SIGHUP, end):
        yield came


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    """Signals take effect at the end: what is begun here is noted, so that it can be stopped."""
    came: list[int] = []

    def note_it(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    with _handling(signal.SIGINT, note_it), _handling(signal.SIGTERM, note_it), _handling(signal.SIGHUP, note_it):
        yield
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait: stopping goes on to its end. A second Ctrl-C is answered with a word."""

    def answer(_number: int, _frame: FrameType | None) -> None:
        note("stopping; a moment")

    with _handling(signal.SIGINT, answer), _handling(signal.SIGTERM, answer), _handling(signal.SIGHUP, answer):
        yield


@contextlib.contextmanager
def _handling(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
