"""The places where work runs: each with its engine, here or behind outposts that dial in, and what is heard of them.

Commands go to the engine of their node's site. Every site is looked at on its own, so that one that is slow or cut off
holds nothing else up.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Final

from tidemill.control.enginework import EngineWork, Stranger
from tidemill.control.identity import Directory, Identity
from tidemill.control.leases import Leases
from tidemill.control.outposts import Mailbox, SiteEngine
from tidemill.core.facts import LEFT, has_left
from tidemill.core.world import World
from tidemill.errors import Conflict, EngineLost, Forbidden, NotFound, TidemillError, Unavailable
from tidemill.model.cloud import Rental
from tidemill.model.events import (
    Brought,
    CopiesSeen,
    Delivered,
    DeviceFailed,
    DeviceRecovered,
    Fact,
    Marking,
    NodeMarked,
    NodeWentAway,
    Sampled,
    SiteSet,
)
from tidemill.model.fleet import Link, Node, NodeState, Outpost, Site
from tidemill.model.ids import (
    JobId,
    LaunchId,
    NodeId,
    OrganizationId,
    OutpostId,
    PrincipalId,
    ProjectId,
    SiteId,
)
from tidemill.model.job import Allocation
from tidemill.model.plan import Command, LaunchSpec, Sight
from tidemill.model.tenant import Principal, PrincipalKind, Scope, Token
from tidemill.ports import Engine, Store
from tidemill.units import SECOND_NS
from tidemill.wire.outposts import OutpostReport, facts_in

log = logging.getLogger(__name__)
_LOOKED_AFTER_S: Final = 1.0
_SITE_PREFIX: Final = "sys_site_"
_MEMBERS: Final = ("ray",)
"""Engines of outposts that are machines of a cluster, for which its head speaks."""

_PACE: Final[dict[str, dict[str, float]]] = {"slurm": {"observe_every_s": 2.0, "nodes_every_s": 5.0}}
"""Of looks at engines that are others', too: a look costs their controller as much as anybody's ``squeue``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteState:
    """A site as it is now: its outposts with whether each is there, and its nodes."""

    site: Site
    outposts: tuple[tuple[Outpost, bool], ...]
    nodes: tuple[Node, ...]


