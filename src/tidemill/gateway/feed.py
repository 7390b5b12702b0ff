"""Keeps the table current: long polls of the control plane, and a copy on disk for when it is away."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from tidemill.gateway.books import Refused
from tidemill.gateway.table import FeedError, Table, read_feed
from tidemill.gateway.upstream import Pool, fetch

_log = logging.getLogger("tidemill.gateway")
_FEED_LIMIT = 64 * 1024 * 1024


def load(path: Path) -> Table | None:
    """The last good copy, None when there is none that can be read."""
    try:
        return read_feed(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, FeedError) as error:
        _log.warning("the kept copy of the feed is not used: %s", error)
        return None


def save(path: Path, raw: bytes) -> None:
    """Replace the copy by ``raw``, whole or not at all, readable by the owner only."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Feed:
    """Follows the control plane for as long as ``follow`` runs. Its absence changes nothing but the age."""

    def __init__(
        self,
        *,
        control: str,
        token_file: Path,
        copy: Path,
        adopt: Callable[[Table], None],
        wait_s: int = 20,
        pause_s: float = 0.2,
    ) -> None:
        parts = urlsplit(control)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{control!r} is not the control plane's address; it should be like http://127.0.0.1:7070")
        self._address = (parts.hostname, parts.port or 80)
        self._token_file = token_file
        self._copy = copy
        self._adopt = adopt
        self._wait_s = wait_s
        self._pause_s = pause_s
        self._pool = Pool()
        self.token = ""
        """The gateway's own, as last read."""
        self.table = load(copy)
        self.heard_at = float("-inf")
        """When the control plane last answered, by the loop's clock."""
        if self.table is not None:
            adopt(self.table)

    async def follow(self) -> None:
        """Poll for ever."""
        failures = 0
        while True:
            try:
                await self._poll()
            except (OSError, FeedError, ValueError) as error:
                if not failures:
                    _log.warning("the control plane gives no feed, serving on with what is known: %s", error)
                failures += 1
                await asyncio.sleep(min(2.0, self._pause_s * 2 ** min(failures, 10)))
            else:
                if failures:
                    _log.warning("the control plane gives its feed again")
                failures = 0

    async def report(self, target: str, body: bytes) -> None:
        """Tell the control plane something, in JSON. Raises: OSError when it was not taken, Refused for good."""
        await self.ask(target, body)

    async def ask(self, target: str, body: bytes, *, limit: int = 64 * 1024) -> bytes:
        """The control plane's answer, in JSON, of ``limit`` bytes at most. Raises: as ``report``."""
        status, answer = await fetch(
            self._pool,
            self._address,
            target,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
            timeout_s=10,
            limit=limit,
            body=body,
        )
        if status in (400, 413, 422):
            raise Refused(answer[:500].decode(errors="replace"))
        if not 200 <= status < 300:
            raise ConnectionError(f"it answered {status}")
        return answer

    async def _poll(self) -> None:
        asked_at = asyncio.get_running_loop().time()
        since = self.table.version if self.table is not None else -1
        self.token = self._token_file.read_text().strip()
        status, body = await fetch(
            self._pool,
            self._address,
            f"/v1/gateway/feed?since={since}&wait={self._wait_s}",
            headers={"Authorization": f"Bearer {self.token}", "Accept": "application/json"},
            timeout_s=self._wait_s + 10,
            limit=_FEED_LIMIT,
        )
        if status != 200:
            raise FeedError(f"it answered {status}")
        table = await asyncio.to_thread(read_feed, body, self.table)
        self.heard_at = asyncio.get_running_loop().time()
        if self.table is not None and table.raw == self.table.raw:
            await asyncio.sleep(max(0.0, self._pause_s - (self.heard_at - asked_at)))  # never a busy loop
            return
        self.table = table
        self._adopt(table)
        try:
            await asyncio.to_thread(save, self._copy, body)
        except OSError as error:
            _log.warning("the copy of the feed could not be kept: %s", error)
