"""What keys and projects may ask of models, in this worker: taken before a request is sent, settled when it is over.

The hot path takes from shares in memory. Another task tells the control plane several times a second what the shares
hold and asks for more; a request for which a share has not enough waits for that, for a moment, when there may be some
elsewhere, and is refused at once when there is not. Without a control plane, this worker goes on with its part.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from tidemill.core.limits import MEASURES, Kind, Share, amounts_of, lacking
from tidemill.gateway import answers
from tidemill.gateway.answers import Answer
from tidemill.gateway.books import Refused
from tidemill.gateway.metering import Usage
from tidemill.gateway.table import Key, Route, Table
from tidemill.model.limits import Measure, limit_of
from tidemill.units import MICRO_PICO, MINUTE_NS, SECOND_NS, USD_MICRO

_TICK_S: Final = 0.2
_GAP_S: Final = 0.02
_LONG_GAP_S: Final = 0.1
_PATIENCE_S: Final = 0.8
"""How long a request waits for a share, when the control plane answers."""
_FIRST_PATIENCE_S: Final = 2.0
"""The same before it has answered for the first time."""
_TIMEOUT_S: Final = 1.0
_FRESH_NS: Final = SECOND_NS // 10
_COPIED_EVERY_NS: Final = SECOND_NS
_MOST_WAITING: Final = 1024
_ASSUMED_OUTPUT: Final = 512
"""Tokens of an answer of which nothing is said, before there was one."""
_BYTES_PER_TOKEN: Final = 3
"""Of a prompt, rather too few than too many: what was reserved too much comes back."""
_MOST_CHOICES: Final = 128
_MONEY: Final = MEASURES.index(Measure.MONEY)
_SHOWN: Final = (
    (Measure.REQUESTS, b"requests"),
    (Measure.TOKENS, b"tokens"),
    (Measure.INPUT, b"input-tokens"),
    (Measure.OUTPUT, b"output-tokens"),
)
_TOLD: Final = (b"limit", b"remaining", b"reset")
_WORDS: Final = {
    Measure.REQUESTS: "requests",
    Measure.TOKENS: "tokens",
    Measure.INPUT: "input tokens",
    Measure.OUTPUT: "output tokens",
    Measure.MONEY: "dollars",
}
_OUTPUT_LIMITS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_log = logging.getLogger("tidemill.gateway")

Ask = Callable[[bytes], Awaitable[bytes]]
"""Tells the control plane and gives its answer. Raises: OSError, Refused."""
_Shown = tuple[bytes, bytes, bytes, tuple[Share, ...]]
"""The names of three headers, and the shares that they tell of."""
Then = Callable[[Answer | None], None]
"""Is called when a request was let in, or with the answer that refuses it."""


class _Told(msgspec.Struct, array_like=True):
    subject: str
    name: str
    begins_ns: int
    granted: int
    left: int
    elsewhere: int
    is_short: bool


class _Answer(msgspec.Struct):
    gateways: int
    shares: list[_Told]


class Charge:
    """What one request takes of the limits of its key and its project."""

    __slots__ = (
        "_amounts",
        "_at_ns",
        "_is_sure",
        "_least",
        "_model",
        "_needs",
        "_rations",
        "_shares",
        "_shown",
        "_then",
        "_timer",
        "waits_since_ns",
    )

    def __init__(
        self,
        rations: Rations,
        shares: tuple[Share, ...],
        shown: tuple[_Shown, ...],
        needs: list[int],
        least: list[int],
        *,
        model: str,
        is_sure: bool,
    ) -> None:
        """``needs`` is what is reserved; without ``is_sure`` it is a guess, and ``least`` of it is enough."""
        self._rations = rations
        self._shares = shares
        self._shown = shown
        self._needs = needs
        self._least = least
        self._model = model
        self._is_sure = is_sure
        self._amounts: list[int] = []
        """What was reserved of each share; empty: nothing yet."""
        self._at_ns = 0
        self.waits_since_ns = 0
        self._then: Then | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_admitted(self) -> bool:
        """Whether it has taken what it needs."""
        return bool(self._amounts)

    def admit(self, then: Then) -> None:
        """Have ``then`` called, at once or in a moment."""
        self._then = then
        self._rations.admit(self)

    def settle(self, usage: Usage | None) -> None:
        """It is over: it took that, or nothing that counts. Also when it was not let in, and is not to be any more."""
        self._then = None
        self._stop_timer()
        if not self._amounts:
            self._rations.leave(self)
            return
        if usage is None:
            used, price = [0] * len(MEASURES), (0, 0)
        else:
            price = usage.price
            used = amounts_of(usage.prompt_tokens, usage.completion_tokens, price)
            self._rations.learn(self._model, usage.completion_tokens)
        for share, reserved in zip(self._shares, self._amounts, strict=True):
            actual = used[share.measure]
            if share.kind is Kind.GAUGE:
                actual = 0
            elif share.measure == 0 and share.kind is Kind.RATE:  # it was asked, whatever came of it
                actual = 1
            if actual != reserved:
                share.give_back(reserved - actual, taken_ns=self._at_ns)
        self._amounts = []

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What clients are told of the limits."""
        return _headers(self._shown, now=self._at_ns)

    # What the rations call

    def attempt(self, *, is_last: bool, now: int) -> bool:
        """Whether it was let in or refused; else it is to wait. ``is_last``: it is not to wait any longer."""
        short = lacking(self._shares, self._needs, now=now)
        if short is None:
            self._take([self._needs[share.measure] for share in self._shares], now)
            return True
        least = self._least[short.measure]
        if least > short.amount:
            self._finish(too_large(short, least, self._shares, now=now))
            return True
        there = short.free(now=now)
        is_enough = not self._is_sure and lacking(self._shares, self._least, now=now) is None
        if is_enough and (is_last or there < self._needs[short.measure]):
            needs = [max(self._least[one.measure], min(self._needs[one.measure], one.balance)) for one in self._shares]
            self._take(needs, now)
            return True
        if is_last or (there < least and now - short.told_ns < _FRESH_NS):
            self._finish(refused(short, least, self._shares, now=now))
            return True
        return False

    def be_alone(self, *, among: int, now: int) -> None:
        """Have this worker's part of each limit, since nobody can be asked."""
        for share in self._shares:
            if now >= share.ends_ns:
                share.roll(now=now)
            if share.balance < self._needs[share.measure]:
                share.be_alone(among=among, now=now)

    def needed(self) -> Iterable[tuple[Share, int]]:
        """What it waits for, of each share."""
        for share in self._shares:
            yield share, self._needs[share.measure]

    def wait(self, patience_s: float) -> None:
        """Wait for no longer than that."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(patience_s, self._rations.run_out, self)

    def _take(self, amounts: list[int], now: int) -> None:
        for share, amount in zip(self._shares, amounts, strict=True):
            share.take(amount)
        self._amounts = amounts
        self._at_ns = now
        self._rations.active.update(self._shares)
        self._finish(None)

    def _finish(self, refusal: Answer | None) -> None:
        self._stop_timer()
        then, self._then = self._then, None
        if then is not None:
            then(refusal)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Rations:
    """All shares of one worker, which is one of ``workers`` as long as nobody says otherwise."""

    def __init__(self, worker: str, *, workers: int, clock: Callable[[], int], copy: Path | None = None) -> None:
        """``copy`` is where what is left of quotas is written down, for a worker that begins and can ask nobody."""
        self.clock = clock
        self.active: set[Share] = set()
        """Shares of which something was taken, or that hold something."""
        self._worker = worker
        self._workers = workers
        self._shares: dict[tuple[str, str], Share] = {}
        self._of: dict[tuple[str, str], tuple[tuple[Share, ...], tuple[_Shown, ...]]] = {}
        """The shares of a key and of who pays."""
        self._by_subject: dict[str, tuple[Share, ...]] = {}
        self._copy = copy
        self._copied_ns = 0
        self._elsewhere: dict[tuple[str, str], _Told] = {} if copy is None else _read(copy)
        """What was told last of quotas."""
        self._outputs: dict[str, int] = {}
        self._waiting: deque[Charge] = deque()
        self._wanted = asyncio.Event()
        self._number = 0
        self._ticked_ns = 0
        self._lets_go = False
        self._is_alone = False
        self._was_heard = False
        self._heard_ns = 0
        self._limits: dict[str, Mapping[str, int]] = {}

    def adopt(self, table: Table) -> None:
        """Hold to the limits of that table from now on."""
        limits = {key.id: key.limits for key in table.keys.values() if key.limits and key.id}
        limits |= {project: given for project, given in table.project_limits.items() if given}
        before, self._limits = self._limits, limits
        self._of = {}
        for subject in [one for one in self._by_subject if limits.get(one) != before.get(one)]:
            for share in self._by_subject.pop(subject):
                self.active.discard(share)
                if share.limit.name not in limits.get(subject, {}):
                    del self._shares[subject, share.limit.name]
            self._shares_of(subject)

    def _shares_of(self, subject: str) -> tuple[Share, ...]:
        """The shares of a key or a project."""
        found = self._by_subject.get(subject)
        if found is None:
            if subject not in self._limits:
                return ()
            made = (self._share(subject, name, amount) for name, amount in self._limits[subject].items())
            found = self._by_subject[subject] = tuple(share for share in made if share is not None)
        return found

    def _share(self, subject: str, name: str, amount: int) -> Share | None:
        try:
            limit = limit_of(name, amount / USD_MICRO if name.startswith(Measure.MONEY) else amount)
        except ValueError:  # of a control plane that is newer
            _log.warning("the limit %r of %s is not known here and not held to", name, subject)
            return None
        before = self._shares.get((subject, name))
        if before is not None and before.limit == limit:
            return before
        share = self._shares[subject, name] = Share(subject, limit)
        if before is not None:
            share.pending, share.spent = before.pending, before.spent
        told = self._elsewhere.get((subject, name))
        now = self.clock()
        share.roll(now=now)
        if told is not None and told.begins_ns == share.begins_ns:
            share.left = told.left
        return share

    def charge(self, key: Key, route: Route, content: dict[str, Any], size: int, *, has_output: bool) -> Charge | None:
        """What that request takes; None when nothing limits it. ``size`` is its body's."""
        payer = key.project or route.project
        known = self._of.get((key.id, payer))
        if known is None:
            found = self._shares_of(key.id) + self._shares_of(payer)
            known = self._of[key.id, payer] = found, _shown_of(found)
        shares, shown = known
        if not shares:
            return None
        prompt = size // _BYTES_PER_TOKEN + 1
        most = _most_output(content) if has_output else 0
        needs = amounts_of(
            prompt, self._outputs.get(route.model, _ASSUMED_OUTPUT) if most is None else most, route.price
        )
        least = needs if most is not None else amounts_of(prompt, 1, route.price)
        return Charge(self, shares, shown, needs, least, model=route.model, is_sure=most is not None)

    def admit(self, charge: Charge) -> None:
        """Let it in or refuse it, at once or in a moment."""
        now = self.clock()
        if self._is_alone:
            charge.be_alone(among=self._workers, now=now)
        if not charge.attempt(is_last=self._is_alone or len(self._waiting) >= _MOST_WAITING, now=now):
            self._waiting.append(charge)
            self._wanted.set()
            charge.waits_since_ns = now
            charge.wait(_PATIENCE_S if self._was_heard else _FIRST_PATIENCE_S)

    def run_out(self, charge: Charge) -> None:
        """It is not to wait any longer."""
        self.leave(charge)
        now = self.clock()
        if self._heard_ns < charge.waits_since_ns:  # nobody said no
            charge.be_alone(among=self._workers, now=now)
        charge.attempt(is_last=True, now=now)

    def leave(self, charge: Charge) -> None:
        """It does not wait any more."""
        if charge in self._waiting:
            self._waiting.remove(charge)

    def learn(self, model: str, completion_tokens: int) -> None:
        """An answer of that model had so many tokens: about the longest of late is assumed of the next."""
        known = self._outputs.get(model, 0)
        self._outputs[model] = completion_tokens if completion_tokens > known else known - (known >> 6)

    def booked(self, usages: Iterable[Usage]) -> None:
        """These are in the ledger now."""
        for usage in usages:
            shares = self._by_subject.get(usage.token, ()) + self._by_subject.get(usage.project, ())
            if shares:
                used = amounts_of(usage.prompt_tokens, usage.completion_tokens, usage.price)
                for share in shares:
                    share.books(used[share.measure], usage.at_ns)

    async def keep(self, ask: Ask) -> None:
        """Hold shares for ever."""
        loop, asked_at, gap_s = asyncio.get_running_loop(), float("-inf"), _GAP_S
        while True:
            try:
                async with asyncio.timeout(_TICK_S):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            if not self._limits:
                self._wanted.clear()
                continue
            await asyncio.sleep(max(0.0, asked_at + gap_s - loop.time()))
            self._wanted.clear()
            asked_at, before = loop.time(), len(self._waiting)
            reported = self._report()
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    answer = await ask(msgspec.json.encode(reported))
                self._hear(msgspec.json.decode(answer, type=_Answer))
            except (OSError, Refused, msgspec.DecodeError, UnicodeDecodeError) as error:
                self._miss(error)
            if self._copy is not None and self.clock() - self._copied_ns > _COPIED_EVERY_NS and not self._is_alone:
                self._copied_ns = self.clock()
                await asyncio.to_thread(_write, self._copy, list(self._elsewhere.values()))
            gap_s = _GAP_S if len(self._waiting) < before or not before else _LONG_GAP_S
            if self._waiting:
                self._wanted.set()

    # Inside

    def _report(self) -> dict[str, Any]:
        """What the control plane is told."""
        now = self.clock()
        self._number += 1
        length_ns = now - self._ticked_ns
        is_tick = self._lets_go or length_ns >= SECOND_NS * _TICK_S * 0.75
        self._lets_go = False
        if is_tick:
            self._ticked_ns = now
        waited: dict[Share, tuple[int, int]] = {}
        for charge in self._waiting:
            for share, need in charge.needed():
                least, needed = waited.get(share, (need, 0))
                waited[share] = min(least, need), needed + need
        told = []
        for share in self.active | waited.keys():
            if now >= share.ends_ns:
                share.roll(now=now)
            least, needed = waited.get(share, (0, 0))
            hoped = share.tick(waited_for=needed, length_ns=length_ns) if is_tick else 0
            if not (needed or share.balance or share.pending or share.demand or share.recent):
                self.active.discard(share)
            told.append(
                (
                    share.subject,
                    share.limit.name,
                    share.begins_ns,
                    share.balance,
                    share.pending,
                    share.spent,
                    share.recent,
                    max(0, least - share.balance),
                    max(0, needed - share.balance),
                    hoped,
                )
            )
        return {"gateway": self._worker, "number": self._number, "shares": told}

    def _hear(self, answer: _Answer) -> None:
        now = self.clock()
        if self._is_alone:
            _log.warning("the control plane shares out limits again")
        self._is_alone, self._was_heard, self._heard_ns = False, True, now
        self._workers = max(1, answer.gateways)
        for told in answer.shares:
            share = self._shares.get((told.subject, told.name))
            if share is None or share.kind is Kind.QUOTA:
                self._elsewhere[told.subject, told.name] = told
            if share is None:
                continue
            if now >= share.ends_ns:
                share.roll(now=now)
            if told.begins_ns > share.begins_ns:  # the control plane's clock is before this one's
                share.roll(now=told.begins_ns)
            if told.begins_ns == share.begins_ns:
                share.told(told.granted, told.left, told.elsewhere, is_short=told.is_short, now=now)
                if told.granted:
                    self.active.add(share)
                if told.is_short and share.balance > 0:  # others wait for what is not needed here
                    self._lets_go = True
        if self._lets_go:
            self._wanted.set()
        self._again(now)

    def _miss(self, error: Exception) -> None:
        if not self._is_alone:
            _log.warning("limits are held to by this worker's part, the control plane does not answer: %s", error)
        self._is_alone = True
        self._again(self.clock())

    def _again(self, now: int) -> None:
        """Let in or refuse those that wait, in order."""
        waiting, self._waiting = self._waiting, deque()
        for charge in waiting:
            if self._is_alone:
                charge.be_alone(among=self._workers, now=now)
            if not charge.attempt(is_last=self._is_alone, now=now):
                self._waiting.append(charge)


