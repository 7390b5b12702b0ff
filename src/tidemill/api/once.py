"""Small writes that must not happen twice: the answer to a key is kept and given again.

What submits work keeps its answer in the store, in the same transaction. For the few other writes that are not
harmless to repeat (a new token, a new version of an artifact, a command), memory is enough: a client
repeats within seconds, and after a restart of the control plane the worst is a second token that nobody knows.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.responses import Response

from tidemill.errors import IdempotencyMismatch

_KEPT: Final = 4_096
_KEPT_S: Final = 3_600.0


class Once:
    """Answers by caller and key. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answers: OrderedDict[tuple[str, str], tuple[str, float, asyncio.Future[Response]]] = OrderedDict()

    async def answer(self, caller: str, key: str, request: bytes, work: Callable[[], Awaitable[Response]]) -> Response:
        """What ``work`` answers, done once for all requests with that key; errors are not kept.

        Raises: IdempotencyMismatch when the key came with another request.
        """
        if not key:
            return await work()
        digest = request_digest(request)
        known = self._answers.get((caller, key))
        if known is not None and self._clock() - known[1] < _KEPT_S:
            if known[0] != digest:
                raise mismatch(key)
            kept = await asyncio.shield(known[2])
            return Response(bytes(kept.body), kept.status_code, media_type="application/json")
        task = asyncio.ensure_future(work())
        self._answers[caller, key] = (digest, self._clock(), task)
        while len(self._answers) > _KEPT:
            self._answers.popitem(last=False)
        try:
            return await asyncio.shield(task)
        except BaseException:
            if task.done():
                self._answers.pop((caller, key), None)
            raise


def request_digest(request: bytes) -> str:
    """What tells one request from another."""
    return hashlib.sha256(request).hexdigest()


def mismatch(key: str) -> IdempotencyMismatch:
    """The error for a key that came with another request."""
    return IdempotencyMismatch(
        "This Idempotency-Key came with another request before.",
        field="Idempotency-Key",
        value=key,
        mend="Use a new key for a new request.",
    )
