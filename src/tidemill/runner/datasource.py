"""Files of a data set, straight from where they are when the control plane gives an address, through it when not."""

from __future__ import annotations

import http.client
import threading
from typing import Any, BinaryIO, Final, cast
from urllib.parse import urlsplit

from tidemill.model.storage import DataFile
from tidemill.runner.client import CONNECT_TIMEOUT_S, Channel, Refused, Unreachable
from tidemill.runner.prepare import SetupFailed

_TIMEOUT_S: Final = 60.0
_TRIES: Final = 2


class ControlPlaneSource:
    """The files of one manifest, as the control plane gives them to this launch. For one thread."""

    def __init__(self, channel: Channel, manifest: str, name: str) -> None:
        self._channel = channel
        self._manifest = manifest
        self._name = name
        self._direct: tuple[tuple[str, str], http.client.HTTPConnection] | None = None
        self._failures = 0

    def open(self, file: DataFile, offset: int) -> BinaryIO:
        """What comes after ``offset``. An address that was given in vain twice is not asked for again.

        Raises: Unreachable, SetupFailed when the control plane says no.
        """
        path = f"/data/{self._manifest}/{file.digest}"
        if self._failures >= _TRIES:
            path += "?relay=true"
        try:
            response = self._channel.open("GET", path, timeout_s=_TIMEOUT_S, offset=offset)
        except Refused as refusal:
            raise SetupFailed(f"{file.path} of {self._name} could not be fetched: {refusal}") from refusal
        if response.status != 307:
            return _from(response, offset)
        response.read()
        try:
            answer = self._ask(response.headers.get("Location") or "", offset)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._close()
            self._failures += 1
            raise Unreachable(f"the home of {self._name}: {error}") from error
        self._failures = 0
        return answer

    def rest(self, until: threading.Event) -> bool:
        """Whether ``until`` was set while waiting a little."""
        self._channel.close()
        self._close()
        return self._channel.rest(until)

    def _ask(self, address: str, offset: int) -> BinaryIO:
        parts = urlsplit(address)
        where = (parts.scheme, parts.netloc)
        if self._direct is None or self._direct[0] != where:
            self._close()
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._direct = (where, kind(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT_S))
        connection = self._direct[1]
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(_TIMEOUT_S)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("GET", target, headers={"Range": f"bytes={offset}-"} if offset else {})
        response = connection.getresponse()
        if response.status not in (200, 206):
            detail = response.read(300).decode(errors="replace")
            raise ValueError(f"{response.status} {detail}")
        return _from(response, offset)

    def _close(self) -> None:
        if self._direct is not None:
            self._direct[1].close()
            self._direct = None


def _from(response: http.client.HTTPResponse, offset: int) -> BinaryIO:
    """The answer, from the offset on, also when the whole was sent."""
    left = offset if response.status == 200 else 0
    while left and (passed := response.read(min(left, 1 << 20))):
        left -= len(passed)
    answer: Any = response
    return cast("BinaryIO", answer)
