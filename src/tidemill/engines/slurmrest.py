"""Slurm through slurmrestd: on a socket of this machine as the user of both, or over HTTP with a JSON web token.

The newest version of the API that the server's own OpenAPI document lists and that is known here is used. What that
version cannot do is seen in the document, too:

====================================  ===============================================================================
to v0.0.38, ``signal`` has no ``B:``  the warning before a time limit goes to steps, so the runner is made one
no ``flags`` when a job is signalled  a stop is not signalled: the runner finds it in its folder, within its beat
no ``/slurmdb``                       nobody tells of what slurmctld has forgotten
====================================  ===============================================================================

Of the jobs of all users, those of ours are picked out here: slurmrestd has no such list.
Source: https://slurm.schedmd.com/rest.html, https://slurm.schedmd.com/jwt.html.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import pwd
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from tidemill.engines import slurmdocuments
from tidemill.engines.slurmdocuments import Document, Unreadable
from tidemill.engines.slurmending import Ending
from tidemill.engines.slurmport import SlurmJob, SlurmNode, Submission
from tidemill.errors import EngineLost, EngineRefused, InvalidSetting

KNOWN: Final = range(37, 45)
"""The versions of the API, v0.0.37 to v0.0.44, that are known here."""
_DESCRIPTION: Final = "/openapi/v3"
_PATH: Final = re.compile(r"/(?P<part>slurm|slurmdb)/v0\.0\.(?P<version>\d+)/(?P<rest>.*?)/?")
_NEEDED: Final = ("jobs", "job/{job_id}", "job/submit", "nodes", "partitions")
_PORT: Final = 6820
_ANSWER_S: Final = 30.0
_UNKNOWN_JOB: Final = 2017
_DONE: Final = 2021
_UNSPECIFIED: Final = -1
_AWAY: Final = ((1000, 1999), (5000, 5999))
"""Slurm's numbers of errors in reaching its daemons; all others are about what was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What the server talks: the version of its API, that of the accounting (zero: none), and what it can signal."""

    version: int
    accounting: int
    signals_batch: bool

    def path(self, rest: str) -> str:
        """Where something of the cluster is."""
        return f"/slurm/v0.0.{self.version}/{rest}"


