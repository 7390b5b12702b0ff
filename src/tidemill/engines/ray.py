"""The engine of machines that Tidemill owns: Ray knows which are there and reaches them; placement is ours.

On each node of the Ray cluster that joined with a Tidemill home, one detached actor is the agent: it is pinned to its
node, and works that machine as the local engine does. So workers are processes of their machine and not of Ray's: they
outlive the agent, the raylet, this driver and Ray's head, and whoever looks next finds them.

A gang also holds a placement group, one bundle for each worker, pinned to the node that was chosen: Ray has room for
all of it or for none, and others who use the cluster through Ray see what is taken.

Source: Ray 2.52 and later (token authentication, label selectors); https://docs.ray.io/en/latest/ray-core/api/core.html.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec

from tidemill.errors import EngineLost, TidemillError
from tidemill.model.events import Brought
from tidemill.model.fleet import Node
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.plan import LaunchSpec, Observation, Sight
from tidemill.ports import EngineCapabilities
from tidemill.units import MILLI
from tidemill.wire.outposts import EngineAnswer, EngineCall, OutpostReport, facts_in, raise_for

log = logging.getLogger(__name__)
NODE_RESOURCE: Final = "tidemill"
"""A machine that joined has so much of the resource ``tidemill:NODE``, by which bundles are pinned to it."""
PINS: Final = 1_000_000
_PIN: Final = 0.001
_NAMESPACE: Final = "tidemill"
_ANSWER_S: Final = 12.0
_LATE_S: Final = 4.0
"""For so long is waited for machines that did not answer the last time, so that the others are not kept waiting."""
_ROOM_S: Final = 10.0
_MEMBERS_S: Final = 1.0
_CALLS: Final = msgspec.json.Encoder()
_ANSWERS: Final = msgspec.json.Decoder(EngineAnswer)
_REPORTS: Final = msgspec.json.Decoder(OutpostReport)


def node_resource(node_id: str) -> str:
    """The resource that only that node has."""
    return f"{NODE_RESOURCE}:{node_id}"


def node_resources(node_id: str) -> str:
    """What ``ray start --resources`` is given on a machine that is that node."""
    return json.dumps({node_resource(node_id): PINS})


class RayEngine:
    """The Ray cluster at ``address``, from a driver in this process. Keeps the contract of engines.

    ``agent`` is the class of the actors: made without arguments on its node, its ``call`` takes an ``EngineCall`` as
    JSON and gives an ``EngineAnswer`` as JSON, its ``facts`` gives an ``OutpostReport``. ``token`` is the cluster's;
    a process has one cluster, because Ray reads it once. Raises: EngineLost when the cluster does not answer.
    """

    def __init__(self, address: str, agent: type, *, token: str) -> None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        import ray

        self._ray = ray
        self._agent = ray.remote(agent)
        try:
            ray.init(
                address=address,
                namespace=_NAMESPACE,
                log_to_driver=False,
                logging_level=logging.WARNING,
                ignore_reinit_error=True,
            )
        except Exception as error:
            raise EngineLost(f"Ray at {address} does not answer: {error}") from error
        self.replicas: tuple[str, ...] = ()
        """Where the control planes answer, which the machines are told with every call."""
        self._lock = threading.Lock()
        self._members: dict[NodeId, str] = {}
        """The Ray node of each of our nodes, as it was at ``_looked_s``."""
        self._looked_s = float("-inf")
        self._agents: dict[str, Any] = {}
        self._groups: set[str] = set()
        self._late: frozenset[NodeId] = frozenset()
        """The machines that did not answer in time when all were asked last."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Images depend on the machine, which says so itself."""
        return EngineCapabilities(name="ray", images=True, exec=True, places=True)

    def nodes(self) -> tuple[Node, ...]:
        """The machines whose agents answer."""
        answers = self._ask_all(EngineCall(number=0, method="nodes"))
        return tuple(node for answer in answers.values() for node in answer.nodes)

    def launch(self, spec: LaunchSpec) -> None:
        """Have that worker started; nothing more when its launch id was started before, even if it ended."""
        if spec.gang:
            self._hold_room(spec)
        self._ask(spec.node_id, EngineCall(number=0, method="launch", spec=spec))

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        """Have a worker signalled, and killed with all it started after the grace; remembered when unknown."""
        call = EngineCall(number=0, method="stop", launch_id=launch_id, node_id=node_id, grace_ns=grace_ns)
        self._ask(node_id, call)

    def observe(self) -> Sight:
        """What the agents see that answer; of the other machines nothing is said."""
        answers = self._ask_all(EngineCall(number=0, method="observe"))
        seen: list[Observation] = []
        for answer in answers.values():
            seen += answer.seen
        return Sight(
            nodes=frozenset(node for each in answers.values() for node in each.looked_at), launches=tuple(seen)
        )

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:
        """Drop what is kept of a launch that is gone; refused while anything of it lives; harmless twice."""
        self._ask(node_id, EngineCall(number=0, method="forget", launch_id=launch_id, node_id=node_id))
        self._give_back(_group_of(launch_id))

    def facts(self) -> tuple[Brought, ...]:
        """What the machines have to tell since they were last asked."""
        told: list[Brought] = []
        for _, reply in self._replies(lambda agent: agent.facts.remote()):
            told += facts_in(_REPORTS.decode(reply))
        return tuple(told)

    def close(self) -> None:
        """Let go of the cluster; agents and workers go on."""
        self._ray.shutdown()

    # ------------------------------------------------------------------ agents

    def _look(self) -> Mapping[NodeId, str]:
        """The Ray node of each of our nodes that Ray counts as alive."""
        with self._lock:
            if time.monotonic() - self._looked_s < _MEMBERS_S:
                return self._members
            found: dict[NodeId, str] = {}
            for node in self._ray.nodes():
                for name in node["Resources"] if node["Alive"] else ():
                    kind, _, node_id = name.partition(":")
                    if kind == NODE_RESOURCE and node_id:
                        found[NodeId(node_id)] = node["NodeID"]
            alive = set(found.values())
            self._agents = {member: agent for member, agent in self._agents.items() if member in alive}
            self._members, self._looked_s = found, time.monotonic()
            return found

    def _agent_on(self, member: str) -> Any:
        """The agent on that Ray node, made when there is none."""
        with self._lock:
            if (agent := self._agents.get(member)) is None:
                from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

                agent = self._agents[member] = self._agent.options(
                    name=f"agent-{member}",
                    lifetime="detached",
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=-1,
                    max_concurrency=16,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=member, soft=False),
                ).remote()
            return agent

    def _ask(self, node_id: NodeId, call: EngineCall) -> EngineAnswer:
        try:
            member = self._look().get(node_id)
            if member is None:
                raise EngineLost(f"{node_id} is not in the Ray cluster now")
            reply = self._agent_on(member).call.remote(self._request(call))
            answer = _ANSWERS.decode(self._ray.get(reply, timeout=_ANSWER_S))
        except TidemillError:
            raise
        except Exception as error:
            self._drop(node_id)
            raise EngineLost(f"{node_id} did not answer: {type(error).__name__}: {error}") from error
        raise_for(answer)
        return answer

    def _ask_all(self, call: EngineCall) -> dict[NodeId, EngineAnswer]:
        """The answers that come in time, by node; each was made after this began."""
        request = self._request(call)
        found = {
            node: _ANSWERS.decode(reply) for node, reply in self._replies(lambda agent: agent.call.remote(request))
        }
        return {node: answer for node, answer in found.items() if answer.outcome == "done"}

    def _request(self, call: EngineCall) -> bytes:
        return _CALLS.encode(replace(call, replicas=self.replicas))

    def _replies(self, ask: Callable[[Any], Any]) -> Iterator[tuple[NodeId, bytes]]:
        """What the agents reply in time. Raises: EngineLost when Ray itself does not answer."""
        try:
            asked = {ask(self._agent_on(member)): node for node, member in self._look().items()}
            ready = self._await(asked) if asked else []
        except Exception as error:
            raise EngineLost(f"Ray does not answer: {type(error).__name__}: {error}") from error
        for reply in ready:
            try:
                yield asked[reply], self._ray.get(reply, timeout=_ANSWER_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, that machine did not answer
                log.debug("%s did not answer: %s", asked[reply], error)
                self._drop(asked[reply])

    def _await(self, asked: Mapping[Any, NodeId]) -> list[Any]:
        """The replies that are there in time."""
        ready, rest = self._ray.wait(list(asked), num_returns=len(asked), timeout=_LATE_S)
        if not {asked[reply] for reply in rest} <= self._late:
            more, rest = self._ray.wait(rest, num_returns=len(rest), timeout=_ANSWER_S - _LATE_S)
            ready = [*ready, *more]
        self._late = frozenset(asked[reply] for reply in rest)
        return list(ready)

    def _drop(self, node_id: NodeId) -> None:
        """Find the agent of a node anew next time."""
        with self._lock:
            self._agents.pop(self._members.get(node_id, ""), None)
            self._looked_s = float("-inf")

    # ------------------------------------------------------------------ room for gangs

    def _hold_room(self, spec: LaunchSpec) -> None:
        """Nothing, once Ray holds room for the whole gang. Raises: EngineLost when others took it meanwhile."""
        name = _group_of(spec.launch_id)
        with self._lock:
            if name in self._groups:
                return
        from ray.util.placement_group import remove_placement_group

        try:
            group = self._group(name, spec)
            if not group.wait(_ROOM_S):
                remove_placement_group(group)
                raise EngineLost(f"Ray has no room for the {len(spec.gang)} workers of {spec.job_id}: others use it")
        except TidemillError:
            raise
        except Exception as error:
            raise EngineLost(f"Ray did not hold room for {spec.job_id}: {type(error).__name__}: {error}") from error
        with self._lock:
            self._groups.add(name)

    def _group(self, name: str, spec: LaunchSpec) -> Any:
        """The placement group of that name, made when there is none; its other ranks are launched at the same time."""
        from ray.util.placement_group import get_placement_group, placement_group

        try:
            return get_placement_group(name)
        except ValueError:
            bundles = [_bundle(place.node_id, place.cpu_milli, place.gpu_milli) for place in spec.gang]
        try:
            return placement_group(bundles, strategy="PACK", name=name, lifetime="detached")
        except Exception:  # noqa: BLE001 - Ray has no class of its own for a name that is taken
            return get_placement_group(name)

    def _give_back(self, name: str) -> None:
        from ray.util.placement_group import get_placement_group, remove_placement_group

        with self._lock:
            self._groups.discard(name)
        try:
            remove_placement_group(get_placement_group(name))
        except Exception as error:  # noqa: BLE001 - most launches are of no gang, or the others gave it back
            log.debug("no room to give back for %s: %s", name, error)


def _group_of(launch_id: LaunchId) -> str:
    """The name of the placement group of a launch's attempt."""
    return f"gang-{launch_id.rpartition('-')[0]}"


def _bundle(node_id: str, cpu_milli: int, gpu_milli: int) -> dict[str, float]:
    wanted: Iterable[tuple[str, float]] = (("CPU", cpu_milli / MILLI), ("GPU", gpu_milli / MILLI))
    return {node_resource(node_id): _PIN, **{name: amount for name, amount in wanted if amount}}
