"""⑦ Usage times price: ledger lines in exact integers.

The amount of a stretch is the difference of two readings of one running total, floor(rate x instant), so however
a stretch is cut into lines, the lines add up to the same amount to the micro-dollar. Energy is multiplied by
the site's PUE, carbon follows from energy and the grid's intensity at that hour. A site with prices of its own has a
rate card of its own, and one with a tariff charges the electricity that work took on top.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from tidemill.core.meter import Stretch
from tidemill.model.fleet import HOURS_OF_DAY, Site
from tidemill.model.ids import NodeId
from tidemill.model.ledger import Entry, Evidence, Rate, RateCard, Share
from tidemill.units import HOUR_NS, KILOWATT_HOUR_MJ, MILLI


def card_of(card: RateCard, site: Site) -> RateCard:
    """The rate card of a site: the installation's, with the site's own prices put over it."""
    if not site.prices:
        return card
    own = {name: Rate(resource=name, micro_per_hour=micro, source=f"site {site.name}") for name, micro in site.prices}
    rates = {rate.resource: rate for rate in card.rates} | own
    content = "\n".join((card.id, *(f"{name} {micro}" for name, micro in sorted(site.prices))))
    return RateCard(id=f"rc_{hashlib.sha256(content.encode()).hexdigest()[:12]}", rates=tuple(rates.values()))


def rate_all(
    stretches: Iterable[Stretch],
    prices_of: Callable[[Site], tuple[str, Mapping[str, int]]],
    site_of: Callable[[NodeId], Site],
) -> list[Entry]:
    """Each stretch priced. Idle time costs nothing, and what another line includes its electricity only.

    ``prices_of`` gives a site's rate card: its id, and the price of a unit-hour of each resource.
    """
    entries: list[Entry] = []
    for stretch in stretches:
        meter = stretch.meters[0]
        site = site_of(meter.node_id)
        card_id, prices = prices_of(site)
        entries.append(
            Entry(
                node_id=meter.node_id,
                meters=tuple([each.name for each in stretch.meters]),
                resource=meter.resource,
                from_ns=stretch.from_ns,
                to_ns=stretch.to_ns,
                evidence=Evidence.MEASURED if stretch.is_measured else Evidence.ESTIMATED,
                rate_card=card_id,
                shares=_shares(stretch, site, prices.get(meter.resource, 0)),
            )
        )
    return entries


def _shares(stretch: Stretch, site: Site, price: int) -> tuple[Share, ...]:
    from_ns, to_ns = stretch.from_ns, stretch.to_ns
    pue, tariff = site.pue_milli, site.tariff_micro_per_kwh
    shares: list[Share] = []
    for holder, milli, used, others in stretch.parts:
        energy, amount = used * pue // MILLI, 0
        if holder is not None:
            if price and not holder.included:
                amount = amount_micro(price, milli, from_ns, to_ns)
            if tariff:
                amount += electricity_micro(energy, site)
        shares.append(Share(holder, milli, others, used, amount, energy, carbon_over(energy, site, from_ns, to_ns)))
    return tuple(shares)


def amount_micro(micro_per_hour: int, milli: int, from_ns: int, to_ns: int) -> int:
    """The price of holding ``milli`` thousandths of a unit between two instants, in micro-USD.

    >>> amount_micro(3_600_000, 1000, 0, 1_000_000_000)
    1000
    """
    divisor = MILLI * HOUR_NS
    rate = micro_per_hour * milli
    return rate * to_ns // divisor - rate * from_ns // divisor


def electricity_micro(energy_mj: int, site: Site) -> int:
    """What that much energy costs at the site's tariff, in micro-USD, rounded to the nearest."""
    return (energy_mj * site.tariff_micro_per_kwh + KILOWATT_HOUR_MJ // 2) // KILOWATT_HOUR_MJ


def carbon_mg(energy_mj: int, mg_per_kwh: int) -> int:
    """The carbon of that much energy, rounded to the nearest milligram."""
    return (energy_mj * mg_per_kwh + KILOWATT_HOUR_MJ // 2) // KILOWATT_HOUR_MJ


def carbon_over(energy_mj: int, site: Site, from_ns: int, to_ns: int) -> int:
    """The carbon of energy that a site takes evenly between two instants, by its hours where it says them."""
    if not site.carbon_hours:
        return carbon_mg(energy_mj, site.carbon_mg_per_kwh)
    lasts = max(to_ns - from_ns, 1)
    days, rest = divmod(lasts, HOURS_OF_DAY * HOUR_NS)
    weighted = days * HOUR_NS * sum(site.carbon_hours)
    at = from_ns
    while at < from_ns + rest:
        ends = min((at // HOUR_NS + 1) * HOUR_NS, from_ns + rest)
        weighted += (ends - at) * site.carbon_hours[at // HOUR_NS % HOURS_OF_DAY]
        at = ends
    return (energy_mj * weighted + lasts * KILOWATT_HOUR_MJ // 2) // (lasts * KILOWATT_HOUR_MJ)
