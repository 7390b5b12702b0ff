"""① How much a project may hold at the same time, and what is its own of what others hold: the quota tree.

Every queue has limits that are never passed, guarantees that it can take back from those who borrowed them, and a
weight by which what is left over is shared. A start has to fit under the limits of all queues from the project's own
upwards. ``core.fairness`` has the arithmetic of shares, ``core.queueing`` the order that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy

from tidemill.core.fairness import Claim, Party, QueueShare, could_have, covers, total_in
from tidemill.model.ids import PrincipalId, ProjectId, QueueId, queue_id
from tidemill.model.plan import Reason, ResolvableBy
from tidemill.model.queue import CPU, GPU, MEMORY, Queue, QueueUsage
from tidemill.model.tenant import Project
from tidemill.units import MILLI, format_size


class QuotaTree:
    """Queues, projects and their users, with what they hold. Changed in place; each change has its reverse.

    A project without a queue of its own has one right under the fleet, of weight 1. Undoing a change of what is held
    is exact; undoing a change of the tree restores averages to within rounding, since they are summed up anew.
    """

    def __init__(self, *, half_life_ns: int = 0) -> None:
        self.half_life_ns = half_life_ns
        self.capacity: dict[str, int] = {}
        self.changes = 0
        """Grows with every change that could move a share."""
        self.root = Party("", "fleet")
        self._queues: dict[QueueId, Queue] = {}
        self._projects: dict[ProjectId, Project] = {}
        self._parties: dict[str, Party] = {}
        self._leaves: dict[ProjectId, Party] = {}
        self._pools: dict[str, tuple[tuple[str, ...], int]] = {}
        self._now = 0
        self._is_stale = False
        self._changed_ns = 0

    # -- the tree -----------------------------------------------------------------------------------------------

    def set_queue(self, queue: Queue) -> None:
        """Add a queue, or replace the one of the same id. The reverse: the one before, or ``remove_queue``."""
        self._queues[queue.id] = queue
        self._change_tree()

    def remove_queue(self, queue_id: QueueId) -> None:
        """Take a queue away; its project, if it has one, is right under the fleet again."""
        self._queues.pop(queue_id, None)
        self._change_tree()

    def open_project(self, project: Project) -> None:
        """Know a project, or its new limits."""
        self._projects[project.id] = project
        leaf = self._leaves.get(project.id)
        if leaf is None:
            if not self._is_stale:
                self._implicit_leaf(project.id)
        elif not self._is_stale:
            self._limit(leaf, leaf.id)

    def set_capacity(self, capacity: Mapping[str, int]) -> None:
        """What the fleet has in all of each resource; the reverse sets the one before."""
        self.capacity = dict(capacity)
        self._pools.clear()
        self.changes += 1

    def queue_of(self, project_id: ProjectId) -> Queue | None:
        """The stored queue of a project."""
        self._settle()
        leaf = self._leaves.get(project_id)
        return self._queues.get(QueueId(leaf.id)) if leaf is not None else None

    # -- what is held -------------------------------------------------------------------------------------------

    def hold(self, project_id: ProjectId, principal_id: PrincipalId, amounts: Mapping[str, int], jobs: int = 0) -> None:
        """Count ``amounts`` (by resource) and running jobs; ``release`` is the reverse."""
        self._change(project_id, principal_id, amounts, jobs, 1)

    def release(
        self, project_id: ProjectId, principal_id: PrincipalId, amounts: Mapping[str, int], jobs: int = 0
    ) -> None:
        """The reverse of ``hold``."""
        self._change(project_id, principal_id, amounts, jobs, -1)

    def line_up(self, project_id: ProjectId, jobs: int = 1) -> None:
        """Count jobs that wait; the reverse is the same with as many less than none."""
        for party in self._leaf(project_id).upwards():
            party.queued += jobs

    def advance(self, now: int) -> None:
        """Let averages follow until ``now``. Not undone: time has passed, whatever became of the turn."""
        self._now = max(self._now, now)
        self.changes += 1

    def held(self, project_id: ProjectId) -> Mapping[str, int]:
        """What a project holds now, by resource."""
        return self._leaf(project_id).held

    def replace_queue(self, queue_id: QueueId, before: Queue | None) -> None:
        """The reverse of ``set_queue``: the queue as it was, or not there."""
        if before is None:
            self.remove_queue(queue_id)
        else:
            self.set_queue(before)

    # -- what may be held ---------------------------------------------------------------------------------------

    def over_limit(
        self, project_id: ProjectId, amounts: Mapping[str, int], jobs: int = 1, *, ever: bool = False
    ) -> Reason | None:
        """The first limit, from the project upwards, above which a start would go; None when there is none.

        With ``ever``, as if nothing were held: why it never will.
        """
        found = self._first_over(project_id, amounts, jobs, ever=ever)
        return found[2] if found is not None else None

    def who_shares_limit(
        self, project_id: ProjectId, amounts: Mapping[str, int], jobs: int = 1
    ) -> tuple[frozenset[ProjectId], str] | None:
        """The projects that the limit is for that ``over_limit`` names, and of which resource; empty: of jobs."""
        found = self._first_over(project_id, amounts, jobs)
        if found is None:
            return None
        sharing = [one for one, leaf in self._leaves.items() if any(party is found[0] for party in leaf.upwards())]
        return frozenset(sharing), found[1]

    def _first_over(
        self, project_id: ProjectId, amounts: Mapping[str, int], jobs: int, *, ever: bool = False
    ) -> tuple[Party, str, Reason] | None:
        for party in self._leaf(project_id).upwards():
            if party.max_running and party.running * (not ever) + jobs > party.max_running:
                return party, "", self._too_many(party, party.max_running, party.running * (not ever), jobs)
            for name, limit in party.limit.items():
                need = total_in(name, amounts)
                if need and need > limit - (0 if ever else party.in_class(name)):
                    return party, name, self._too_much(party, name, limit, need, None if ever else party.in_class(name))
        return None

    def is_limited(self, project_id: ProjectId) -> bool:
        """Whether anything bounds what the project may hold; else ``over_limit`` need not be asked."""
        return self._leaf(project_id).is_limited

    def too_many_queued(self, project_id: ProjectId, jobs: int = 1) -> Reason | None:
        """The first cap on waiting jobs, from the project upwards, that ``jobs`` more would pass."""
        for party in self._leaf(project_id).upwards():
            if party.max_queued and party.queued + jobs > party.max_queued:
                return Reason(
                    code="TooManyQueued",
                    subject=party.name,
                    needed=_jobs(jobs),
                    available=f"{max(party.max_queued - party.queued, 0)} of {party.max_queued}",
                    resolvable_by=ResolvableBy.TIME if jobs <= party.max_queued else ResolvableBy.POLICY,
                    sentence=(
                        f"{self._called(party)} may have {_jobs(party.max_queued)} waiting, and {party.queued} wait; "
                        f"{_jobs(jobs)} more would be too many."
                    ),
                )
        return None

    def has_guarantee(self, project_id: ProjectId) -> bool:
        """Whether anything is guaranteed to the project or to a queue above it."""
        return any(party.guaranteed for party in self._leaf(project_id).upwards())

    def allowed_models(self, project_id: ProjectId, milli: int) -> tuple[str, ...] | None:
        """The device models of which the project may hold ``milli`` more; None when no limit singles out models."""
        limits = [
            (name, limit, party)
            for party in self._leaf(project_id).upwards()
            for name, limit in party.limit.items()
            if name.startswith(f"{GPU}:")
        ]
        if not limits:
            return None
        models = [resource for resource in self.capacity if resource not in (CPU, MEMORY)]
        allowed = tuple(
            model
            for model in models
            if not any(covers(name, model) and party.in_class(name) + milli > limit for name, limit, party in limits)
        )
        return None if len(allowed) == len(models) else allowed

    def sides(self, one: ProjectId, other: ProjectId) -> tuple[QueueId, QueueId] | None:
        """The two queues, children of one parent, under which two projects part; None for one and the same."""
        parted = self._part(self._leaf(one), self._leaf(other))
        return (QueueId(parted[0].id), QueueId(parted[1].id)) if parted else None

    def may_reclaim(
        self,
        taker: ProjectId,
        amounts: Mapping[str, int],
        victim: ProjectId,
        *,
        gone: Mapping[str, int] | None = None,
    ) -> bool:
        """Whether the taker may have ``amounts`` at the cost of the victim, judged where the two part in the tree.

        The taker's side stays within its guarantee in every class of it that it needs; the GPUs that it needs, or for
        work without GPUs the CPU, are guaranteed to it. The victim's side holds something of what is needed beyond all
        that is guaranteed to it. ``gone`` is what the victim's side has lost to others already.
        """
        parted = self._part(self._leaf(taker), self._leaf(victim))
        if parted is None:
            return False
        mine, theirs = parted
        if not _is_within(mine, amounts):
            return False
        held = theirs.held
        if gone:
            held = {resource: amount - gone.get(resource, 0) for resource, amount in held.items()}
        needed = [resource for resource, amount in amounts.items() if amount]
        covered = [resource for resource in needed if any(covers(name, resource) for name in mine.guaranteed)]
        return any(_is_beyond(theirs.guaranteed, held, resource) for resource in covered)

    def is_guaranteed(self, holder: ProjectId, amounts: Mapping[str, int], against: ProjectId) -> bool:
        """Whether what a project's side holds, of what ``amounts`` needs, is all within its guarantee, judged where it
        and another part in the tree."""
        parted = self._part(self._leaf(holder), self._leaf(against))
        if parted is None:
            return False
        side = parted[0]
        covered = [
            name for name, amount in amounts.items() if amount and any(covers(one, name) for one in side.guaranteed)
        ]
        return bool(covered) and not any(_is_beyond(side.guaranteed, side.held, name) for name in covered)

    # -- order --------------------------------------------------------------------------------------------------

    def path(self, project_id: ProjectId, principal_id: PrincipalId) -> tuple[Party, ...]:
        """From right under the fleet down to the user of the project."""
        leaf = self._leaf(project_id)
        above = tuple(leaf.upwards())[-2::-1]
        return (*above, self._user(leaf, principal_id))

    def key(
        self, party: Party, amounts: Mapping[str, int] | None = None, also: Mapping[str, int] | None = None
    ) -> tuple[bool, float]:
        """What siblings are compared by, smaller first: who would stay within its guarantee, then the smaller share.

        ``amounts`` is what the party's next job needs, and only that counts; None when it is not known, and then all
        does. ``also`` is counted as if it were held.
        """
        is_entitled = bool(party.guaranteed) and _is_within(party, amounts, also)
        if amounts is None:
            return (not is_entitled, party.share(self.capacity, now=self._now, half_life_ns=self.half_life_ns))
        fade = party.fade(self._now, self.half_life_ns)
        most = 0.0
        for name, amount in amounts.items():
            resources, total = self._pool(name)
            if amount and total:
                part = (party.weigh(resources, fade) + (total_in(name, also) if also else 0)) / total
                if part > most:
                    most = part
        return (not is_entitled, most * MILLI / party.weight_milli)

    # -- what people see, and what is stored ----------------------------------------------------------------------

    def report(self) -> tuple[QueueShare, ...]:
        """Who has what, a row for each queue and project, parents before their children."""
        self._settle()
        classes = self._classes()
        entitled = {"": {name: total_in(name, self.capacity) for name in classes}}
        rows: list[QueueShare] = []
        waiting = [(child, 0) for child in reversed(_by_name(self.root))]
        self._entitle(self.root, classes, entitled)
        while waiting:
            party, depth = waiting.pop()
            rows.append(self._row(party, depth, classes, entitled[party.id]))
            if not party.project_id:
                self._entitle(party, classes, entitled)
                waiting.extend((child, depth + 1) for child in reversed(_by_name(party)))
        return tuple(rows)

    def usages(self) -> tuple[QueueUsage, ...]:
        """The averages of all users that have one, to be stored; each with the version after the stored one."""
        self._settle()
        found: list[QueueUsage] = []
        for project_id, leaf in sorted(self._leaves.items()):
            for principal_id, user in sorted(leaf.children.items()):
                taken = user.taken_at(self._now, self.half_life_ns)
                if taken or user.version:
                    found.append(
                        QueueUsage(
                            id=f"{project_id}/{principal_id}",
                            version=user.version + 1,
                            at_ns=self._now,
                            taken=tuple(sorted(taken.items())),
                        )
                    )
        return tuple(found)

    def restore(self, usages: Iterable[QueueUsage]) -> None:
        """Take averages over as they were stored, with their versions.

        What is held meanwhile counts from ``at_ns`` of each, so count what is held first. It is also how the tree
        learns that what ``usages`` returned is stored.
        """
        for usage in usages:
            project_id, _, principal_id = usage.id.partition("/")
            user = self._user(self._leaf(ProjectId(project_id)), PrincipalId(principal_id))
            user.version = usage.version
            if self.half_life_ns:
                user.taken = {**dict.fromkeys(user.held, 0.0), **dict(usage.taken)}
                user.at_ns = usage.at_ns
            self._now = max(self._now, usage.at_ns)
        self._change_tree()

    # -- inside -------------------------------------------------------------------------------------------------

    def _change_tree(self) -> None:
        """Have sums worked out anew, as of now, before they are next needed."""
        self._is_stale, self._changed_ns = True, self._now
        self.changes += 1

    def _change(
        self, project_id: ProjectId, principal_id: PrincipalId, amounts: Mapping[str, int], jobs: int, sign: int
    ) -> None:
        now, half_life_ns = self._now, self.half_life_ns
        self.changes += 1
        for party in self._user(self._leaf(project_id), principal_id).upwards():
            party.change(amounts, sign, now=now, half_life_ns=half_life_ns)
            party.running += sign * jobs

    def _pool(self, name: str) -> tuple[tuple[str, ...], int]:
        """The fleet's resources that answer to what a job needs, and how much of them there is."""
        found = self._pools.get(name)
        if found is None:
            resources = tuple(resource for resource in self.capacity if covers(name, resource))
            found = self._pools[name] = (resources, sum(self.capacity[resource] for resource in resources))
        return found

    def _leaf(self, project_id: ProjectId) -> Party:
        if self._is_stale:
            self._settle()
        leaf = self._leaves.get(project_id)
        return leaf if leaf is not None else self._implicit_leaf(project_id)

    def _user(self, leaf: Party, principal_id: PrincipalId) -> Party:
        user = leaf.children.get(principal_id)
        if user is None:
            user = leaf.children[principal_id] = Party(principal_id, principal_id, at_ns=self._changed_ns)
            user.parent = leaf
        return user

    def _implicit_leaf(self, project_id: ProjectId) -> Party:
        leaf = Party(queue_id(project_id), project_id, at_ns=self._changed_ns, project_id=project_id)
        self._limit(leaf, "")
        leaf.parent = self.root
        self.root.children[leaf.id] = leaf
        self._leaves[project_id] = leaf
        return leaf

    def _limit(self, leaf: Party, identity: str) -> None:
        """The limits of a project's leaf: those of its queue, and its project's own where they are lower."""
        queue = self._queues.get(QueueId(identity))
        leaf.limit = dict(queue.limit) if queue else {}
        project = self._projects.get(leaf.project_id)
        if project is not None and queue is None:
            leaf.name = project.name

    def _settle(self) -> None:
        """Lay the tree anew after its queues changed: users keep what is theirs, all above is summed up again."""
        if not self._is_stale:
            return
        self._is_stale = False
        draft = copy(self)  # laid aside, so that whoever looks meanwhile has the old tree whole
        draft._lay()
        self.root, self._parties, self._leaves = draft.root, draft._parties, draft._leaves

    def _lay(self) -> None:
        leaves, at_ns = self._leaves, self._changed_ns
        self.root, self._parties, self._leaves = Party("", "fleet", at_ns=at_ns), {}, {}
        for identity, queue in sorted(self._queues.items()):
            party = Party(identity, queue.name, at_ns=at_ns, project_id=queue.project_id)
            party.weight_milli, party.guaranteed = queue.weight_milli, dict(queue.guaranteed)
            party.max_running, party.max_queued = queue.max_running, queue.max_queued
            party.limit = dict(queue.limit)
            self._parties[identity] = party
            if queue.project_id and queue.project_id not in self._leaves:
                self._leaves[queue.project_id] = party
                self._limit(party, identity)
        for party in self._parties.values():
            party.parent = self._parent(QueueId(party.id))
            party.parent.children[party.id] = party
        for project_id in [*self._projects, *leaves]:
            if project_id not in self._leaves:
                self._implicit_leaf(project_id)
        for project_id, before in leaves.items():
            leaf = self._leaves[project_id]
            for party in leaf.upwards():
                party.queued += before.queued
            for user in before.children.values():
                self._move(user, leaf)

    def _parent(self, identity: QueueId) -> Party:
        """The party above; the root where the tree has a hole or a circle, which ``why_not_tree`` refuses."""
        seen, at = {identity}, self._queues[identity].parent_id
        above = self._parties.get(at)
        while at and at not in seen and at in self._queues:
            seen.add(at)
            at = self._queues[at].parent_id
        return self.root if above is None or at else above

    def _move(self, user: Party, leaf: Party) -> None:
        leaf.children[user.id] = user
        user.parent = leaf
        average = user.taken_at(self._changed_ns, self.half_life_ns)
        for party in leaf.upwards():
            party.running += user.running
            for resource, amount in user.held.items():
                party.held[resource] = party.held.get(resource, 0) + amount
            for resource, taken in average.items():
                party.taken[resource] = party.taken.get(resource, 0.0) + taken

    @staticmethod
    def _part(one: Party, other: Party) -> tuple[Party, Party] | None:
        mine, theirs = tuple(one.upwards())[::-1], tuple(other.upwards())[::-1]
        return next((pair for pair in zip(mine, theirs, strict=False) if pair[0] is not pair[1]), None)

    def _called(self, party: Party) -> str:
        return f"Project {party.name}" if party.project_id and not self._is_stored(party) else f"Queue {party.name}"

    def _is_stored(self, party: Party) -> bool:
        return party.id in self._queues

    def _too_much(self, party: Party, name: str, limit: int, need: int, has: int | None) -> Reason:
        in_use = f", {_amount(name, has)} in use" if has is not None else ""
        return Reason(
            code="QueueLimit",
            subject=party.name,
            needed=f"{_amount(name, need)} {_unit(name)}".strip(),
            available=f"{_amount(name, max(limit - (has or 0), 0))} of {_amount(name, limit)}",
            resolvable_by=ResolvableBy.TIME if has is not None and need <= limit else ResolvableBy.POLICY,
            sentence=(
                f"{self._called(party)} may hold {_amount(name, limit)} {_unit(name)} at once{in_use}; "
                f"{_amount(name, need)} are asked for."
            ),
        )

    def _too_many(self, party: Party, cap: int, running: int, jobs: int) -> Reason:
        verb = "runs" if running == 1 else "run"
        return Reason(
            code="TooManyRunning",
            subject=party.name,
            needed=_jobs(jobs),
            available=f"{max(cap - running, 0)} of {cap}",
            resolvable_by=ResolvableBy.TIME if jobs <= cap else ResolvableBy.POLICY,
            sentence=f"{self._called(party)} may run {_jobs(cap)} at once, and {running} {verb}.",
        )

    def _classes(self) -> tuple[str, ...]:
        named = {
            name for party in self._parties.values() for name in (*party.guaranteed, *party.limit) if name != GPU
        } - {CPU, MEMORY}
        return (GPU, *sorted(named), CPU, MEMORY)

    def _entitle(self, parent: Party, classes: tuple[str, ...], entitled: dict[str, dict[str, int]]) -> None:
        """Work out what each child could have now of what its parent is entitled to."""
        children = _by_name(parent)
        for name in classes:
            limits = [_limit_in(child, name) for child in children]
            claims = [_claim(child, name, limit) for child, limit in zip(children, limits, strict=True)]
            for child, part in zip(children, could_have(entitled[parent.id][name], claims, limits), strict=True):
                entitled.setdefault(child.id, {})[name] = part

    def _row(self, party: Party, depth: int, classes: tuple[str, ...], entitled: Mapping[str, int]) -> QueueShare:
        share = party.share(self.capacity, now=self._now, half_life_ns=self.half_life_ns)
        held = {name: total_in(name, party.held) for name in classes}
        guaranteed = party.guaranteed
        return QueueShare(
            id=QueueId(party.id),
            name=party.name,
            parent=party.parent.name if party.parent and party.parent.id else "",
            project_id=party.project_id,
            depth=depth,
            weight_milli=party.weight_milli,
            guaranteed=tuple(guaranteed.items()),
            limit=tuple(party.limit.items()),
            held=tuple(held.items()),
            borrowed=tuple((name, max(amount - guaranteed.get(name, 0), 0)) for name, amount in held.items()),
            entitled=tuple(entitled.items()),
            models=tuple(sorted((name, amount) for name, amount in party.held.items() if name not in (CPU, MEMORY))),
            share=share * party.weight_milli / MILLI / 2,
            running=party.running,
            queued=party.queued,
        )


