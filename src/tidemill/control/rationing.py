"""Gives gateways their shares of what keys and projects may ask of models, and knows what is used up already.

What counts is in the ledger: a pot is opened with what is there, and goes on with what is entered. What gateways took
and did not hand on yet they say themselves, again and again, so nothing here has to survive this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tidemill.control.identity import Directory
from tidemill.control.projects import Projects
from tidemill.core.limits import MEASURES, Kind, Pot, Report, kind_of, window_of
from tidemill.model.ids import ProjectId, TokenId
from tidemill.model.ledger import TokenTotals, TokenUsage
from tidemill.model.limits import LIMITS, Limit
from tidemill.ports import Store
from tidemill.units import MINUTE_NS, SECOND_NS

_NEW_NS: Final = 3 * SECOND_NS
_LISTENS_NS: Final = 350 * SECOND_NS // 1000
"""So long a control plane that begins listens to what gateways have before it gives anything: more than a tick."""
_PRESENT_NS: Final = 5 * SECOND_NS
_FORGOTTEN_NS: Final = {Kind.RATE: 30 * SECOND_NS, Kind.QUOTA: 30 * SECOND_NS, Kind.GAUGE: 5 * SECOND_NS}
"""After how long a gateway that says nothing is thought to be gone: what it took is in the ledger by then."""
_AHEAD_NS: Final = 5 * MINUTE_NS
"""By how much a gateway's clock may be before this one's."""
_TOLD_EVERY_NS: Final = SECOND_NS

_NAMES: Final = tuple(name for name in LIMITS if "/" in name)
PotKey = tuple[str, str]
"""A key's or a project's id, and the name of a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is told of a pot: what a gateway gets more, what nobody holds, and what others hold."""

    key: PotKey
    begins_ns: int
    granted: int
    left: int
    elsewhere: int
    is_short: bool


@dataclass(slots=True)
class _Gateway:
    number: int
    seen_ns: int
    told_ns: int = 0


class Rationing:
    """All pots. Thread-safe."""

    def __init__(self, store: Store, directory: Directory, projects: Projects, *, clock: Callable[[], int]) -> None:
        self._store = store
        self._directory = directory
        self._projects = projects
        self._clock = clock
        self._began_ns = 0
        """When a gateway first said something."""
        self._pots: dict[PotKey, Pot] = {}
        self._gateways: dict[str, _Gateway] = {}
        self._limits: dict[PotKey, Limit] = {}
        self._limits_version = (0, 0)
        self._lock = threading.Lock()
        self._entering = threading.Lock()
        """Held while usages get into the ledger and the pots, and while a pot is opened by the ledger."""

    @property
    def gateways(self) -> int:
        """How many gateways there are, as far as they were heard of lately."""
        now = self._clock()
        return sum(now - one.seen_ns < _PRESENT_NS for one in list(self._gateways.values()))

    def share(self, gateway: str, number: int, reports: dict[PotKey, tuple[int, Report]]) -> list[Told] | None:
        """What a gateway is told after it said what it has, by window and report; None when it said newer things since.

        ``number`` grows with each call of a gateway.
        """
        known = self._known_limits()
        self._open([(key, begins) for key, (begins, _) in reports.items() if key in known], known)
        with self._lock:
            now = self._clock()
            self._began_ns = self._began_ns or now
            before = self._gateways.get(gateway)
            if before is not None and number <= before.number:
                return None
            self._gateways[gateway] = this = before or _Gateway(number, now)
            this.number, this.seen_ns = number, now
            told = [
                self._share(gateway, key, report, begins, now=now)
                for key, (begins, report) in reports.items()
                if key in known and key in self._pots
            ]
            if now - this.told_ns >= _TOLD_EVERY_NS:
                this.told_ns = now
                self._forget(known, now=now)
                told += [
                    self._told(gateway, key, 0, now=now)
                    for key, pot in self._pots.items()
                    if pot.kind is Kind.QUOTA and key not in reports
                ]
            return told

    def enter(self, usages: Sequence[TokenUsage]) -> int:
        """How many of these are in the ledger now that were not before."""
        with self._entering:
            new = self._store.put_token_usages(usages)
            with self._lock:
                for usage in new:
                    amounts = _amounts(usage.prompt_tokens, usage.completion_tokens, usage.amount_pico)
                    for subject in (usage.token_id, usage.project_id):
                        for limit, pot in self._of(subject):
                            if pot.kind is Kind.QUOTA and usage.at_ns >= pot.begins_ns:
                                pot.booked += amounts[MEASURES.index(limit.measure)]
        return len(new)

    # Inside

    def _of(self, subject: str) -> list[tuple[Limit, Pot]]:
        return [(pot.limit, pot) for name in _NAMES if (pot := self._pots.get((subject, name))) is not None]

    def _share(self, gateway: str, key: PotKey, report: Report, begins: int, *, now: int) -> Told:
        pot = self._pots[key]
        if begins < pot.begins_ns:  # what it holds is of a window that is over
            report = Report(held=0, least=report.least, needed=report.needed, hoped=report.hoped)
        pot.hear(gateway, report, now=now)
        age_ns = now - self._began_ns
        granted = 0 if age_ns < _LISTENS_NS else pot.grant(gateway, report, is_new=age_ns < _NEW_NS, now=now)
        return self._told(gateway, key, granted, now=now)

    def _told(self, gateway: str, key: PotKey, granted: int, *, now: int) -> Told:
        pot = self._pots[key]
        return Told(
            key=key,
            begins_ns=pot.begins_ns,
            granted=granted,
            left=pot.free(now=now),
            elsewhere=pot.elsewhere(gateway),
            is_short=pot.is_short(now=now),
        )

    def _known_limits(self) -> dict[PotKey, Limit]:
        version = (self._directory.version, self._projects.version)
        if version != self._limits_version:
            known: dict[PotKey, Limit] = {}
            for token in self._directory.all():
                if not token.revoked_ns:
                    known |= {(token.id, limit.name): limit for limit in token.limits}
            for project in self._projects.all():
                known |= {(project.id, limit.name): limit for limit in project.limits}
            self._limits, self._limits_version = known, version
        return self._limits

    def _open(self, wanted: Sequence[tuple[PotKey, int]], known: dict[PotKey, Limit]) -> None:
        """Have the pots there that are asked for, of the window that is now, and with the limits that are now."""
        now = self._clock()
        missing = []
        for key, begins in wanted:
            pot = self._pots.get(key)
            is_over = pot is not None and now >= pot.ends_ns
            is_ahead = pot is not None and pot.begins_ns < begins <= now + _AHEAD_NS
            if pot is None or pot.limit != known[key] or is_over or is_ahead:
                missing.append((key, max(now, begins) if begins <= now + _AHEAD_NS else now))
        if not missing:
            return
        with self._entering:
            sums: dict[tuple[str, int], list[int]] = {}
            for key, at in missing:
                limit = known[key]
                begins = at - MINUTE_NS if kind_of(limit) is Kind.RATE else window_of(limit.window, now=at)[0]
                if kind_of(limit) is Kind.GAUGE:
                    booked = 0
                else:
                    subject = key[0]
                    if (subject, begins) not in sums:
                        sums[subject, begins] = self._booked(subject, begins)
                    booked = sums[subject, begins][MEASURES.index(limit.measure)]
                opened = Pot.opened(limit, booked=booked, now=at)
                with self._lock:
                    before = self._pots.get(key)
                    if before is not None and before.begins_ns == opened.begins_ns:  # its amount was changed
                        opened.holdings = before.holdings
                    self._pots[key] = opened

    def _booked(self, subject: str, since_ns: int) -> list[int]:
        totals: tuple[TokenTotals, ...]
        if subject in self._projects.by_id:
            totals = self._store.token_totals(project_id=ProjectId(subject), since_ns=since_ns, by=())
        else:
            totals = self._store.token_totals(token_id=TokenId(subject), since_ns=since_ns, by=())
        if not totals:
            return [0] * len(MEASURES)
        [whole] = totals
        return _amounts(whole.prompt_tokens, whole.completion_tokens, whole.amount_pico, requests=whole.requests)

    def _forget(self, known: dict[PotKey, Limit], *, now: int) -> None:
        for key in [key for key in self._pots if key not in known]:
            del self._pots[key]
        for pot in self._pots.values():
            pot.forget(before_ns=now - _FORGOTTEN_NS[pot.kind])
        for name in [name for name, one in self._gateways.items() if now - one.seen_ns > max(_FORGOTTEN_NS.values())]:
            del self._gateways[name]


def _amounts(prompt_tokens: int, completion_tokens: int, amount_pico: int, *, requests: int = 1) -> list[int]:
    return [requests, prompt_tokens + completion_tokens, prompt_tokens, completion_tokens, amount_pico, 0]
