"""How a machine joins a cloud and leaves it: the steps, each of which may be repeated."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tidemill.errors import (
    Conflict,
    ErrorKind,
    InvalidRequest,
    NotFound,
    TidemillError,
    Unauthorized,
    Unavailable,
)
from tidemill.outpost.config import OutpostConfig, new_key, read_config, write_config
from tidemill.outpost.main import channel_of, running_pid
from tidemill.runner.client import Channel, Refused, Unreachable, trusting

DEFAULT_PORT: Final = 7070
_PATIENCE_S: Final = 20.0
_STARTING_S: Final = 60.0
_HEAD_S: Final = 60.0
_FINGERPRINT: Final = re.compile(r"sha256:[0-9a-f]{64}")


def url_of(host: str) -> str:
    """The control plane's address from what a person writes: a host, ``host:port`` or a URL.

    Raises: InvalidRequest.

    >>> url_of("10.0.0.5"), url_of("head:8080"), url_of("https://cloud.example.org/")
    ('http://10.0.0.5:7070', 'http://head:8080', 'https://cloud.example.org')
    """
    text = host.strip().rstrip("/")
    if "://" in text:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and not parts.path:
            return text
    elif text and "/" not in text and not text.endswith(":") and not any(letter.isspace() for letter in text):
        parts = urlsplit(f"http://{text}")
        try:
            return f"http://{text}" if parts.port else f"http://{text}:{DEFAULT_PORT}"
        except ValueError:
            pass
    raise InvalidRequest(
        "This is not the address of a control plane.", field="host", value=host, mend="Write 10.0.0.5 or https://…"
    )


def own_address(control_url: str) -> str:
    """The address of this machine on the way to the control plane."""
    parts = urlsplit(control_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, kind, _, _, where = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise Unavailable(
            f"There is no way to {parts.hostname}: {error.strerror or error}.", field="host", value=control_url
        ) from None


def vouching(control_url: str, *, ca: Path | None = None, fingerprint: str = "") -> str:
    """The certificates, as PEM, that vouch for the control plane: a file's, or its own once it has that fingerprint.

    Nothing is sent to it before. Empty where neither is given: what this machine trusts vouches.
    Raises: InvalidRequest, Unauthorized when another certificate is shown, Unavailable.
    """
    parts = urlsplit(control_url)
    if (ca is not None or fingerprint) and parts.scheme != "https":
        raise InvalidRequest(
            "Only https has certificates.", field="host", value=control_url, mend="Write https://… before the host."
        )
    if ca is not None:
        try:
            text = ca.read_text()
            trusting(text)
        except (OSError, ValueError) as error:
            mend = "Give a PEM file with the certificate of the authority."
            raise InvalidRequest(f"It cannot be used: {error}.", field="ca", value=str(ca), mend=mend) from None
        return text
    if not fingerprint:
        return ""
    if not _FINGERPRINT.fullmatch(fingerprint.lower()):
        mend = "Write it as tidemill site token shows it: sha256: and 64 digits."
        raise InvalidRequest("That is no fingerprint.", field="fingerprint", value=fingerprint, mend=mend)
    try:
        shown = ssl.get_server_certificate((str(parts.hostname), parts.port or 443), timeout=_PATIENCE_S)
    except OSError as error:
        mend = "See that its host is reachable from here, and that it has the setting tls_cert."
        raise Unavailable(f"The control plane does not answer with TLS: {error}.", field="host", mend=mend) from None
    found = f"sha256:{hashlib.sha256(ssl.PEM_cert_to_DER_cert(shown)).hexdigest()}"
    if found != fingerprint.lower():
        raise Unauthorized(
            f"Another certificate is shown there: {found}.",
            field="fingerprint",
            value=fingerprint,
            mend="Do not go on unless you know why: ask for a new command with tidemill site token.",
        )
    return shown


def join(home: Path, token: str, asked: OutpostConfig) -> OutpostConfig:
    """The outpost as it joined, written down in its home; harmless to repeat, also after a lost answer.

    ``asked`` describes it; its key and node id are those of an earlier joining from that home.
    Raises: TidemillError as the control plane answers, Unavailable, Conflict when another cloud has this machine.
    """
    config = _with_identity(home, asked)
    channel = Channel(api_url=config.control_url, endpoint_file=None, token=token, prefix="/v1", ca=config.ca)
    found = _joining(channel)
    told = {str(name): str(value) for name, value in dict(found["settings"]).items()}
    settings = tuple(sorted({**dict(asked.settings), **told}.items()))
    config = replace(config, engine=str(found["engine"]), site=str(found["site"]), settings=settings)
    write_config(home, config)  # before the control plane is asked, so that the key is never lost
    body = {"name": config.name, "key": config.key, "engine": config.engine}
    made = _ask(channel, "POST", "/outposts", body)
    channel.close()
    config = replace(config, site_id=str(made["site_id"]), outpost_id=str(made["id"]), token=str(made["token"]))
    write_config(home, config)
    return config


def _joining(channel: Channel) -> dict[str, Any]:
    """The site to join, once its cluster's head is there if it has one. Raises: Unavailable when that takes long."""
    until_s = time.monotonic() + _HEAD_S
    while True:
        found = _ask(channel, "GET", "/joining")
        if found["engine"] != "ray" or "ray_address" in found["settings"]:
            return found
        if time.monotonic() > until_s:
            raise Unavailable(
                f"The head of {found['site']}'s Ray cluster does not answer.",
                field="site",
                value=found["site"],
                mend="See tidemill site list; the head is started by tidemill up --engine ray.",
            )
        time.sleep(0.5)