def why_not_tree(
    queues: Iterable[Queue], projects: Iterable[Project], capacity: Mapping[str, int] | None = None
) -> Reason | None:
    """What is wrong with a quota tree, naming the queue and its field; None when it can be used.

    ``capacity`` is what the fleet has, by resource; None: not to be compared with.
    """
    by_id = {queue.id: queue for queue in queues}
    known = {project.id: project.name for project in projects}
    children: dict[QueueId, list[Queue]] = {}
    owners: dict[ProjectId, Queue] = {}
    names: dict[str, Queue] = {}
    for queue in by_id.values():
        if (reason := _why_not_queue(queue, by_id, known, owners, names)) is not None:
            return reason
        children.setdefault(queue.parent_id, []).append(queue)
    for queue in by_id.values():
        if queue.project_id and queue.id in children:
            child = children[queue.id][0]
            return _bad(
                "ProjectQueueHasChildren",
                f"queues.{child.name}.parent",
                f"{queue.name} is the queue of project {known[queue.project_id]}, so it cannot have queues below it; "
                "put them beside it.",
            )
    if (reason := _circle(by_id)) is not None:
        return reason
    for parent in by_id.values():
        for reason in _above_parent(parent, children.get(parent.id, [])):
            return reason
    return _above_fleet(children.get(QueueId(""), []), capacity) if capacity is not None else None


