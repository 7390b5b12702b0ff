"""A request that is with a second replica as well, because the first one takes long: whoever answers first has it.

Only before the first byte, only what may be sent twice without harm, and only out of the model's budget for second
tries. The slower one's connection is closed at once, which is how an engine is told to stop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tidemill.gateway.messages import ResponseHead
from tidemill.gateway.table import Replica
from tidemill.gateway.upstream import UpstreamConnection

if TYPE_CHECKING:
    from tidemill.gateway.journey import Journey
    from tidemill.gateway.server import Gateway


class Hedge:
    """The second try. It is over with the first byte of either, or when its own replica fails."""

    def __init__(self, journey: Journey, gateway: Gateway, replica: Replica, *, connect_s: float) -> None:
        self.replica = replica
        self._journey = journey
        self._gateway = gateway
        self._connect_s = connect_s
        self._upstream: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        replica.circuit.begin()
        replica.under_way.add(self)
        replica.turn = gateway.next_turn()

    def start(self) -> None:
        """Send the request."""
        upstream = self._gateway.pool.take(self.replica.address)
        if upstream is not None:
            self._send(upstream)
        else:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    def cancel(self) -> None:
        """Its answer is not wanted: the replica is to stop at once."""
        self._leave()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abandon()
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()

    def ejected(self, why: str) -> None:
        """The replica is not waited for."""
        self.cancel()
        self._journey.hedge_failed(why, is_ejected=True)

    def response_started(self, head: ResponseHead) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            self._journey.overtaken(self, upstream, head)

    def response_data(self, data: bytes) -> None:
        """Nothing comes here: with its first byte the response is the journey's."""

    def response_ended(self) -> None:
        """As ``response_data``."""

    def response_failed(self, reason: str, *, started: bool) -> None:
        self._upstream = None
        self._leave()
        self._journey.hedge_failed(f"{reason}{' in its first bytes' if started else ''}")

    async def _connect(self) -> None:
        try:
            upstream = await self._gateway.pool.connect(self.replica.address, within_s=self._connect_s)
        except (OSError, ValueError) as error:
            self._connecting = None
            self._leave()
            self._journey.hedge_failed(f"it cannot be reached: {error}")
            return
        self._connecting = None
        self._send(upstream)

    def _send(self, upstream: UpstreamConnection) -> None:
        self._upstream = upstream
        self._journey.transmit(self, upstream, self.replica)

    def _leave(self) -> None:
        self.replica.under_way.discard(self)
        self.replica.circuit.cancel()
