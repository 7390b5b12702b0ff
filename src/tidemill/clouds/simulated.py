"""A cloud that does not exist, with the habits of those that do: lists that lag behind, answers that are lost.

For tests, and for trying out settings without an account. Time is a number that whoever uses it lets pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tidemill.errors import CloudLost, CloudRefused
from tidemill.model.cloud import (
    Billing,
    Instance,
    InstanceState,
    InterruptionNotice,
    Market,
    NoCapacity,
    Offer,
    ProvisionRequest,
)
from tidemill.ports import ProvisionerCapabilities
from tidemill.units import MINUTE_NS, SECOND_NS


@dataclass(slots=True)
class SimulatedAccount:
    """What the cloud knows. ``lag_ns`` is how far its lists are behind; ``faults`` are taken one at a time.

    A fault is ``before`` (nothing is done, no answer), ``after`` (done, no answer), ``refused`` or ``no capacity``; it
    befalls the next request to rent. While ``is_down`` nothing is answered. ``ended`` has what was asked to be ended.
    """

    offers: Sequence[Offer]
    now: int = SECOND_NS
    lag_ns: int = 0
    is_down: bool = False
    faults: list[str] = field(default_factory=list)
    notices: list[InterruptionNotice] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    _instances: dict[str, tuple[str, Instance, int, int]] = field(default_factory=dict)
    """By id: the installation, the instance, when it was made, when it ended (zero: not)."""

    def alive(self) -> dict[str, Instance]:
        """What really runs, by id."""
        return {name: one for name, (_, one, _, ended) in self._instances.items() if not ended}

    def rent(self, installation: str, request: ProvisionRequest) -> Instance:
        """The instance of a client token: the one that there is, or a new one."""
        for owner, one, _, ended in self._instances.values():
            if owner == installation and one.client_token == request.client_token:
                return replace(one, state=InstanceState.GONE if ended else InstanceState.RUNNING)
        made = Instance(
            id=f"sim-{len(self._instances):06d}",
            state=InstanceState.PENDING,
            instance_type=request.offer.instance_type,
            zone=request.offer.zone,
            market=request.offer.market,
            launched_ns=self.now,
            client_token=request.client_token,
            site=request.site,
            node_name=request.node_name,
        )
        self._instances[made.id] = installation, made, self.now, 0
        return made

    def end(self, instance_id: str) -> None:
        """End an instance, whoever wants it."""
        owner, one, made, ended = self._instances[instance_id]
        self._instances[instance_id] = owner, one, made, ended or self.now

    def owner_of(self, instance_id: str) -> str | None:
        """The installation whose tag an instance has; None: there is none."""
        found = self._instances.get(instance_id)
        return found[0] if found is not None else None

    def listed(self, installation: str) -> tuple[Instance, ...]:
        """The list of an installation's instances as it was ``lag_ns`` ago."""
        then, found = self.now - self.lag_ns, []
        for owner, one, made, ended in self._instances.values():
            if owner == installation and made <= then:
                gone = bool(ended) and ended <= then
                found.append(replace(one, state=InstanceState.GONE if gone else InstanceState.RUNNING))
        return tuple(found)


class SimulatedCloud:
    """``ports.Provisioner`` on an account that does not exist."""

    def __init__(self, account: SimulatedAccount, *, installation: str) -> None:
        self._account = account
        self._installation = installation

    @property
    def capabilities(self) -> ProvisionerCapabilities:
        billing = Billing(granularity_ns=SECOND_NS, minimum_ns=MINUTE_NS)
        spot = any(offer.market is Market.SPOT for offer in self._account.offers)
        return ProvisionerCapabilities(name="simulated", spot=spot, notices=True, billing=billing)

    def scope(self) -> str:
        self._ask()
        return "simulated"

    def offers(self) -> tuple[Offer, ...]:
        self._ask()
        return tuple(self._account.offers)

    def provision(self, request: ProvisionRequest) -> Instance | NoCapacity:
        """The instance of that client token, unless a fault befalls the request."""
        self._ask()
        if request.offer.instance_type not in {offer.instance_type for offer in self._account.offers}:
            raise CloudRefused("There is no such type.", field="instance_type", mend="Rent what is on offer.")
        fault = self._account.faults.pop(0) if self._account.faults else ""
        if fault == "before":
            raise CloudLost("The question was lost.")
        if fault == "refused":
            raise CloudRefused("The quota is used up.", field="quota", mend="Rent less.")
        if fault == "no capacity":
            return NoCapacity(offer_id=request.offer.id)
        made = self._account.rent(self._installation, request)
        if fault == "after":
            raise CloudLost("The answer was lost.")
        return made

    def release(self, instance_id: str) -> None:
        self._ask()
        if self._account.owner_of(instance_id) == self._installation:
            self._account.ended.append(instance_id)
            self._account.end(instance_id)

    def instances(self) -> tuple[Instance, ...]:
        self._ask()
        return self._account.listed(self._installation)

    def interruptions(self) -> tuple[InterruptionNotice, ...]:
        self._ask()
        return tuple(self._account.notices)

    def _ask(self) -> None:
        if self._account.is_down:
            raise CloudLost("The cloud is down.")