class Sites:
    """All sites of an installation. ``home`` is the one of this machine, whose ``engine`` is in this process
    unless it is None: then its outposts work it.

    ``world`` gives the world for reading, ``build`` a launch spec; ``tell`` takes facts, ``met`` each stranger.
    ``monotonic`` is a clock in ns that never jumps.
    """

    def __init__(
        self,
        home: Site,
        engine: Engine | None,
        store: Store,
        directory: Directory,
        *,
        clock: Callable[[], int],
        world: Callable[[], World],
        build: Callable[[LaunchId], LaunchSpec],
        tell: Callable[[Sequence[Fact]], Future[None]],
        met: Callable[[Stranger], object] = lambda _: None,
        epoch: int = 0,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.home = home
        self.epoch = epoch
        """Of the control plane that this is part of; outposts do not act on calls of an older one."""
        self._store = store
        self._directory = directory
        self._clock = clock
        self._world = world
        self._build = build
        self._tell = tell
        self._met = met
        self._own = engine
        self.leases = Leases(monotonic)
        self._monotonic = monotonic
        self.session = secrets.token_hex(8)
        """Names this object to outposts, whose calls are numbered anew with each."""
        self._lock = threading.Lock()
        self._sites: dict[SiteId, Site] = {site.id: site for site in store.sites()} | {home.id: home}
        self._outposts: dict[OutpostId, Outpost] = {one.id: one for one in store.outposts()}
        self._engines: dict[SiteId, SiteEngine] = {}
        self.works: dict[SiteId, EngineWork] = {}
        """The hands of each site."""
        self._offers: dict[OutpostId, dict[str, str]] = {}
        """What an outpost that heads a cluster tells those that join it."""
        self._started = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="leases", daemon=True)
        for site in self._sites.values():
            self._open(site)
        for outpost in self._outposts.values():
            if not outpost.removed_ns and outpost.site_id in self._engines and outpost.engine not in _MEMBERS:
                self._engines[outpost.site_id].add(outpost)

    # ------------------------------------------------------------------ acting

    def all(self) -> tuple[Site, ...]:
        """Every site, the one of this machine first."""
        rest = sorted((site for site in self._sites.values() if site.id != self.home.id), key=lambda site: site.name)
        return (self.home, *rest)

    def start(self) -> None:
        """Begin to work and to watch, everywhere."""
        with self._lock:
            self._started = True
            for work in self.works.values():
                work.start()
        self._thread.start()

    def close(self) -> None:
        """Finish what was begun and stop watching; whatever runs goes on."""
        self._closing.set()
        for engine in self._engines.values():
            engine.close()
        for work in self.works.values():
            work.close()
        if self._own is not None:
            self._own.close()

    def obey(self, commands: Sequence[Command]) -> None:
        """Have the commands carried out, each at its node's site, soon."""
        if len(self.works) == 1:
            next(iter(self.works.values())).obey(commands)
            return
        nodes = self._world().nodes
        by_site: dict[SiteId, list[Command]] = {}
        for command in commands:
            node = nodes.get(command.node_id)
            by_site.setdefault(node.site_id if node is not None else self.home.id, []).append(command)
        for site_id, theirs in by_site.items():
            if (work := self.works.get(site_id)) is not None:
                work.obey(theirs)

    def is_leased(self, node_id: NodeId) -> bool:
        """Whether workers on that node hold a lease: those of this machine, which shares its fate with us, do not."""
        node = self._world().nodes.get(node_id)
        engine = self._engines.get(node.site_id) if node is not None else None
        return engine is not None and not engine.is_own(node_id)

    # ------------------------------------------------------------------ steering

    def put(self, site: Site) -> Site:
        """The site as it is from now on. Raises: Conflict for the one of this machine."""
        if site.id == self.home.id:
            raise Conflict(
                "The site of the control plane's own machine is described in its config.yaml.",
                field="site",
                value=site.name,
                mend="Set site_kind, country, pue, carbon_g_per_kwh, rates, tariff and lease there; start it again.",
            )
        self._store.put_site(site)
        with self._lock:
            self._sites[site.id] = site
            if site.id not in self.works:
                self._open(site)
        self._tell([SiteSet(at_ns=self._clock(), site=site)]).result(timeout=30)
        return site

    def link(self, one: Site, other: Site, link: Link | None) -> None:
        """Say what the way between two sites is like; None: that it is not known.

        Raises: Conflict for a site and itself.
        """
        if one.id == other.id:
            raise Conflict("A site has no link to itself.", field="site", value=one.name, mend="Name two sites.")
        keeper, far = (other, one) if one.id == self.home.id else (one, other)  # config.yaml describes the home
        for site, there in ((keeper, far), (far, keeper)):
            links = tuple(each for each in site.links if each.to != there.id)
            if site is keeper and link is not None:
                links = (*links, replace(link, to=there.id))
            if links != site.links:
                self.put(replace(site, links=links))

    def find(self, name: str) -> Site:
        """The site of that name. Raises: NotFound."""
        for site in self.all():
            if name in (site.name, site.id):
                return site
        names = ", ".join(site.name for site in self.all())
        raise NotFound(f"There is no site {name[:100]}.", field="site", value=name[:100], mend=f"Sites: {names}.")

    def read_file(self, site_id: SiteId, node: str, path: str, offset: int, size: int) -> bytes:
        """Part of a file at a site with outposts, on its machine of that name, or on any. Raises: Unavailable."""
        engine = self._engines.get(site_id)
        nodes = self._world().nodes.copy().values()
        node_id = next((one.id for one in nodes if one.site_id == site_id and one.name == node), None)
        try:
            if engine is None or (node and node_id is None):
                raise EngineLost(f"there is no machine {node or 'of its outposts'} at {site_id}")
            return engine.read_file(path, offset, size, node_id=node_id)
        except TidemillError as error:
            raise Unavailable(f"The data set's home cannot be read: {error.detail}.", field="site") from error

    def states(self) -> tuple[SiteState, ...]:
        """Every site with what is there, the one of this machine first."""
        nodes = sorted(self._world().nodes.copy().values(), key=lambda node: (node.name, node.id))
        return tuple(
            SiteState(
                site=site,
                outposts=tuple((box.outpost, box.is_there) for box in self._engines[site.id].boxes.values()),
                nodes=tuple(node for node in nodes if node.site_id == site.id),
            )
            for site in self.all()
        )

    def joining_token(self, identity: Identity, site: Site, *, expires_ns: int) -> tuple[Token, str]:
        """A token with which machines join that site, and its secret."""
        principal = Principal(
            id=PrincipalId(_SITE_PREFIX + site.id),
            organization_id=identity.organization_id,
            kind=PrincipalKind.SYSTEM,
            name=f"site {site.name}",
            created_ns=self._clock(),
        )
        return self._mint(principal, Scope.JOIN, name=f"join {site.name}", expires_ns=expires_ns)

    def rental_token(self, rental: Rental) -> str:
        """The token with which the machine of a rental joins, the same each time; worthless once that is over."""
        organization = self._store.organizations()[0].id
        principal = Principal(
            id=PrincipalId(f"{_SITE_PREFIX}{rental.site_id}/{rental.node_name}"),
            organization_id=organization,
            kind=PrincipalKind.SYSTEM,
            name=f"machine {rental.node_name}",
            created_ns=rental.created_ns,
        )
        token, secret = self._directory.mint(
            None,
            principal,
            name=f"join as {rental.node_name}",
            scopes=(Scope.JOIN,),
            project=ProjectId(""),
            expires_ns=rental.expires_ns,
            now=rental.created_ns,
            entropy=self._directory.derived(f"rental:{rental.id}"),
        )
        known = {one.hash for one in self._directory.all()}
        if token.hash not in known:
            self._store.put_principal(principal)
            self._store.put_token(token)
            self._directory.remember(token, principal)
        return secret

    def end_rental(self, rental: Rental) -> None:
        """A rental is over: its token opens nothing, and its machine is no part of the cloud any more."""
        own = PrincipalId(f"{_SITE_PREFIX}{rental.site_id}/{rental.node_name}")
        for token in self._directory.all():
            if token.principal_id == own and not token.revoked_ns:
                self._revoke(token)
        for outpost in list(self._outposts.values()):
            if not outpost.removed_ns and (outpost.site_id, outpost.name) == (rental.site_id, rental.node_name):
                self._remove(outpost)
        node = self._world().nodes.get(rental.node_id)
        if node is not None and not has_left(node):
            gone = NodeWentAway(at_ns=self._clock(), node_id=node.id, detail=LEFT)
            self._tell([gone]).result(timeout=30)

    def joined_site(self, identity: Identity) -> Site:
        """The site that a joining token is for. Raises: NotFound."""
        return self.find(identity.principal_id.removeprefix(_SITE_PREFIX).partition("/")[0])

    def join(self, identity: Identity, *, name: str, key: str, engine: str) -> tuple[Outpost, Site, str]:
        """The outpost of that name and its secret token; the same outpost for the same ``key``.

        Raises: Conflict when another outpost of the site has the name.
        """
        only = identity.principal_id.partition("/")[2]
        if only and name != only:
            raise Forbidden(f"This token is for {only} alone.", field="name", value=name, mend=f"Join as {only}.")
        return self.adopt(self.joined_site(identity), identity.organization_id, name=name, key=key, engine=engine)

    def adopt(
        self, site: Site, organization: OrganizationId, *, name: str, key: str, engine: str
    ) -> tuple[Outpost, Site, str]:
        """As ``join``, from this process."""
        now = self._clock()
        outpost_id = OutpostId(f"out_{hashlib.sha256(key.encode()).hexdigest()[:24]}")  # ids are shown, keys are not
        with self._lock:
            known = self._outposts.get(outpost_id)
            if known is not None and known.site_id != site.id and not known.removed_ns:
                raise Conflict(
                    f"This outpost belongs to site {known.site_id}.",
                    field="key",
                    mend="Have it leave first: tidemill leave.",
                )
            for other in self._outposts.values():
                if other.id != outpost_id and not other.removed_ns and (other.site_id, other.name) == (site.id, name):
                    raise Conflict(
                        f"Site {site.name} has an outpost {name} already.",
                        field="name",
                        value=name,
                        mend="Choose another with --name, or remove that one: tidemill site remove.",
                    )
            outpost = Outpost(
                id=outpost_id,
                site_id=site.id,
                name=name,
                engine=engine,
                created_ns=known.created_ns if known else now,
            )
            self._outposts[outpost_id] = outpost
        for token in self._directory.all():
            if token.principal_id == PrincipalId(outpost_id) and not token.revoked_ns:
                self._revoke(token)
        self._store.put_outpost(outpost)
        principal = Principal(
            id=PrincipalId(outpost_id),
            organization_id=organization,
            kind=PrincipalKind.SYSTEM,
            name=f"outpost {name}",
            created_ns=now,
        )
        _, secret = self._mint(principal, Scope.OUTPOST, name=f"outpost {name}", expires_ns=0)
        if engine not in _MEMBERS:
            self._engines[site.id].add(outpost)
        return outpost, site, secret

    def outpost(self, identity: Identity) -> Outpost:
        """The outpost that asks. Raises: NotFound when it was removed."""
        outpost = self._outposts.get(OutpostId(identity.principal_id))
        if outpost is None or outpost.removed_ns or outpost.site_id not in self._engines:
            raise NotFound("This outpost does not belong to the cloud any more.", field="outpost")
        return outpost

    def box(self, identity: Identity) -> Mailbox:
        """The mailbox of the outpost that asks. Raises: NotFound when it was removed, or works no engine."""
        outpost = self.outpost(identity)
        box = self._engines[outpost.site_id].boxes.get(outpost.id)
        if box is None:
            raise NotFound("This outpost works no engine: its cluster's head does.", field="outpost")
        return box

    def facts_of(self, outpost: Outpost, report: OutpostReport) -> list[Fact]:
        """What an outpost tells of its own machines; of others it has nothing to tell. Raises: InvalidRequest."""
        if report.offer:
            self._offers[outpost.id] = dict(report.offer)
        engine = self._engines[outpost.site_id]
        told = [
            (number, fact)
            for fact, number in zip_longest(facts_in(report), report.numbers, fillvalue=0)
            if isinstance(fact, Brought)
            and engine.speaks_for(outpost.id, fact.node_id)
            and not (isinstance(fact, NodeMarked) and fact.marking is not Marking.DRAIN)
        ]
        if not report.numbers:
            return sorted((fact for _, fact in told), key=lambda fact: fact.at_ns)
        return [
            Delivered(
                at_ns=self._clock(),
                outpost_id=outpost.id,
                last=max(report.numbers),
                numbers=tuple(number for number, _ in told),
                sampled=tuple(fact for _, fact in told if isinstance(fact, Sampled)),
                failed=tuple(fact for _, fact in told if isinstance(fact, DeviceFailed)),
                recovered=tuple(fact for _, fact in told if isinstance(fact, DeviceRecovered)),
                marked=tuple(fact for _, fact in told if isinstance(fact, NodeMarked)),
            )
        ]

    def taken(self, outpost: Outpost) -> int:
        """Up to which number what an outpost brought was taken; zero: nothing."""
        mark = self._world().deliveries.get(outpost.id)
        return mark.number if mark is not None else 0

    def joining_settings(self, site: Site) -> dict[str, str]:
        """What an outpost of that site needs beside its token, by the site's engine."""
        found: dict[str, str] = {}
        for outpost, is_there in next(state.outposts for state in self.states() if state.site.id == site.id):
            if is_there:
                found |= self._offers.get(outpost.id, {})
        return found

    def leave(self, outpost: Outpost, *, by: str, node_id: NodeId = NodeId("")) -> tuple[JobId, ...]:
        """The ids of the jobs that still run on an outpost's nodes, which are being drained; with none left it is
        removed, and its nodes with it. A machine of a cluster says which ``node_id`` it is."""
        engine = self._engines[outpost.site_id]
        mine = engine.nodes_of(outpost.id)
        if node_id and outpost.engine in _MEMBERS and self._site_of(node_id) == outpost.site_id:
            mine = (node_id,)
        world = self._world()
        now = self._clock()
        marks: list[Fact] = [
            NodeMarked(at_ns=now, node_id=node.id, marking=Marking.DRAIN, by=by, detail="it leaves")
            for node in (world.nodes.get(node_id) for node_id in mine)
            if node is not None and node.marking != Marking.DRAIN.value and node.state is not NodeState.LOST
        ]
        if marks:
            self._tell(marks).result(timeout=30)
        running = {world.allocations[launch].job_id for node in mine for launch in list(world.by_node.get(node, ()))}
        if not running:
            gone: list[Fact] = [NodeWentAway(at_ns=now, node_id=node, detail=LEFT) for node in mine]
            self._tell(gone).result(timeout=30)
            self._remove(outpost)
        return tuple(sorted(running))

    def word_of(self, launches: Iterable[LaunchId]) -> str:
        """What the engines said last of the first of these launches of which they said something."""
        works = list(self.works.copy().values())
        return next((word for launch in launches for work in works if (word := work.word_of(launch))), "")

    def strangers(self, *, but: SiteId = SiteId("")) -> tuple[Stranger, ...]:
        """What engines have and the store has never heard of, by site and launch; those of one site left out."""
        works = sorted(self.works.copy().items())
        return tuple(stranger for site_id, work in works if site_id != but for stranger in work.strangers)

    def end_stranger(self, launch: LaunchId, *, grace_ns: int) -> Stranger:
        """The stranger, which is stopped, and forgotten once it is gone. Raises: NotFound."""
        works = [work for work in self.works.values() if any(one.launch_id == launch for one in work.strangers)]
        return (works or [self.works[self.home.id]])[0].end_stranger(launch, grace_ns=grace_ns)

    def declare_lost(self, node: Node, *, by: str) -> None:
        """Somebody knows that nothing of ours runs on a silent machine any more.

        Raises: Conflict while it answers.
        """
        if node.state is not NodeState.SILENT:
            raise Conflict(
                f"{node.name} is {node.state.value}, and what runs there is known.",
                field="node",
                value=node.name,
                mend="Drain it instead; only a silent machine can be declared lost.",
            )
        self._tell([NodeWentAway(at_ns=self._clock(), node_id=node.id, detail=f"declared lost by {by}")]).result(30)

    # ------------------------------------------------------------------ inside

    def _open(self, site: Site) -> None:
        own = self._own if site.id == self.home.id else None
        engine = self._engines[site.id] = SiteEngine(
            site.id, own=own, site_of=self._site_of, clock=lambda: self._monotonic() / SECOND_NS
        )
        work = EngineWork(
            engine,
            self._store,
            clock=self._clock,
            live=lambda: self._live(site.id),
            build=self._build,
            tell=self._tell,
            is_news=self._saw,
            met=self._met,
            elsewhere=lambda: self.strangers(but=site.id),
            **_PACE.get(site.engine, {}),
        )
        self.works[site.id] = work
        if self._started:
            work.start()

    def _site_of(self, node_id: NodeId) -> SiteId | None:
        node = self._world().nodes.get(node_id)
        return node.site_id if node is not None else None

    def _live(self, site_id: SiteId) -> dict[LaunchId, Allocation]:
        world = self._world()
        held = world.allocations.copy()
        if len(self.works) == 1:
            return held
        nodes = world.nodes
        return {launch: worker for launch, worker in held.items() if nodes[worker.node_id].site_id == site_id}

    def _saw(self, sight: Sight) -> bool:
        """Whether a look shows nodes that the world does not count on."""
        self.leases.heard(sight.nodes)
        self._see_copies(sight)
        nodes = self._world().nodes
        away = (NodeState.SILENT, NodeState.LOST)
        return any(
            (node := nodes.get(seen)) is None or (node.state in away and not has_left(node)) for seen in sight.nodes
        )

    def _see_copies(self, sight: Sight) -> None:
        """Tell of which data sets nodes have copies, when that is news."""
        world = self._world()
        news = [
            CopiesSeen(at_ns=self._clock(), node_id=node_id, cached=cached)
            for node_id, cached in sight.cached
            if node_id in world.nodes and world.cached.get(node_id, frozenset()) != frozenset(cached)
        ]
        if news:
            self._tell(news)

    def _watch(self) -> None:
        while not self._closing.wait(_LOOKED_AFTER_S):
            try:
                self.look_after()
            except TidemillError as error:
                log.warning("silent machines could not be looked after: %s", error)
            except Exception:
                log.exception("silent machines could not be looked after")

    def look_after(self) -> None:
        """Tell what follows from machines that were not heard of."""
        world = self._world()
        held = world.allocations.copy()
        self.leases.keep(held)
        nodes = [node for node in world.nodes.copy().values() if self.is_leased(node.id)]
        facts = self.leases.overdue(nodes, world.sites, held, lambda worker: _grace(world, worker), now=self._clock())
        if facts:
            self._tell(facts).result(timeout=30)

    def _mint(self, principal: Principal, scope: Scope, *, name: str, expires_ns: int) -> tuple[Token, str]:
        token, secret = self._directory.mint(
            None,
            principal,
            name=name,
            scopes=(scope,),
            project=ProjectId(""),
            expires_ns=expires_ns,
            now=self._clock(),
        )
        self._store.put_principal(principal)
        self._store.put_token(token)
        self._directory.remember(token, principal)
        return token, secret

    def _revoke(self, token: Token) -> None:
        revoked = replace(token, revoked_ns=self._clock())
        self._store.put_token(revoked)
        principal = self._directory.principal(token.principal_id)
        if principal is not None:
            self._directory.remember(revoked, principal)

    def _remove(self, outpost: Outpost) -> None:
        removed = replace(outpost, removed_ns=self._clock())
        self._store.put_outpost(removed)
        with self._lock:
            self._outposts[outpost.id] = removed
        self._engines[outpost.site_id].remove(outpost.id)
        for token in self._directory.all():
            if token.principal_id == PrincipalId(outpost.id) and not token.revoked_ns:
                self._revoke(token)


def _grace(world: World, worker: Allocation) -> int:
    job = world.jobs.get(worker.job_id)
    workload = world.workloads.get(job.workload_id) if job is not None else None
    return workload.spec.checkpoint_grace_ns if workload is not None else 0