def _why_not_queue(
    queue: Queue,
    by_id: Mapping[QueueId, Queue],
    known: Mapping[ProjectId, str],
    owners: dict[ProjectId, Queue],
    names: dict[str, Queue],
) -> Reason | None:
    """What is wrong with one queue beside those before it."""
    if names.setdefault(queue.name, queue) is not queue:
        return _bad("QueueNameTaken", f"queues.{queue.name}.name", f"Two queues are called {queue.name}.")
    if queue.parent_id and queue.parent_id not in by_id:
        sentence = f"Queue {queue.name} is below {queue.parent_id}, and there is no such queue."
        return _bad("UnknownParentQueue", f"queues.{queue.name}.parent", sentence, str(queue.parent_id))
    if not queue.project_id:
        return None
    if queue.project_id not in known:
        sentence = f"Queue {queue.name} is for project {queue.project_id}, and there is no such project."
        return _bad("UnknownProject", f"queues.{queue.name}.project", sentence, queue.project_id)
    other = owners.setdefault(queue.project_id, queue)
    if other is not queue:
        sentence = f"Project {known[queue.project_id]} has two queues, {other.name} and {queue.name}; it can have one."
        return _bad("ProjectHasTwoQueues", f"queues.{queue.name}.project", sentence)
    return None


