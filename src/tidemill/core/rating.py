"""⑦ Usage times price: ledger lines in exact integers.

The amount of a stretch is the difference of two readings of one running total, floor(rate x instant), so however
a stretch is cut into lines, the lines add up to the same amount to the micro-dollar. Energy is multiplied by
the site's PUE, carbon follows from energy and the grid's intensity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tidemill.model.fleet import Site
from tidemill.model.ids import NodeId
from tidemill.model.ledger import LedgerLine, RateCard, UsageInterval
from tidemill.units import HOUR_NS, KILOWATT_HOUR_MJ, MILLI


def rate_all(usages: Sequence[UsageInterval], card: RateCard, site_of: Callable[[NodeId], Site]) -> list[LedgerLine]:
    """The priced line of each interval. Idle time and what is included in another line cost nothing."""
    if not usages:
        return []
    prices = card.by_resource()
    lines: list[LedgerLine] = []
    for usage in usages:
        site = site_of(usage.node_id)
        energy = usage.energy_mj * site.pue_milli // MILLI
        is_free = not usage.launch_id or usage.included
        price = 0 if is_free else prices.get(usage.resource, 0)
        lines.append(
            LedgerLine(
                id=usage.id,
                usage=usage,
                rate_card=card.id,
                amount_micro=price and amount_micro(price, usage.milli, usage.from_ns, usage.to_ns),
                energy_mj=energy,
                carbon_mg=carbon_mg(energy, site),
            )
        )
    return lines


def amount_micro(micro_per_hour: int, milli: int, from_ns: int, to_ns: int) -> int:
    """The price of holding ``milli`` thousandths of a unit between two instants, in micro-USD.

    >>> amount_micro(3_600_000, 1000, 0, 1_000_000_000)
    1000
    """
    divisor = MILLI * HOUR_NS
    rate = micro_per_hour * milli
    return rate * to_ns // divisor - rate * from_ns // divisor


def carbon_mg(energy_mj: int, site: Site) -> int:
    """The carbon of that much energy at the site, rounded to the nearest milligram."""
    return (energy_mj * site.carbon_mg_per_kwh + KILOWATT_HOUR_MJ // 2) // KILOWATT_HOUR_MJ