def _read(path: Path) -> dict[tuple[str, str], _Told]:
    """What a worker wrote down last, nothing when there is none that can be read."""
    try:
        return {(one.subject, one.name): one for one in msgspec.json.decode(path.read_bytes(), type=list[_Told])}
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        _log.warning("what was left of limits is not known: %s", error)
        return {}


def _write(path: Path, told: list[_Told]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(msgspec.json.encode(told))
        draft.replace(path)
    except OSError as error:
        _log.warning("what is left of limits could not be written down: %s", error)


def rate_headers(shares: Sequence[Share], *, now: int) -> list[tuple[bytes, bytes]]:
    """The headers that tell of limits on requests and tokens: of each the one that is nearest to its end."""
    return _headers(_shown_of(shares), now=now)


def _shown_of(shares: Sequence[Share]) -> tuple[_Shown, ...]:
    """Which headers tell of which of the shares."""
    found = []
    for measure, shown in _SHOWN:
        of = tuple(share for share in shares if share.limit.measure is measure)
        if of:
            limit, remaining, reset = (b"x-ratelimit-%b-%b" % (what, shown) for what in _TOLD)
            found.append((limit, remaining, reset, of))
    return tuple(found)


def _headers(plan: Sequence[_Shown], *, now: int) -> list[tuple[bytes, bytes]]:
    found = []
    for limit, remaining, reset, shares in plan:
        nearest = shares[0]
        left = nearest.free(now=now)
        for share in shares[1:]:
            if (there := share.free(now=now)) < left:
                nearest, left = share, there
        left = max(0, left)
        found.append((limit, b"%d" % nearest.amount))
        found.append((remaining, b"%d" % left))
        found.append((reset, _reset(nearest, nearest.amount - left, now=now)))
    return found


def refused(share: Share, need: int, shares: Sequence[Share], *, now: int) -> Answer:
    """A 429 that says which limit is reached, and when there is more."""
    after_ns = _until(share, need - share.free(now=now), now=now)
    whose = "project" if share.subject.startswith("prj_") else "key"
    if share.kind is Kind.GAUGE:
        message = f"This {whose} may have {share.amount} requests under way at a time, and it has."
    else:
        limit, used = _said(share, share.amount), _said(share, max(0, share.amount - max(0, share.free(now=now))))
        unit = _WORDS[share.limit.measure]
        message = f"This {whose}'s limit of {limit} {unit} a {share.limit.window} is reached: {used} are used"
        message += f", and this request needs up to {_said(share, need)}." if need > 1 else "."
    return _refusal(share, message, after_ns, shares, now=now)


def too_large(share: Share, need: int, shares: Sequence[Share], *, now: int) -> Answer:
    """A 429 for a request that is larger than the whole limit."""
    whose = "project" if share.subject.startswith("prj_") else "key"
    unit = _WORDS.get(share.limit.measure, "requests")
    window = f" a {share.limit.window}" if share.limit.window else " at a time"
    message = f"This request needs up to {_said(share, need)} {unit}, and this {whose} has {_said(share, share.amount)}"
    message += f"{window}. Ask for less, with a smaller max_tokens for example."
    return _refusal(share, message, MINUTE_NS, shares, now=now, is_final=True)


def _refusal(
    share: Share, message: str, after_ns: int, shares: Sequence[Share], *, now: int, is_final: bool = False
) -> Answer:
    headers = [(b"Retry-After", b"%d" % max(1, math.ceil(after_ns / SECOND_NS))), *rate_headers(shares, now=now)]
    if is_final or share.kind is Kind.QUOTA:  # coming again soon is of no use
        headers.append((b"x-should-retry", b"false"))
    is_money = share.measure == _MONEY
    code, kind = ("insufficient_quota",) * 2 if is_money else ("rate_limit_exceeded", share.limit.measure.value)
    return answers.refuse(429, code, message, headers=headers, kind=kind)


def _until(share: Share, lacks: int, *, now: int) -> int:
    """After how long there is so much more, in ns, when nobody takes any."""
    if share.kind is Kind.GAUGE:
        return SECOND_NS
    if share.kind is Kind.QUOTA:
        return share.ends_ns - now
    return MINUTE_NS if not share.amount else max(0, lacks) * MINUTE_NS // share.amount


def _reset(share: Share, lacks: int, *, now: int) -> bytes:
    """After how long a limit is whole again, as ``6m0s`` or ``120ms``."""
    length = _until(share, lacks, now=now) if lacks > 0 else 0
    if length < SECOND_NS:
        return b"%dms" % (-(-length // 1_000_000))
    seconds = -(-length // SECOND_NS)
    if seconds < 60:
        return b"%ds" % seconds
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%ds" % (hours, minutes, seconds) if hours else b"%dm%ds" % (minutes, seconds)


def _said(share: Share, amount: int) -> str:
    """An amount for people."""
    if share.measure != _MONEY:
        return str(amount)
    return f"{amount / MICRO_PICO / USD_MICRO:.6f}".rstrip("0").rstrip(".")


def _most_output(content: dict[str, Any]) -> int | None:
    """The most tokens that the answer to a request can have, None when it does not say."""
    for name in _OUTPUT_LIMITS:
        most = content.get(name)
        if type(most) is int and most >= 0:
            choices = content.get("n")
            return most * min(choices, _MOST_CHOICES) if type(choices) is int and choices > 1 else most
    return None