def _circle(by_id: Mapping[QueueId, Queue]) -> Reason | None:
    sound: set[QueueId] = set()
    for queue in by_id.values():
        way: dict[QueueId, None] = {}
        at = queue.id
        while at and at not in sound:
            if at in way:
                names = [by_id[one].name for one in way]
                names = names[names.index(by_id[at].name) :]
                sentence = f"Each of these queues would be below the next: {', '.join([*names, names[0]])}."
                return _bad("QueueCycle", f"queues.{by_id[at].name}.parent", sentence)
            way[at] = None
            at = by_id[at].parent_id
        sound.update(way)
    return None


def _above_parent(parent: Queue, children: Sequence[Queue]) -> Iterator[Reason]:
    """Guarantees of children that their parent does not cover."""
    guaranteed, limit = dict(parent.guaranteed), dict(parent.limit)
    for child in children:
        for name, amount in child.guaranteed:
            if amount and not any(covers(one, name) for one in guaranteed):
                sentence = (
                    f"{child.name} is guaranteed {_with_unit(name, amount)}, and {parent.name} above it is guaranteed "
                    f"none; give {parent.name} at least as many."
                )
                yield _too_many_promised(f"queues.{child.name}.guaranteed.{name}", sentence, name, amount, 0)
    for what, bounds in (("is guaranteed", guaranteed), ("is limited to", limit)):
        for name, bound in bounds.items():
            total = sum(_sum_under(name, dict(child.guaranteed)) for child in children)
            if total > bound:
                sentence = (
                    f"The queues below {parent.name} are guaranteed {_with_unit(name, total)} together, and "
                    f"{parent.name} {what} {_with_unit(name, bound)}."
                )
                field = "guaranteed" if bounds is guaranteed else "limit"
                yield _too_many_promised(f"queues.{parent.name}.{field}.{name}", sentence, name, total, bound)