class SlurmRest:
    """The cluster of a slurmrestd at ``address``: ``unix:/PATH``, or ``http(s)://HOST[:PORT]``.

    ``token_file`` has a token of ``user``, as ``scontrol token`` prints it; it is read for every request, so it can be
    replaced. Without one the server has to run as this user (``rest_auth/local``).
    """

    def __init__(self, address: str, *, user: str = "", token_file: str = "") -> None:
        """Raises: InvalidSetting for an address, or a token's file, that is none."""
        self.address = checked_address(address)
        self._token_file = token_file
        self._user = user or _own_name()
        self._dialect: Dialect | None = None
        self._finding = threading.Lock()
        if not token_file and not address.startswith("unix:"):
            raise InvalidSetting(
                "Over HTTP, slurmrestd wants a token.", field="rest_token", value="",
                mend="Give a file with one: scontrol token username=NAME lifespan=SECONDS.",
            )  # fmt: skip

    @property
    def warns_steps_only(self) -> bool:
        return self.dialect.version < slurmdocuments.DATA_PARSER

    @property
    def dialect(self) -> Dialect:
        """What the server talks, found once. Raises: EngineRefused when that is nothing known here."""
        with self._finding:
            if self._dialect is None:
                self._dialect = dialect_of(self._answer("GET", _DESCRIPTION))
            return self._dialect

    def submit(self, submission: Submission) -> str:
        path = self.dialect.path("job/submit")
        answer = self._answer("POST", path, body=slurmdocuments.submission(submission, self.dialect.version))
        try:
            return slurmdocuments.job_number(answer)
        except Unreadable as error:
            raise _unreadable("POST", path, error) from error

    def cancel(self, job: str) -> None:
        self._delete(job)

    def terminate(self, job: str) -> None:
        if self.dialect.signals_batch:
            self._delete(job, signal="TERM", flags="BATCH_JOB")

    def jobs(self, name: str = "") -> tuple[SlurmJob, ...]:
        path = self.dialect.path("jobs")
        answer = self._answer("GET", path)
        try:
            ours = [
                (at, each)
                for at, each in enumerate(slurmdocuments.items(answer, "jobs"))
                if slurmdocuments.user_of(each) in (self._user, _number_of(self._user))
                and (not name or each.get("name") == name)
            ]
            return tuple(slurmdocuments.job(each, f"jobs[{at}]") for at, each in ours)
        except Unreadable as error:
            raise _unreadable("GET", path, error) from error

    def nodes(self) -> tuple[SlurmNode, ...]:
        path = self.dialect.path("nodes")
        partitions = None
        try:
            if self.dialect.version < slurmdocuments.DATA_PARSER:
                listed = slurmdocuments.items(self._answer("GET", self.dialect.path("partitions")), "partitions")
                partitions = slurmdocuments.partitions_by_node(listed)
            found = slurmdocuments.items(self._answer("GET", path), "nodes")
            return tuple(slurmdocuments.node(each, f"nodes[{at}]", partitions) for at, each in enumerate(found))
        except Unreadable as error:
            raise _unreadable("GET", path, error) from error

    def ended(self, job: str, name: str) -> Ending | None:
        path = self.dialect.path(f"job/{quote(job, safe='')}")
        answer = self._answer("GET", path, ignored=(_UNKNOWN_JOB,))
        try:
            for at, each in enumerate(slurmdocuments.items(answer, "jobs") if "jobs" in answer else ()):
                if each.get("name") == name:
                    return slurmdocuments.ended(each, f"jobs[{at}]")
        except Unreadable as error:
            raise _unreadable("GET", path, error) from error
        return None

    def accounted(self, job: str, name: str) -> Ending | None:
        if not self.dialect.accounting:
            return None
        path = f"/slurmdb/v0.0.{self.dialect.accounting}/job/{quote(job, safe='')}"
        with suppress(EngineLost, EngineRefused):
            answer = self._answer("GET", path)
            try:
                for at, each in enumerate(slurmdocuments.items(answer, "jobs")):
                    if each.get("name") == name:
                        return slurmdocuments.accounted(each, f"jobs[{at}]")
            except Unreadable as error:
                raise _unreadable("GET", path, error) from error
        return None

    def close(self) -> None:
        """Nothing is held: each request has a connection of its own."""

    def _delete(self, job: str, **query: str) -> None:
        path = self.dialect.path(f"job/{quote(job, safe='')}")
        self._answer("DELETE", path, query=query, ignored=(_UNKNOWN_JOB, _DONE))

    # ------------------------------------------------------------------ one request

    def _answer(
        self,
        method: str,
        path: str,
        *,
        body: Document | None = None,
        query: Mapping[str, str] | None = None,
        ignored: tuple[int, ...] = (),
    ) -> Document:
        """The document that it answers with. Raises: EngineLost, EngineRefused as Slurm says, but for ``ignored``."""
        headers = {"Accept": "application/json", **self._credentials()}
        if body is not None:
            headers["Content-Type"] = "application/json"
        target = self._base() + path + (f"?{urlencode(query)}" if query else "")
        connection = self._connect()
        try:
            connection.request(method, target, body=None if body is None else json.dumps(body), headers=headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(f"does not answer {method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if status in (401, 403):
            raise self._lost(f"does not take us for {self._user!r}: {status}", mend=self._access())
        document = _document(content) if content or status >= 300 else {}
        told = tuple(slurmdocuments.errors(document or {}))
        if status == 404 and not told:
            self._dialect = None  # another one may answer there by now
            raise self._lost(f"knows no {method} {path}", mend="Which of its plugins are loaded? See slurmrestd -s.")
        if document is None:
            said = content[:80].decode(errors="replace")
            raise self._lost(f"answers {method} {path} with {status} and no JSON: {said!r}")
        found = [(number, words) for number, words in told if number not in ignored]
        if status < 300 or (told and not found):
            return document
        words = "; ".join(dict.fromkeys(words for _, words in found if words)) or str(status)
        if method != "POST" or any(_is_away(number) for number, _ in found) or not found:
            expired = any(number == _UNSPECIFIED for number, _ in found) and self._token_file
            raise self._lost(f"answers {method} {path} with: {words}", mend=self._access() if expired else "")
        raise EngineRefused(
            f"Slurm refused it: {words}", field="slurm", mend="See the site's partition, account and qos."
        )

    def _credentials(self) -> dict[str, str]:
        if not self._token_file:
            return {}
        try:
            token = Path(self._token_file).read_text().strip().rpartition("SLURM_JWT=")[2].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise EngineLost(
                f"The token of slurmrestd cannot be read: {error}", field="rest_token", value=self._token_file,
                mend=self._access(),
            ) from error  # fmt: skip
        until_s = _expiry(token)
        is_over = until_s is not None and until_s <= time.time()
        if is_over or not token or not token.isascii() or not token.isprintable():
            raise EngineLost(
                f"The token for slurmrestd {'has expired' if is_over else 'is none'}.", field="rest_token",
                value=self._token_file, mend=self._access(),
            )  # fmt: skip
        return {"X-SLURM-USER-NAME": self._user, "X-SLURM-USER-TOKEN": token}

    def _access(self) -> str:
        if self._token_file:
            return f"Write a new one: scontrol token username={self._user} lifespan=SECONDS > {self._token_file}."
        return "On a socket without a token, slurmrestd has to run as the outpost's user."

    def _base(self) -> str:
        return "" if self.address.startswith("unix:") else urlsplit(self.address).path.rstrip("/")

    def _connect(self) -> http.client.HTTPConnection:
        if self.address.startswith("unix:"):
            return _SocketConnection(self.address.removeprefix("unix:"), is_ours=not self._token_file)
        parts = urlsplit(self.address)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(
                parts.hostname or "", parts.port or 443, timeout=_ANSWER_S, context=context
            )
        return http.client.HTTPConnection(parts.hostname or "", parts.port or _PORT, timeout=_ANSWER_S)

    def _lost(self, what: str, *, mend: str = "") -> EngineLost:
        what += "." if mend else ""
        return EngineLost(f"slurmrestd at {self.address} {what}", field="rest", value=self.address, mend=mend)


class _SocketConnection(http.client.HTTPConnection):
    """HTTP on a socket of this machine."""

    def __init__(self, path: str, *, is_ours: bool) -> None:
        super().__init__("localhost", timeout=_ANSWER_S)
        self._path = path
        self._is_ours = is_ours

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
        if self._is_ours:
            _, owner, _ = struct.unpack("3i", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if owner not in (0, os.geteuid()):  # 0: systemd made the socket, or it changed its user since
                raise OSError(f"it runs as user {owner}, and jobs would be that one's, not of {os.geteuid()}")


def checked_address(text: str) -> str:
    """The address, if it is one. Raises: InvalidSetting."""
    is_address = text.startswith("unix:/")
    with suppress(ValueError):
        parts = urlsplit(text)
        is_address = is_address or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
        is_address = is_address and not (parts.query or parts.fragment or parts.username)
    if not is_address or not text.isprintable() or " " in text:
        raise InvalidSetting(
            "It is no address of slurmrestd.", field="rest", value=text,
            mend="Write unix:/run/slurmrestd/socket, http://HOST:6820 or https://HOST.",
        )  # fmt: skip
    return text.removesuffix("/")


def dialect_of(description: Document) -> Dialect:
    """What a server talks, from its OpenAPI document. Raises: EngineRefused when nothing of it is known here."""
    paths = description.get("paths")
    offered: dict[tuple[str, int], dict[str, Any]] = {}
    for path, methods in paths.items() if isinstance(paths, Mapping) else ():
        if found := _PATH.fullmatch(path):
            offered.setdefault((found["part"], int(found["version"])), {})[found["rest"]] = methods
    whole = [version for (part, version), has in offered.items() if part == "slurm" and all(map(has.get, _NEEDED))]
    version = max(set(whole) & set(KNOWN), default=0)
    if not version:
        there = ", ".join(f"v0.0.{each}" for each in sorted(whole)) or "none"
        raise EngineRefused(
            f"This slurmrestd has no version of the API that is known here; it has {there}.", field="rest",
            value=there, mend=f"Known are v0.0.{KNOWN[0]} to v0.0.{KNOWN[-1]}: load one with slurmrestd -s or -d.",
        )  # fmt: skip
    books = {each for (part, each), has in offered.items() if part == "slurmdb" and "job/{job_id}" in has}
    kill = offered["slurm", version]["job/{job_id}"].get("delete") or {}
    return Dialect(
        version=version,
        accounting=version if version in books else max(books & set(KNOWN), default=0),
        signals_batch=any(each.get("name") == "flags" for each in kill.get("parameters") or ()),
    )


def _document(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _unreadable(method: str, path: str, error: Unreadable) -> EngineLost:
    return EngineLost(
        f"slurmrestd answers {method} {path}, and {error}.", field=error.field, value=error.value,
        mend=f"See what it promises under {_DESCRIPTION}; without --slurm rest=… Slurm's commands are used.",
    )  # fmt: skip


def _is_away(number: int) -> bool:
    return number == _UNSPECIFIED or any(first <= number <= last for first, last in _AWAY)


def _expiry(token: str) -> float | None:
    """When a token ends, in seconds since 1970; None when it does not say so in a way that can be read here."""
    try:
        body = token.split(".")[1]
        until = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["exp"]
        return float(until)
    except (IndexError, ValueError, KeyError, TypeError):
        return None


def _own_name() -> str:
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())


def _number_of(user: str) -> str:
    with suppress(KeyError):
        return str(pwd.getpwnam(user).pw_uid)
    return user
