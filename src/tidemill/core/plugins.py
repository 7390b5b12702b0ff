"""Policies by name: those that come along, and those that other packages add by entry point.

``tidemill.order`` and ``tidemill.score`` are the groups; an entry point's value is called without arguments and
gives an ``OrderPolicy`` or a ``Score``. ``tidemill.testing.check_policy`` says whether one keeps the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from tidemill.core import ordering, score
from tidemill.core.ordering import OrderPolicy
from tidemill.core.score import Score
from tidemill.errors import InvalidRequest

FAIR: Final = ordering.Fifo(name="fair")
"""Fair share between queues and users; inside, priority and age. Ranks are the queue's own."""

_ORDERS: Final[Mapping[str, Callable[[], OrderPolicy]]] = {
    "fifo": ordering.Fifo,
    "least-attained": ordering.LeastAttained,
    "least-service": lambda: ordering.LeastAttained(gpu_exponent=1.0, margin=2.0, name="least-service"),
    "shortest-remaining": ordering.ShortestRemaining,
    "srsf": lambda: ordering.ShortestRemaining(gpu_exponent=1.0, name="srsf"),
    "kin-gittins": ordering.KinGittins,
}


def order_named(name: str) -> OrderPolicy:
    """The order policy of that name. Raises: InvalidRequest when there is none."""
    if name == FAIR.name:
        return FAIR
    policy: OrderPolicy = _named("order", name, _ORDERS)
    return policy


def score_named(name: str) -> Score:
    """The placement policy of that name. Raises: InvalidRequest when there is none."""
    policy: Score = _named("score", name, score.BUILT_IN)
    return policy


def order_names() -> tuple[str, ...]:
    """Every order policy there is."""
    return (FAIR.name, *_ORDERS, *sorted(_added("order")))


def score_names() -> tuple[str, ...]:
    """Every placement policy there is."""
    return (*score.BUILT_IN, *sorted(_added("score")))


def _named(kind: str, name: str, built_in: Mapping[str, Callable[[], Any]]) -> Any:
    make = built_in.get(name)
    if make is not None:
        return make()
    added = _added(kind)
    if name in added:
        return added[name]()
    known = ", ".join((*((FAIR.name,) if kind == "order" else ()), *built_in, *sorted(added)))
    raise InvalidRequest(
        f"There is no {kind} policy {name!r}.", field=f"policy.{kind}", value=name, mend=f"Use one of {known}."
    )


def _added(kind: str) -> dict[str, Callable[[], Any]]:
    return {point.name: partial(_made, point) for point in entry_points(group=f"tidemill.{kind}")}


def _made(point: EntryPoint) -> Any:
    return point.load()()
