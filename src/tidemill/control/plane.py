"""The control plane: its parts put together around one loop of turns, begun and ended in order. Thread-safe.

Who calls goes to the part that it needs: ``jobs`` takes work and stops it, ``revisions`` updates
services, ``runners`` answers what runs, ``questions``
answers people, ``administration`` changes what all share, ``access`` makes tokens and keeps secrets, ``projects`` says
who sees which, ``outputs`` finds what jobs wrote; ``sites``, ``data``, ``models``, ``serving`` and ``renting`` are the
places, the data sets, the registry, the models served and the machines rented.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

from tidemill.control.acceptance import Acceptance
from tidemill.control.access import Access
from tidemill.control.administration import Administration
from tidemill.control.blobs import BlobStore
from tidemill.control.clock import SteadyClock, newest_instant
from tidemill.control.cloudsettings import CloudSettings
from tidemill.control.datasets import DataSets
from tidemill.control.driver import Driver, world_from
from tidemill.control.identity import Directory
from tidemill.control.jobs import Jobs
from tidemill.control.logs import LogStore
from tidemill.control.models import Models
from tidemill.control.outputs import Outputs
from tidemill.control.projects import Projects
from tidemill.control.questions import Questions
from tidemill.control.relay import Relay
from tidemill.control.renting import Renting
from tidemill.control.replicas import Candidate
from tidemill.control.replicating import Scaler
from tidemill.control.revisions import Revisions
from tidemill.control.rollouts import Rollouts
from tidemill.control.runners import Runners
from tidemill.control.serving import Serving
from tidemill.control.settings import Settings
from tidemill.control.sites import Sites
from tidemill.control.turns import Recorder, TurnLoop
from tidemill.control.vault import Vault
from tidemill.core.world import World
from tidemill.errors import Conflict, Fenced, TidemillError, Unavailable
from tidemill.model.events import Fact, NodeJoined, NodeWentAway, Sampled
from tidemill.model.fleet import Site
from tidemill.model.ledger import RateCard
from tidemill.model.replica import Replica
from tidemill.ports import Engine, Provisioner, Store

log = logging.getLogger(__name__)
_RECORDING_BEGINS_S: Final = 30.0
_SWEEP_EVERY_S: Final = 6 * 3_600.0


class ControlPlane:
    """One installation's control plane. ``start`` begins to act; ``close`` lets go, and what runs goes on."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        engine: Engine | None,
        site: Site,
        rates: RateCard,
        directory: Directory,
        vault: Vault,
        clock: Callable[[], int],
        sample: Callable[[], Sampled | None] = lambda: None,
        energy_evidence: str = "estimated",
        on_fenced: Callable[[], None] = lambda: None,
        holder: str = "",
        candidate: Candidate | None = None,
        monotonic: Callable[[], int] = time.monotonic_ns,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """``candidate`` is what makes sure that this one leads, where others may; ``holder`` is its name.

        ``clock`` gives instants and ``monotonic`` lengths of time, both in ns; ids are made of ``entropy``, which is
        told how many bytes of it. A ``SteadyClock`` says nothing earlier than what is stored.
        """
        self.settings = settings
        self.store = store
        self.site = site
        self.directory = directory
        self.logs = LogStore(settings.common / "logs")
        self.blobs = BlobStore(settings.common / "blobs")
        self.relay = Relay()
        self._clock = clock
        self._sample = sample
        self._engine = engine
        self._rates = rates
        self.projects = Projects(store)
        epoch = store.lead(holder=holder or secrets.token_hex(8))
        self._candidate = candidate
        if candidate is not None:
            candidate.lead(epoch)
        stored = store.load()
        if isinstance(clock, SteadyClock):
            clock.not_before(newest_instant(store, stored))
        self._turns = TurnLoop(
            Driver(self._load_world(), settings.policy),
            store,
            epoch=epoch,
            last_seq=stored.last_seq,
            clock=clock,
            obey=lambda commands: self.sites.obey(commands),
            reload=self._load_world,
            on_fenced=on_fenced,
        )
        self.sites = Sites(
            site,
            engine,
            store,
            directory,
            clock=clock,
            world=lambda: self.world,
            build=lambda launch_id: self.runners.build(launch_id),
            tell=self._turns.put,
            met=lambda stranger: self.runners.let_in(stranger),
            epoch=epoch,
            monotonic=monotonic,
        )
        self.models = Models(
            store,
            self.blobs,
            root=settings.common / "models",
            home=site.id,
            epoch=epoch,
            clock=clock,
            workloads=lambda: tuple(self.world.workloads.copy().values()),
            committed=lambda: self._turns.put(()),
        )
        self.data = DataSets(
            store,
            self.blobs,
            vault,
            folder=settings.home,
            home=site.id,
            clock=clock,
            sites=self.sites.all,
            workloads=lambda: tuple(self.world.workloads.copy().values()),
            elsewhere=self.sites.read_file,
            models=self.models,
        )
        scaler = Scaler(world=lambda: self.world, tell=self._turns.put, clock=clock, habits=store)
        self.rollouts = Rollouts(scaler, clock=clock)
        self.serving = Serving(
            store,
            directory,
            world=lambda: self.world,
            projects=self.projects,
            scaler=scaler,
            rollouts=self.rollouts,
            clock=clock,
            guards=settings.guards,
            home=site.id,
        )
        self.renting: Renting | None = None
        """What rents machines, when this installation does."""
        self.acceptance = Acceptance(
            store,
            self._turns,
            self.data,
            self.blobs,
            renting=lambda: self.renting,
            fallbacks=self.serving.fallbacks,
        )
        self.access = Access(store, directory, vault, clock=clock)
        self.administration = Administration(self.projects, self._turns, clock=clock)
        self.jobs = Jobs(store, self._turns, self.acceptance, clock=clock, entropy=entropy, monotonic=monotonic)
        self.revisions = Revisions(store, self._turns, self.jobs, self.acceptance, self.rollouts, clock=clock)
        self.runners = Runners(store, self._turns, self.sites, directory, vault, api_url=settings.api_url, clock=clock)
        self.outputs = Outputs(
            store,
            self.blobs,
            self._turns,
            self.sites,
            root=settings.volume_root,
            is_shared=bool(settings.volumes),
            clock=clock,
        )
        self.questions = Questions(
            store,
            self._turns,
            self.projects,
            self.acceptance,
            self.runners,
            self.sites,
            settings=settings,
            engine=engine,
            rates=rates,
            directory=directory,
            energy_evidence=energy_evidence,
            clock=clock,
        )
        self._epoch = epoch
        self._recorder: Recorder | None = None
        self._recording = threading.Lock()
        self._closing = threading.Event()
        self._sampler = threading.Thread(target=self._sample_forever, name="sample", daemon=True)
        self.runners.remember()

    @property
    def world(self) -> World:
        """The world, for reading only: it changes under the reader, one value at a time."""
        return self._turns.world

    @property
    def last_seq(self) -> int:
        """The number of the newest event."""
        return self._turns.last_seq

    def now(self) -> int:
        """The time of day in ns since 1970, as this control plane keeps it."""
        return self._clock()

    def start(self) -> None:
        """Join the engine's machines and begin to take turns and act on them."""
        self._turns.start()
        now = self._clock()
        if self._engine is not None:
            nodes = self._engine.nodes()
            self._turns.put([NodeJoined(at_ns=now, node=node) for node in nodes]).result(timeout=60)
        self.sites.start()
        self.data.start()
        if self.renting is not None:
            self.renting.start()
        self.serving.scaler.start()
        self._sampler.start()

    def close(self) -> None:
        """Stop acting. With nothing running, the machines leave, so that no time counts while they are away."""
        self._closing.set()
        self.serving.scaler.close()
        if self.renting is not None:
            self.renting.close()
        self.data.close()
        self.sites.close()
        world = self.world
        if not world.allocations:
            gone = [NodeWentAway(at_ns=self._clock(), node_id=node, detail="shut down") for node in list(world.nodes)]
            try:
                self._turns.put(gone).result(timeout=10)
            except (Unavailable, TimeoutError, Fenced):
                self._closing.set()
        self._turns.close()
        self.logs.shut()

    def rent(self, provisioner: Provisioner, settings: CloudSettings) -> None:
        """Have machines rented from there, from ``start`` on."""
        self.renting = Renting(
            provisioner,
            settings,
            store=self.store,
            turns=self._turns,
            sites=self.sites,
            policy=self.settings.policy,
            epoch=self._epoch,
            clock=self._clock,
        )

    def replicas(self) -> tuple[Replica, ...]:
        """The control planes of this installation, the leader among them; none where it has only one."""
        return self._candidate.replicas if self._candidate is not None else ()

    def check_leads(self) -> None:
        """Raises: Unavailable when another control plane may lead by now, and this one's answers may be old."""
        if self._candidate is not None and not self._candidate.is_sure():
            raise Unavailable("The database does not confirm that this control plane leads.", mend="Try again.")

    def check_serves(self) -> None:
        """Raises: Unavailable when requests cannot be served at the moment."""
        self.check_leads()
        self.store.organizations()
        self._turns.check_stores()

    def watch(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Have ``callback`` called with the newest event's number after each commit; returns how to stop it."""
        return self._turns.watch(callback)

    def tell(self, facts: Sequence[Fact]) -> Future[None]:
        """Nothing, when what follows from these facts is stored."""
        return self._turns.put(facts)

    def record(self, recorder: Recorder) -> Callable[[], None]:
        """Have a recorder told of every turn from here on; returns how to stop.

        Raises: Conflict while another is.
        """
        with self._recording:
            if self._recorder is not None:
                raise Conflict("Turns are being recorded already.", mend="Wait until the other recording is over.")
            self._recorder = recorder

        def stop() -> None:
            with self._recording:
                if self._recorder is not recorder:
                    return
                self._recorder = None
            self._turns.record(None)

        try:
            self._turns.record(recorder).result(_RECORDING_BEGINS_S)
        except BaseException:
            stop()
            raise
        return stop

    def _load_world(self, recorder: Recorder | None = None) -> World:
        snapshot, now = self.store.load(), self._clock()
        sites, projects, policy = self._all_sites(), self.projects.all(), self.settings.policy
        if recorder is not None:
            try:
                recorder.begin(snapshot, sites=sites, projects=projects, rates=self._rates, policy=policy, now=now)
            except Exception:
                log.exception("a recorder failed at its beginning")
        return world_from(snapshot, sites=sites, projects=projects, rates=self._rates, policy=policy, now=now)

    def _all_sites(self) -> list[Site]:
        return [self.site, *(site for site in self.store.sites() if site.id != self.site.id)]

    def _sample_forever(self) -> None:
        sweep_at_s = 0.0
        while not self._closing.wait(5.0):
            if time.monotonic() >= sweep_at_s:
                sweep_at_s = time.monotonic() + _SWEEP_EVERY_S
                try:
                    self.models.sweep()
                except TidemillError as error:
                    log.warning("files of models could not be looked through: %s", error)
            sampled = self._sample()
            if sampled is not None:
                self._turns.put([sampled])
