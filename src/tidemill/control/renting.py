"""The renting of machines for one cloud site, put together: the loop, the tokens its machines join with, the offers.

The token of a rented machine follows from its rental's id, so that a boot script is the same each time it is made, as
a cloud that is asked twice demands. It opens the joining of one machine of that name, and nothing once that is over.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from typing import Final

from tidemill.clouds.booting import boot_script
from tidemill.control.capacity import Capacity, CapacitySettings, CapacityStatus, view_of
from tidemill.control.cloudsettings import CloudSettings
from tidemill.control.sites import Sites
from tidemill.control.turns import TurnLoop
from tidemill.core.bursting import machine_of
from tidemill.core.fleetarrays import FleetArrays
from tidemill.core.place import fits, gang_of
from tidemill.errors import NotFound, TidemillError
from tidemill.model.cloud import Market, Offer, Rental
from tidemill.model.fleet import SPOT_TAINT, Site, SiteKind
from tidemill.model.policy import Policy
from tidemill.model.spec import WorkloadSpec
from tidemill.ports import Provisioner, Store
from tidemill.units import MINUTE_NS

log = logging.getLogger(__name__)
_OFFERS_LAST_NS: Final = 10 * MINUTE_NS


class Renting:
    """What rents, and gives back, the machines of the site that ``settings`` name.

    ``epoch`` is the leader's. ``elapsed`` is a clock in ns that never jumps.
    """

    def __init__(
        self,
        provisioner: Provisioner,
        settings: CloudSettings,
        *,
        store: Store,
        turns: TurnLoop,
        sites: Sites,
        policy: Policy,
        epoch: int,
        clock: Callable[[], int],
        elapsed: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._provisioner = provisioner
        self._settings = settings
        self._sites = sites
        self._clock = clock
        self._elapsed = elapsed
        self._offers: tuple[Offer, ...] = ()
        self._offers_at: int | None = None
        self._capacity = Capacity(
            provisioner,
            store,
            CapacitySettings(site=settings.site, policy=settings.policy),
            epoch=epoch,
            view=lambda: view_of(turns, settings.site, policy, settings.policy, now=clock()),
            tell=lambda facts: turns.put(facts).result(timeout=30),
            script=self._script,
            clock=clock,
            elapsed=elapsed,
            entropy=lambda: secrets.randbits(64),
            ended=lambda rental: sites.end_rental(rental),
        )

    @property
    def status(self) -> CapacityStatus:
        """As of the last round."""
        return self._capacity.status

    def start(self) -> None:
        """Have the site there, and begin to look after it."""
        try:
            self._sites.find(self._settings.site)
        except NotFound:
            name = str(self._settings.site)
            kind = SiteKind.CLOUD
            self._sites.put(Site(id=self._settings.site, name=name, kind=kind, engine="local"))
        self._capacity.start()

    def close(self) -> None:
        """Stop looking; whatever is rented stays."""
        self._capacity.close()

    def may_serve(self, spec: WorkloadSpec) -> bool:
        """Whether machines on offer, as many as may be rented, could run it though none that is there can."""
        gang, site = gang_of(spec), self._sites.find(self._settings.site)
        most = self._settings.policy.max_instances
        for offer in self._on_offer():
            fleet = FleetArrays()
            names = [f"offer-{number}" for number in range(min(gang.workers, most))]
            fleet.rebuild([machine_of(offer, name, site=site.id) for name in names], {site.id: site})
            if most and fits(fleet, gang):
                return True
        return False

    def _on_offer(self) -> tuple[Offer, ...]:
        """What the cloud offered lately; nothing when it cannot be asked."""
        now = self._elapsed()
        if self._offers_at is None or now - self._offers_at > _OFFERS_LAST_NS:
            try:
                self._offers, self._offers_at = self._provisioner.offers(), now
            except TidemillError as error:
                log.warning("the cloud's offers cannot be had: %s", error)
        return self._offers

    def _script(self, rental: Rental) -> str:
        token = self._sites.rental_token(rental)
        is_spot = rental.offer.market is Market.SPOT
        return boot_script(
            self._settings.boot,
            token=token,
            node_name=rental.node_name,
            labels=rental.offer.labels,
            taints=(SPOT_TAINT,) if is_spot else (),
        )