def _above_fleet(top: Sequence[Queue], capacity: Mapping[str, int]) -> Reason | None:
    for name in sorted({name for queue in top for name, _ in queue.guaranteed}):
        total = sum(_sum_under(name, dict(queue.guaranteed)) for queue in top)
        has = total_in(name, capacity)
        if total > has:
            who = ", ".join(queue.name for queue in top if _sum_under(name, dict(queue.guaranteed)))
            sentence = (
                f"{_with_unit(name, total)} are guaranteed to {who}, and the whole fleet has {_amount(name, has)}."
            )
            return Reason(
                code="GuaranteesAboveFleet",
                subject=f"queues.{next(q.name for q in top if _sum_under(name, dict(q.guaranteed)))}.guaranteed.{name}",
                needed=_with_unit(name, total),
                available=_with_unit(name, has),
                resolvable_by=ResolvableBy.CAPACITY,
                sentence=sentence,
            )
    return None


def _too_many_promised(field: str, sentence: str, name: str, total: int, bound: int) -> Reason:
    return _bad("GuaranteesAboveParent", field, sentence, _with_unit(name, total), _with_unit(name, bound))


def _bad(code: str, field: str, sentence: str, needed: str = "", available: str = "") -> Reason:
    return Reason(
        code=code,
        subject=field,
        needed=needed,
        available=available,
        resolvable_by=ResolvableBy.POLICY,
        sentence=sentence,
    )


