"""The model registry: models as versions known by content, where they came from, and which is meant by what name.

The files of a project's models lie below ``root/<project>``, each once, by its SHA-256. They are kept apart by project,
because who knows the SHA-256 of another's file is not to get it that way. What is decided here is stored with its line
in the event log, in one commit; one change is made at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, cast

from tidemill.control.blobs import BlobStore, walk
from tidemill.control.screening import SAFE, Screened, broken_error, pickle_error, screen
from tidemill.core import promotion
from tidemill.errors import Conflict, Forbidden, InvalidRequest, InvalidSpec, NotFound
from tidemill.model.events import LogEntry
from tidemill.model.ids import JobId, ModelId, ModelVersionId, ProjectId, SiteId, sortable_id
from tidemill.model.job import Workload
from tidemill.model.plan import Change
from tidemill.model.registry import (
    MODEL_NAME,
    Ancestor,
    Lineage,
    Model,
    ModelCard,
    ModelReference,
    ModelVersion,
    Stage,
    check_alias,
    parse_model_reference,
)
from tidemill.model.storage import (
    DataFile,
    DataMode,
    DataMount,
    Manifest,
    is_plain_path,
    manifest_of,
    read_manifest,
)
from tidemill.model.tenant import Project
from tidemill.ports import Batch, JobRow, Store
from tidemill.wire import spec_to_json

_KEPT_MANIFESTS: Final = 16
_TELL_AT_MOST: Final = 3
_PIECE: Final = 1 << 20
_ABANDONED_S: Final = 7 * 86_400.0
"""After so long, files that were sent and became part of nothing are removed."""
_DRAFT: Final = ".upload-"
_MAX_PAIRS: Final = 1_000
_MAX_TEXT: Final = 10_000
_KEY: Final = re.compile(r"[\w./ :-]{1,250}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """What is to become a version: its files, which are there already, and what is said of them.

    ``told`` are fields of its card that somebody said, which go before what the files say. ``allow_pickles`` asks that
    pickles be let in, ``is_admin`` says whether who asks may decide that alone.
    """

    manifest: Manifest
    by: str
    description: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    told: tuple[tuple[str, str], ...] = ()
    metrics: tuple[tuple[str, str], ...] = ()
    lineage: Lineage = Lineage()
    allow_pickles: bool = False
    is_admin: bool = False
    always: bool = False
    """Make a version also when the newest has the same files."""


class Models:
    """The models of all projects. Thread-safe. ``epoch`` is the leader's; ``home`` is the site of this machine.

    ``workloads`` lists what is not over; ``committed`` is called after each change that is stored.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        *,
        root: Path,
        home: SiteId,
        epoch: int,
        clock: Callable[[], int],
        workloads: Callable[[], Sequence[Workload]],
        committed: Callable[[], object],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._root = root
        self._home = home
        self._epoch = epoch
        self._clock = clock
        self._workloads = workloads
        self._committed = committed
        self._changing = threading.RLock()
        """Held while a change is decided and stored, and while files are removed."""
        self._opening = threading.Lock()
        self._files: dict[ProjectId, BlobStore] = {}
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()

    # ------------------------------------------------------------------ files

    def files(self, project: ProjectId) -> BlobStore:
        """The files of a project's models."""
        with self._opening:
            if project not in self._files:
                self._files[project] = BlobStore(self._root / project)
            return self._files[project]

    def size(self, project: ProjectId, digest: str) -> int:
        """The bytes of a file that is there, which is kept for a while longer. Raises: NotFound."""
        size = self.files(project).size(digest)
        self.files(project).touch(digest)
        return size

    def take_folder(self, project: ProjectId, folder: Path) -> Manifest:
        """The manifest of a resolved folder of this machine, or of one file, copied into the project's files.

        Raises: NotFound, InvalidRequest for links and for what cannot be a model, Conflict, StorageFull.
        """
        taken: list[DataFile] = []
        for member, content in walk(folder):
            if content is not None:
                taken.append(self._taken(project, member.name, content))
            elif not member.isdir():
                raise _no_link(member.name)
        return _manifest(taken)

    def take_archive(self, project: ProjectId, digest: str) -> Manifest:
        """The manifest of an artifact's archive, unpacked into the project's files. Raises: as ``take_folder``."""
        taken: list[DataFile] = []
        with closing(self._blobs.open(digest)) as packed:
            try:
                with tarfile.open(fileobj=packed, mode="r|gz") as archive:
                    for member in archive:
                        name = member.name.removeprefix("./")
                        content = archive.extractfile(member) if member.isreg() else None
                        if content is not None:
                            taken.append(self._taken(project, name, cast("BinaryIO", content)))
                        elif not member.isdir():
                            raise _no_link(name)
            except (tarfile.TarError, EOFError, OSError) as error:
                mend = "Publish the artifact again."
                raise InvalidRequest(f"The archive cannot be read: {error}.", field="artifact", mend=mend) from error
        return _manifest(taken)

    def manifest(self, version: ModelVersion) -> Manifest:
        """The files of a version, by path. Raises: NotFound when the list is lost."""
        return self._manifest(version.digest)

    def content(self, mount: DataMount, project: ProjectId, digest: str) -> Path:
        """Where a file of a mounted model is on this machine. Raises: NotFound."""
        files = self.files(project)
        if not any(file.digest == digest for file in self._manifest(mount.digest).files) or not files.exists(digest):
            raise NotFound("The model has no such file.", field="sha256", value=digest[:80])
        return files.path(digest)

    def _taken(self, project: ProjectId, path: str, content: BinaryIO) -> DataFile:
        if not is_plain_path(path):
            raise InvalidRequest(
                f"{path[:200]!r} would leave the model's folder.", field="path", value=path[:200], mend="Rename it."
            )
        with self.files(project).draft() as draft:
            while piece := content.read(_PIECE):
                draft.write(piece)
            size = draft.commit()
            return DataFile(path, size, draft.digest)

    # ------------------------------------------------------------------ uploads by path

    def put_upload(self, project: ProjectId, path: str, digest: str, size: int) -> None:
        """Nothing; the file of that content is found at ``path`` among a project's uploads. Raises: InvalidRequest."""
        place = self._upload_place(project, path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = place.with_name(f"{_DRAFT}{secrets.token_hex(8)}")
            draft.write_text(f"{digest} {size}")
            draft.replace(place)
        except OSError as error:
            mend = "Choose another path."
            raise InvalidRequest(f"{path} is in the way of another.", field="path", value=path, mend=mend) from error

    def uploads(self, project: ProjectId, path: str) -> dict[str, DataFile]:
        """The uploads at or below a path, by their paths below it; one at the path itself by its name."""
        place = self._upload_place(project, path)
        if place.is_file():
            found = _pointed_to(place, place.name)
            return {found.path: found} if found is not None else {}
        files = [one for one in sorted(place.rglob("*")) if one.is_file() and not one.name.startswith(_DRAFT)]
        pointers = (_pointed_to(one, one.relative_to(place).as_posix()) for one in files)
        return {one.path: one for one in pointers if one is not None}

    def remove_uploads(self, project: ProjectId, path: str) -> None:
        """Nothing; there is nothing at or below that path. What became part of a version stays there."""
        place = self._upload_place(project, path)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)

    def _upload_place(self, project: ProjectId, path: str) -> Path:
        plain = path.strip("/")
        if plain and (not is_plain_path(plain) or any(part.startswith(_DRAFT) for part in plain.split("/"))):
            mend = "Use names without .. between single slashes."
            raise InvalidRequest("That cannot be the path of a file.", field="path", value=path[:200], mend=mend)
        return self._root / project / "uploads" / plain

    # ------------------------------------------------------------------ models

    def all(self, project: Project) -> tuple[Model, ...]:
        """The project's models, by name."""
        return tuple(one for one in self._store.models(project.id) if not one.deleted_ns)

    def find(self, project: Project, name: str) -> Model:
        """Raises: NotFound."""
        found = self._store.model(project.id, name) if "\0" not in name else None
        if found is None or found.deleted_ns:
            mend = "See tidemill model list."
            raise NotFound(f"There is no model {name[:100]}.", field="model", value=name[:100], mend=mend)
        return found

    def register(
        self, project: Project, name: str, *, by: str, description: str = "", tags: Iterable[tuple[str, str]] = ()
    ) -> Model:
        """A new model without versions. Raises: Conflict when there is one of that name, InvalidRequest."""
        check_model_name(name)
        pairs = checked_pairs(tags, "tags")
        with self._changing:
            known = self._store.model(project.id, name)
            if known is not None and not known.deleted_ns:
                raise Conflict(
                    f"There is a model {name} already.", field="name", value=name, mend="Use that one.", taken=True
                )
            now = self._clock()
            if known is not None:
                made = replace(
                    known, version=known.version + 1, deleted_ns=0, description=_text(description), tags=pairs,
                    created_ns=now, created_by=by, changed_ns=now,
                )  # fmt: skip
                change = Change(assumed=known.version, after=made)
            else:
                made = Model(
                    id=ModelId(self._new_id("mdl", now)), project_id=project.id, name=name,
                    description=_text(description), tags=pairs, created_ns=now, created_by=by, changed_ns=now,
                )  # fmt: skip
                change = Change(assumed=None, after=made)
            self._commit([change], [self.note("ModelRegistered", made, model=name, by=by)])
            return made

    def describe(
        self, model: Model, *, description: str | None = None, tags: Mapping[str, str | None] | None = None
    ) -> Model:
        """The model with another description and with these tags; one that is None goes."""
        with self._changing:
            now = self._still(model)
            after = replace(
                now,
                description=now.description if description is None else _text(description),
                tags=_merged(now.tags, tags or {}),
                changed_ns=self._clock(),
            )
            return self._put(now, after, [])

    def rename(self, project: Project, model: Model, name: str, *, by: str) -> Model:
        """The model under another name. Raises: Conflict when that is taken, or what runs names it; InvalidRequest."""
        check_model_name(name)
        with self._changing:
            now = self._still(model)
            if self._store.model(project.id, name) is not None:
                raise Conflict(f"There is, or was, a model {name}.", field="name", value=name, mend="Choose another.")
            self._check_unused(self.users(now), now.name)
            after = replace(now, name=name, changed_ns=self._clock())
            return self._put(now, after, [self.note("ModelRenamed", after, model=name, before=now.name, by=by)])

    def delete(self, model: Model, *, by: str) -> Model:
        """The model, which is gone with all its versions.

        Raises: Conflict while a version is in staging or production, has an alias, or is used.
        """
        with self._changing:
            now = self._still(model)
            versions = [one for one in self._store.model_versions(now.id) if not one.deleted_ns]
            for version in versions:
                self._check_unneeded(now, version.number)
            self._check_unused(self.users(now), now.name)
            instant = self._clock()
            changes = [_gone(version, instant) for version in versions]
            after = replace(now, version=now.version + 1, placings=(), aliases=(), deleted_ns=instant)
            changes.append(Change(assumed=now.version, after=after))
            self._commit(changes, [self.note("ModelDeleted", now, model=now.name, versions=len(versions), by=by)])
            self._remove_unneeded(now.project_id, versions)
            return after

    # ------------------------------------------------------------------ versions

    def versions(self, model: Model) -> tuple[ModelVersion, ...]:
        """A model's versions, newest first."""
        return tuple(one for one in self._store.model_versions(model.id) if not one.deleted_ns)

    def version(self, project: Project, reference: str | ModelReference) -> tuple[Model, ModelVersion]:
        """The version that is meant, and its model. Raises: NotFound, InvalidRequest when that is no reference."""
        if isinstance(reference, str):
            try:
                reference = parse_model_reference(reference)
            except ValueError as error:
                mend = "Write NAME, NAME:VERSION, NAME@ALIAS or models:/NAME/STAGE."
                raise InvalidRequest(f"{error}.", field="model", mend=mend) from error
        model = self.find(project, reference.name)
        versions = self.versions(model)
        number = promotion.meant(model, reference, versions[0].number if versions else 0)
        found = next((one for one in versions if one.number == number), None)
        if found is None:
            mend = f"See tidemill model show {model.name}."
            raise NotFound(f"There is no {reference}.", field="model", value=str(reference), mend=mend)
        return model, found

    def add(self, project: Project, name: str, given: NewVersion) -> tuple[Model, ModelVersion]:
        """A new version of the model, which is made when there is none of that name; the newest one when it has the
        same files and nothing else was asked for.

        Raises: InvalidRequest that names each file that is refused, Forbidden for pickles that nobody may let in.
        """
        check_model_name(name)
        metrics, tags = checked_pairs(given.metrics, "metrics"), checked_pairs(given.tags, "tags")
        found = self.look(project, given.manifest)
        allowed = self._allowed(project, given, found)
        content = given.manifest.content()
        self._blobs.put(given.manifest.digest, [content])
        with self._changing:
            self._check_there(project.id, given.manifest)
            known = self._store.model(project.id, name)
            if known is None or known.deleted_ns:
                known = self.register(project, name, by=given.by)
            numbered = self._store.model_versions(known.id)
            newest = next((one for one in numbered if not one.deleted_ns), None)
            if newest is not None and newest.digest == given.manifest.digest and not given.always:
                return known, newest
            now = self._clock()
            made = ModelVersion(
                id=ModelVersionId(self._new_id("mdv", now)),
                model_id=known.id,
                project_id=project.id,
                number=max((one.number for one in numbered), default=0) + 1,
                digest=given.manifest.digest,
                size=given.manifest.size,
                files=len(given.manifest.files),
                description=_text(given.description),
                tags=tags,
                card=_amended(found.card, dict(given.told)),
                lineage=given.lineage,
                metrics=tuple(sorted((dict(found.metrics) | dict(metrics)).items())),
                pickles=tuple(path for path, _ in found.pickles),
                pickles_allowed=allowed,
                created_ns=now,
                created_by=given.by,
                changed_ns=now,
            )
            entry = self.note(
                "ModelVersionAdded", made, model=name, version=made.number, digest=made.digest, size=made.size,
                job=made.lineage.job_id, pickles=len(made.pickles), pickles_allowed=allowed, by=given.by,
            )  # fmt: skip
            self._commit([Change(assumed=None, after=made)], [entry])
            return known, made

    def describe_version(
        self, version: ModelVersion, *, description: str | None = None, tags: Mapping[str, str | None] | None = None
    ) -> ModelVersion:
        """The version with another description and with these tags; one that is None goes."""
        with self._changing:
            now = self._still_version(version)
            after = replace(
                now,
                version=now.version + 1,
                description=now.description if description is None else _text(description),
                tags=_merged(now.tags, tags or {}),
                changed_ns=self._clock(),
            )
            self._commit([Change(assumed=now.version, after=after)], [])
            return after

    def delete_version(self, model: Model, version: ModelVersion, *, by: str) -> ModelVersion:
        """The version, whose files are gone unless another one has them. Its number is not given again.

        Raises: Conflict while it is in staging or production, has an alias, or is used.
        """
        with self._changing:
            now, live = self._still(model), self._still_version(version)
            self._check_unneeded(now, live.number)
            self._check_unused(self.users(now, live), f"{now.name}:{live.number}")
            gone = _gone(live, self._clock())
            entry = self.note("ModelVersionDeleted", now, model=now.name, version=live.number, by=by)
            after = promotion.forgotten(now, live.number, now=self._clock())
            changes = [gone, Change(assumed=now.version, after=replace(after, version=now.version + 1))]
            self._commit(changes, [entry])
            self._remove_unneeded(now.project_id, [live])
            return cast("ModelVersion", gone.after)

    # ------------------------------------------------------------------ stages and aliases

    def promote(
        self, model: Model, number: int, stage: Stage, *, by: str, why: str = "", displaced: Stage = Stage.ARCHIVED
    ) -> Model:
        """The model with that version in that stage; one that was there is ``displaced``."""
        with self._changing:
            now = self._still(model)
            before, other = now.placing(number).stage, now.in_stage(stage)
            after = promotion.placed(now, number, stage, now=self._clock(), by=by, why=_text(why), displaced=displaced)
            entry = self.note(
                "ModelPromoted", now, model=now.name, version=number, stage=stage.value, before=before.value,
                instead_of=other if other != number else 0, by=by, why=_text(why),
            )  # fmt: skip
            return self._put(now, after, [entry])

    def point(self, model: Model, alias: str, number: int, *, by: str, why: str = "") -> Model:
        """The model whose alias points to that version. Raises: InvalidRequest for a name that cannot be one."""
        try:
            check_alias(alias)
        except ValueError as error:
            mend = "Write for example champion."
            raise InvalidRequest(f"{error}.", field="alias", value=alias[:100], mend=mend) from error
        with self._changing:
            now = self._still(model)
            before = next((one.number for one in now.aliases if one.name == alias), 0)
            after = promotion.pointed(now, alias, number, now=self._clock(), by=by, why=_text(why))
            entry = self.note(
                "ModelAliasSet", now, model=now.name, alias=alias, version=number, before=before, by=by, why=_text(why)
            )
            return self._put(now, after, [entry])

    def unpoint(self, model: Model, alias: str, *, by: str) -> Model:
        """The model without that alias. Harmless when it has none of that name."""
        with self._changing:
            now = self._still(model)
            after = promotion.unpointed(now, alias, now=self._clock())
            return self._put(now, after, [self.note("ModelAliasRemoved", now, model=now.name, alias=alias, by=by)])

    # ------------------------------------------------------------------ for jobs

    def pinned(self, mount: DataMount, project: Project) -> DataMount:
        """The mount with the version that its reference means now; one that was pinned before keeps its version, so
        that who goes back to an earlier spec gets the same octets. Raises: InvalidSpec.
        """
        try:
            model, version = self.version(project, mount.dataset or mount.model)
        except (NotFound, InvalidRequest) as error:
            mend = error.mend or "See tidemill model list, or add it: tidemill model push."
            asked = mount.dataset or mount.model
            raise InvalidSpec(error.detail, field="model.from", value=asked, mend=mend) from error
        return replace(
            mount,
            dataset=f"{model.name}:{version.number}",
            mode=DataMode.COPY,
            digest=version.digest,
            size=version.size,
            files=version.files,
            site_id=self._home,
        )

    def users(self, model: Model, version: ModelVersion | None = None) -> tuple[Workload, ...]:
        """What is not over and was given a version of the model, or that one."""
        named = f"{model.name}:{version.number}" if version is not None else f"{model.name}:"
        return tuple(
            one
            for one in self._workloads()
            if one.project_id == model.project_id
            and any(
                it.model and (it.dataset == named if version else it.dataset.startswith(named)) for it in one.spec.data
            )
        )

    def made_by(self, jobs: Sequence[JobId]) -> tuple[tuple[str, ModelVersion], ...]:
        """The versions that these jobs made, each with its model's name."""
        found = self._store.model_versions_of(jobs) if jobs else ()
        names = {
            model.id: model.name for project in {it.project_id for it in found} for model in self._store.models(project)
        }
        return tuple((names.get(it.model_id, it.model_id), it) for it in found)

    def lineage(self, row: JobRow, *, commit: str = "", run: str = "", source: str = "") -> Lineage:
        """Where what that job made comes from, as far as its spec tells."""
        spec = row.workload.spec
        artifacts = []
        for _, reference in spec.inputs:
            name, _, version = reference.partition(":")
            found = self._store.find_artifact(row.job.project_id, name, int(version or 0))
            if found is not None:
                artifacts.append(Ancestor(reference=f"{name}:{found.version}", digest=found.digest))
        written = json.dumps(spec_to_json(spec), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return Lineage(
            job_id=row.job.id,
            workload_id=row.workload.id,
            workload=spec.name,
            spec_digest=hashlib.sha256(written.encode()).hexdigest(),
            data=tuple(Ancestor(reference=it.dataset, digest=it.digest) for it in spec.data if not it.model),
            artifacts=tuple(artifacts),
            models=tuple(Ancestor(reference=it.dataset, digest=it.digest) for it in spec.data if it.model),
            commit=commit or dict(spec.labels).get("git-commit", ""),
            run=run,
            source=source,
        )

    # ------------------------------------------------------------------ checks

    def look(self, project: Project, manifest: Manifest) -> Screened:
        """What is found in these files. Raises: InvalidRequest that names each that is broken, or that is missing."""
        self._check_there(project.id, manifest)
        files = self.files(project.id)

        def opened() -> Iterator[tuple[str, int, BinaryIO]]:
            with ExitStack() as stack:
                for file in manifest.files:
                    stack.close()
                    yield file.path, file.size, stack.enter_context(closing(files.open(file.digest)))

        found = screen(opened())
        if (error := broken_error(found)) is not None:
            raise error
        return found

    def _allowed(self, project: Project, given: NewVersion, found: Screened) -> str:
        """Who lets the pickles in, and by what; empty when there are none. Raises: InvalidRequest, Forbidden."""
        refused = pickle_error(found)
        if refused is None:
            return ""
        if not given.allow_pickles:
            raise refused
        if project.allows_pickles:
            return f"{given.by}, by the policy of project {project.name}"
        if given.is_admin:
            return f"{given.by}, as an administrator"
        raise Forbidden(
            f"{refused.detail} Project {project.name} does not let pickles in.",
            field="allow_pickles",
            value=found.pickles[0][0],
            mend=f"{SAFE} Or ask an administrator: tidemill model policy --pickles allow.",
        )

    def _check_there(self, project: ProjectId, manifest: Manifest) -> None:
        files = self.files(project)
        for file in manifest.files:
            size = files.size(file.digest) if files.exists(file.digest) else -1
            if size != file.size:
                what = f"has {size:,} bytes" if size >= 0 else "was not uploaded"
                raise InvalidRequest(
                    f"{file.path} {what}.", field="files", value=file.path, mend="Upload it first, then try again."
                )
            files.touch(file.digest)

    def _check_unneeded(self, model: Model, number: int) -> None:
        if sentence := promotion.why_needed(model, number):
            mend = "Archive it, or move the alias, first: tidemill model archive, tidemill model alias."
            raise Conflict(sentence, field="model", value=f"{model.name}:{number}", mend=mend)

    @staticmethod
    def _check_unused(users: Sequence[Workload], what: str) -> None:
        if users:
            names = ", ".join(sorted({one.spec.name for one in users})[:_TELL_AT_MOST])
            mend = "Wait for it, or stop it, first."
            raise Conflict(f"{what} is used by what is not over: {names}.", field="model", value=what, mend=mend)

    # ------------------------------------------------------------------ storing

    def note(self, event: str, about: Model | ModelVersion, **body: str | int) -> LogEntry:
        """A line of the event log."""
        return LogEntry(at_ns=self._clock(), type=event, project_id=about.project_id, body=tuple(body.items()))

    def _put(self, before: Model, after: Model, log: Sequence[LogEntry]) -> Model:
        if after == before:
            return before
        after = replace(after, version=before.version + 1)
        self._commit([Change(assumed=before.version, after=after)], log)
        return after

    def _commit(self, changes: Sequence[Change], log: Sequence[LogEntry]) -> None:
        self._store.commit(Batch(epoch=self._epoch, changes=changes, log=log))
        self._committed()

    def _still(self, model: Model) -> Model:
        """The model as it is stored now. Raises: NotFound when it was deleted meanwhile."""
        now = next((one for one in self._store.models(model.project_id) if one.id == model.id), None)
        if now is None or now.deleted_ns:
            raise NotFound(f"There is no model {model.name}.", field="model", value=model.name)
        return now

    def _still_version(self, version: ModelVersion) -> ModelVersion:
        now = next((one for one in self._store.model_versions(version.model_id) if one.id == version.id), None)
        if now is None or now.deleted_ns:
            raise NotFound("That version is gone.", field="model", value=str(version.number))
        return now

    def _new_id(self, prefix: str, now: int) -> str:
        return sortable_id(prefix, now=now, entropy=secrets.randbits(40))

    def _manifest(self, digest: str) -> Manifest:
        with self._opening:
            if digest in self._manifests:
                self._manifests.move_to_end(digest)
                return self._manifests[digest]
        with closing(self._blobs.open(digest)) as file:
            found = read_manifest(file.read())
        with self._opening:
            self._manifests[digest] = found
            while len(self._manifests) > _KEPT_MANIFESTS:
                self._manifests.popitem(last=False)
        return found

    # ------------------------------------------------------------------ removing

    def sweep(self) -> int:
        """How many files were removed that are part of nothing and were sent long ago, of all projects."""
        removed = 0
        with suppress(FileNotFoundError):
            for folder in sorted(self._root.iterdir()):
                with self._changing:
                    removed += self._sweep(ProjectId(folder.name))
        return removed

    def _sweep(self, project: ProjectId) -> int:
        before_s = time.time() - _ABANDONED_S
        for pointer in list((self._root / project / "uploads").rglob("*")):
            if pointer.is_file() and pointer.stat().st_mtime < before_s:
                pointer.unlink(missing_ok=True)
        needed, files = self._needed(project), self.files(project)
        return sum(files.remove(one) for one in files.older_than(before_s) if one not in needed)

    def _needed(self, project: ProjectId) -> set[str]:
        needed: set[str] = set()
        for version in self._store.project_model_versions(project):
            needed |= {file.digest for file in self._manifest(version.digest).files}
        return needed | {file.digest for file in self.uploads(project, "").values()}

    def _remove_unneeded(self, project: ProjectId, gone: Sequence[ModelVersion]) -> None:
        needed, files = self._needed(project), self.files(project)
        for version in gone:
            for file in self._manifest(version.digest).files:
                if file.digest not in needed:
                    files.remove(file.digest)


def check_model_name(name: str) -> None:
    """Raises: InvalidRequest when that cannot be the name of a model."""
    if not MODEL_NAME.fullmatch(name):
        mend = "Use 1 to 63 letters, digits, - _ or ., beginning and ending with a letter or digit."
        raise InvalidRequest("That cannot be the name of a model.", field="name", value=name[:100], mend=mend)


def checked_pairs(pairs: Iterable[tuple[str, str]], field: str) -> tuple[tuple[str, str], ...]:
    """The pairs by name. Raises: InvalidRequest for what is too long, or too many."""
    found = dict(pairs)
    if len(found) > _MAX_PAIRS:
        raise InvalidRequest(f"There are {len(found):,}; at most {_MAX_PAIRS:,} are kept.", field=field)
    for name, value in found.items():
        if not _KEY.fullmatch(name):
            mend = "Use up to 250 letters, digits, spaces and / . _ : -"
            raise InvalidRequest("That cannot be a name.", field=field, value=name[:100], mend=mend)
        if len(value) > _MAX_TEXT or "\0" in value:
            raise InvalidRequest(f"{name} has over {_MAX_TEXT:,} characters.", field=field, value=name)
    return tuple(sorted(found.items()))


def _merged(known: tuple[tuple[str, str], ...], given: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    merged = dict(known) | dict(given)
    return checked_pairs(((name, value) for name, value in merged.items() if value is not None), "tags")


def _amended(card: ModelCard, told: Mapping[str, str]) -> ModelCard:
    """The card, in which what somebody said goes before what the files say."""
    return replace(
        card,
        framework=told.get("framework") or card.framework,
        architecture=told.get("architecture") or card.architecture,
        base_model=told.get("base_model") or card.base_model,
        licence=told.get("licence") or card.licence,
    )


def _text(text: str) -> str:
    return text.replace("\0", "")[:_MAX_TEXT]


def _gone(version: ModelVersion, now: int) -> Change:
    return Change(
        assumed=version.version, after=replace(version, version=version.version + 1, deleted_ns=now, changed_ns=now)
    )


def _no_link(name: str) -> InvalidRequest:
    mend = "Name the folder itself, or copy what it points to."
    return InvalidRequest(f"{name[:200]} is not a file but a link.", field="path", value=name[:200], mend=mend)


def _manifest(files: Sequence[DataFile]) -> Manifest:
    try:
        return manifest_of(files)
    except ValueError as error:
        raise InvalidRequest(f"That cannot be a model: {error}.", field="files", mend="Mend that first.") from error


def _pointed_to(pointer: Path, path: str) -> DataFile | None:
    """The file that an upload is; None when it went meanwhile."""
    try:
        digest, _, size = pointer.read_text().partition(" ")
        return DataFile(path, int(size), digest)
    except (OSError, ValueError):
        return None