def leave(home: Path, *, told: Callable[[int], None] = lambda _: None, patience_s: float = 0.0) -> OutpostConfig:
    """The outpost that left: its machine was drained, and its process has ended.

    ``told`` is called with the number of jobs that run still. Raises: Conflict when some do after ``patience_s`` (zero:
    no limit), NotFound when nothing joined from there.
    """
    config = read_config(home)
    channel = channel_of(home, config)
    until_s = time.monotonic() + patience_s if patience_s else float("inf")
    while True:
        try:
            answer = _ask(channel, "POST", "/leave", {"node": config.node_id})
        except (NotFound, Unauthorized):
            break  # it was removed already
        if answer["left"]:
            break
        running = len(answer["running"])
        told(running)
        if time.monotonic() > until_s:
            raise Conflict(
                f"{running} of its jobs run still; it is drained, so nothing new comes.",
                field="machine",
                value=config.name,
                mend="Wait for them, or ask again with a longer --timeout.",
            )
        time.sleep(0.5)
    channel.close()
    stop_outpost(home)
    (home / "outpost.json").unlink(missing_ok=True)
    return config


def start_outpost(home: Path) -> bool:
    """Whether it had to be started; it serves now. Raises: TidemillError as the process says."""
    if running_pid(home):
        return False
    reading, writing = os.pipe()
    with (home / "outpost.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidemill.outpost.main", str(home), str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(writing,),
            cwd="/",
        )
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    told: dict[str, Any] = json.loads(answer) if answer else {}
    if told.get("ready"):
        return True
    process.wait(timeout=_STARTING_S)
    raise TidemillError(
        str(told.get("detail") or "The outpost ended while it started."),
        field=str(told.get("field") or ""),
        mend=str(told.get("mend") or f"See {home / 'outpost.log'}."),
    )


def stop_outpost(home: Path, *, timeout_s: float = 15.0) -> bool:
    """Whether it ran; it does not any more. What runs on the machine goes on."""
    pid = running_pid(home)
    if not pid:
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return True
        until_s = time.monotonic() + timeout_s
        while running_pid(home) and time.monotonic() < until_s:
            time.sleep(0.02)
    return True


def _with_identity(home: Path, asked: OutpostConfig) -> OutpostConfig:
    try:
        known = read_config(home)
    except NotFound:
        return replace(asked, key=new_key(), node_id=f"node_{new_key()[:16]}")
    if known.token and known.control_url != asked.control_url:
        raise Conflict(
            f"This machine is part of the cloud at {known.control_url}.",
            field="host",
            value=asked.control_url,
            mend="Have it leave first: tidemill leave. Or join from another --home.",
        )
    return replace(asked, key=known.key, node_id=known.node_id)


def _ask(channel: Channel, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer, for which is waited a little. Raises: TidemillError as the control plane says, Unavailable."""
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return channel.call(method, path, None if body is None else json.dumps(body).encode())
        except Unreachable as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise Unauthorized(
                    f"It is not certain that this is the control plane: {error.__cause__.verify_message}.",
                    field="host",
                    mend="Say what vouches for it: --ca FILE, or the --fingerprint that tidemill site token shows.",
                ) from None
            if time.monotonic() > until_s:
                raise Unavailable(
                    f"The control plane does not answer: {error}.",
                    mend="See that its host is reachable from here, and that it listens there: tidemill up --host.",
                ) from None
            time.sleep(0.5)
        except Refused as refusal:
            raise _translated(refusal) from None


def _translated(refusal: Refused) -> TidemillError:
    body = refusal.body
    kinds = [NotFound, Unauthorized, Conflict, InvalidRequest, Unavailable]
    kind = next((one for one in kinds if one.kind.value == body.get("kind")), TidemillError)
    if body.get("kind") == ErrorKind.FORBIDDEN.value:
        kind = Unauthorized
    return kind(
        str(body.get("detail") or refusal),
        field=str(body.get("field") or ""),
        value=body.get("value"),
        mend=str(body.get("mend") or ""),
    )