def _sum_under(name: str, amounts: Mapping[str, int]) -> int:
    """How much of a class amounts by class promise: its own, or that of the classes within it when they are more."""
    within = {one: amount for one, amount in amounts.items() if one != name and covers(name, one)}
    widest = sum(
        amount for one, amount in within.items() if not any(other != one and covers(other, one) for other in within)
    )
    return max(amounts.get(name, 0), widest)


def _is_within(party: Party, amounts: Mapping[str, int] | None, also: Mapping[str, int] | None = None) -> bool:
    """Whether a party stays within its guarantee with ``amounts`` more, and what matters of them is guaranteed.

    With None, whether it is below its guarantee in any class.
    """
    guaranteed = party.guaranteed
    if amounts is None:
        return any(party.in_class(name) < bound for name, bound in guaranteed.items())
    has_gpus = False
    for resource, amount in amounts.items():
        if amount and resource != CPU and resource != MEMORY:
            has_gpus = True
            if not any(covers(name, resource) for name in guaranteed):
                return False
    if not has_gpus and CPU not in guaranteed:
        return False
    for name, bound in guaranteed.items():
        need = total_in(name, amounts)
        if need and party.in_class(name) + (total_in(name, also) if also else 0) + need > bound:
            return False
    return True


def _is_beyond(guaranteed: Mapping[str, int], held: Mapping[str, int], resource: str) -> bool:
    """Whether some of a resource is held beyond every guarantee that it counts in."""
    return total_in(resource, held) > 0 and all(
        total_in(name, held) > amount for name, amount in guaranteed.items() if covers(name, resource)
    )


def _limit_in(party: Party, name: str) -> int | None:
    limits = [amount for one, amount in party.limit.items() if covers(one, name)]
    return min(limits) if limits else None


def _claim(party: Party, name: str, limit: int | None) -> Claim:
    wants = limit if party.queued else total_in(name, party.held)
    return Claim(guaranteed=_sum_under(name, party.guaranteed), weight_milli=party.weight_milli, wants=wants)


def _by_name(parent: Party) -> list[Party]:
    return sorted(parent.children.values(), key=lambda party: (party.name, party.id))


def _unit(name: str) -> str:
    if name == MEMORY:
        return "of memory"
    return "CPU cores" if name == CPU else f"{name.partition(':')[2]} GPUs".strip()


def _amount(name: str, amount: int) -> str:
    return format_size(amount) if name == MEMORY else f"{amount / MILLI:g}"


def _with_unit(name: str, amount: int) -> str:
    return f"{_amount(name, amount)} {_unit(name)}"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"
