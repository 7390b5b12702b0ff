"""Volumes and data sets by name: added, looked at, resolved for a job, and their files given to runners."""

from __future__ import annotations

import json
import logging
import posixpath
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from tidemill.control.blobs import BlobStore
from tidemill.control.homes import PIECE_BYTES, Bucket, Folder, S3Place, check_s3
from tidemill.control.models import Models
from tidemill.control.scan import scan
from tidemill.control.vault import Vault
from tidemill.errors import Conflict, InvalidRequest, InvalidSpec, NotFound, TidemillError, Unavailable
from tidemill.model.fleet import Site
from tidemill.model.ids import DataSetId, ProjectId, SiteId, VolumeId, sortable_id
from tidemill.model.job import Workload
from tidemill.model.spec import WorkloadSpec
from tidemill.model.storage import (
    DataFile,
    DataMode,
    DataMount,
    DataSet,
    DataSetState,
    Manifest,
    Volume,
    VolumeMount,
    manifest_of,
    read_manifest,
)
from tidemill.model.tenant import Project
from tidemill.ports import Store
from tidemill.wire.checks import BUCKET_MEND

log = logging.getLogger(__name__)
_NAME: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
_POLL_S: Final = 5.0
_KEPT_MANIFESTS: Final = 8
_TELL_AT_MOST: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Where the octets of a file are: in a file of this machine, at an address for an hour, or to be had in pieces.

    Exactly one of ``path``, ``address`` and ``pieces`` is there; ``pieces`` begins at the offset it is given.
    """

    size: int
    path: Path | None = None
    address: str = ""
    pieces: Callable[[int], Iterator[bytes]] | None = None


ReadElsewhere = Callable[[SiteId, str, str, int, int], bytes]
"""Reads part of a file at another site: the site, the machine or empty, the path, offset and length."""


class DataSets:
    """The volumes and data sets of all projects. ``home`` is the site of this machine.

    ``sites`` lists the sites, ``workloads`` what is not over, ``elsewhere`` reads files at sites with outposts.
    ``models`` has what jobs are given of the registry.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        vault: Vault,
        *,
        folder: Path,
        home: SiteId,
        clock: Callable[[], int],
        sites: Callable[[], Sequence[Site]],
        workloads: Callable[[], Sequence[Workload]],
        elsewhere: ReadElsewhere,
        models: Models,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._vault = vault
        self._own = folder.resolve()
        self._home = home
        self._clock = clock
        self._sites = sites
        self._workloads = workloads
        self._elsewhere = elsewhere
        self._models = models
        self._closing = threading.Event()
        self._bell = threading.Event()
        self._scanner = threading.Thread(target=self._scan_forever, name="scan", daemon=True)
        self._lock = threading.Lock()
        self._manifests: OrderedDict[str, dict[str, DataFile]] = OrderedDict()
        self._buckets: dict[DataSetId, tuple[S3Place, Bucket]] = {}

    def start(self) -> None:
        """Begin to look at data sets that nobody has looked at."""
        self._scanner.start()

    def close(self) -> None:
        """Look no further; what was not finished is begun anew later."""
        self._closing.set()
        self._bell.set()
        if self._scanner.is_alive():
            self._scanner.join(5.0)

    # ------------------------------------------------------------------ volumes

    def create_volume(
        self, project: Project, name: str, path: str, *, site: str, node: str, read_only: bool, by: str
    ) -> Volume:
        """The new volume, or the same that there was. Raises: InvalidRequest, NotFound, Conflict for another."""
        self._check_name(name)
        volume = Volume(
            id=VolumeId(self._new_id("vol")),
            project_id=project.id,
            name=name,
            site_id=self._site(site).id,
            path=self._checked_path(path),
            node=node,
            read_only=read_only,
            created_ns=self._clock(),
            created_by=by,
        )
        known = self._store.volume(project.id, name)
        if known is not None:
            if replace(volume, id=known.id, created_ns=known.created_ns, created_by=known.created_by) == known:
                return known
            mend = f"Delete it first: tidemill volume delete {name}. Or choose another name."
            raise Conflict("There is another volume of that name.", field="name", value=name, mend=mend)
        self._store.put_volume(volume)
        return volume

    def volume(self, project: Project, name: str) -> Volume:
        """Raises: NotFound."""
        found = self._store.volume(project.id, name)
        if found is None:
            mend = "See tidemill volume list."
            raise NotFound(f"There is no volume {name[:100]}.", field="volume", value=name[:100], mend=mend)
        return found

    def delete_volume(self, project: Project, name: str) -> Volume:
        """The volume, which has no name any more; its files stay. Raises: NotFound, Conflict while jobs use it."""
        volume = self.volume(project, name)
        users = [
            one
            for one in self._workloads()
            if one.project_id == project.id and any(mount.volume == name for mount in one.spec.volumes)
        ]
        self._check_unused(users, name)
        self._store.delete_volume(project.id, name)
        return volume

    # ------------------------------------------------------------------ data sets

    def add_folder(
        self, project: Project, name: str, path: str, *, site: str, node: str, digest: str, by: str
    ) -> DataSet:
        """A new version whose files are in a folder of a site; ``digest`` is that of its manifest, uploaded before.

        The newest version is answered when it is the same. Raises: InvalidRequest, NotFound.
        """
        self._check_name(name)
        manifest = self._read(digest)
        known = self._store.find_dataset(project.id, name)
        place, site_id = self._checked_path(path), self._site(site).id
        here = (digest, place, site_id, node)
        if known is not None and (known.digest, known.home, known.site_id, known.node) == here:
            return known
        return self._store.add_dataset(
            DataSet(
                id=DataSetId(self._new_id("set")),
                project_id=project.id,
                name=name,
                version=0,
                home=place,
                site_id=site_id,
                node=node,
                digest=digest,
                size=manifest.size,
                files=len(manifest.files),
                checked_ns=self._clock(),
                created_ns=self._clock(),
                created_by=by,
            )
        )

    def add_bucket(
        self, project: Project, name: str, url: str, *, endpoint: str, region: str, secret: str, by: str
    ) -> DataSet:
        """A new version whose files are in S3. They are read once, beside all else, before it can be used.

        Raises: InvalidRequest, NotFound for a secret that there is not.
        """
        self._check_name(name)
        check_s3(url, endpoint)
        if secret and self._store.secret(project.id, secret) is None:
            mend = f"Set it, as KEY_ID:SECRET_KEY: tidemill secret set {secret}."
            raise NotFound(f"Project {project.name} has no secret {secret}.", field="secret", value=secret, mend=mend)
        stored = self._store.add_dataset(
            DataSet(
                id=DataSetId(self._new_id("set")),
                project_id=project.id,
                name=name,
                version=0,
                home=url.rstrip("/"),
                endpoint=endpoint,
                region=region,
                secret=secret,
                state=DataSetState.SCANNING,
                created_ns=self._clock(),
                created_by=by,
            )
        )
        self._bell.set()
        return stored

    def find(self, project: Project, reference: str) -> DataSet:
        """The data set of ``name`` or ``name:version``. Raises: NotFound."""
        name, _, version = reference.partition(":")
        good = not version or (version.isascii() and version.isdigit() and len(version) <= 9)
        found = self._store.find_dataset(project.id, name, int(version or 0)) if good and "\0" not in name else None
        if found is None:
            mend = "See tidemill dataset list."
            raise NotFound(
                f"There is no data set {reference[:100]}.", field="dataset", value=reference[:100], mend=mend
            )
        return found

    def delete(self, project: Project, reference: str) -> DataSet:
        """The version that was deleted; its files stay where they are. Raises: NotFound, Conflict while jobs use it."""
        dataset = self.find(project, reference)
        users = [one for one in self._workloads() if any(it.dataset_id == dataset.id for it in one.spec.data)]
        self._check_unused(users, dataset.reference)
        gone = replace(dataset, deleted_ns=self._clock())
        self._store.put_dataset(gone)
        return gone

    def verify(self, project: Project, reference: str) -> DataSet:
        """The data set, whose home in S3 is looked at again; what came of it is in its ``detail`` when it was.

        Raises: NotFound, Conflict for a folder, which is looked at where it is.
        """
        dataset = self.find(project, reference)
        if not dataset.is_object_store:
            mend = "Run tidemill dataset verify on a machine that has the folder."
            raise Conflict("Folders are read where they are.", field="dataset", value=reference, mend=mend)
        waiting = replace(dataset, state=DataSetState.SCANNING, detail="to be read again")
        self._store.put_dataset(waiting)
        self._bell.set()
        return waiting

    def manifest_path(self, dataset: DataSet) -> Path:
        """Where its manifest is. Raises: Conflict while it is not known."""
        if not dataset.digest:
            raise _not_ready(dataset)
        return self._blobs.path(dataset.digest)

    # ------------------------------------------------------------------ for jobs

    def resolve(self, spec: WorkloadSpec, project: Project) -> WorkloadSpec:
        """The spec with its data sets pinned to versions and its volumes to places. Raises: InvalidSpec."""
        data = tuple(self._pinned(one, project) for one in spec.data)
        volumes = tuple(self._placed(one, project) for one in spec.volumes)
        spec = replace(spec, data=data, volumes=volumes)
        self._check_one_place(spec)
        return spec

    def content(self, mount: DataMount, digest: str, *, project: ProjectId, relay: bool) -> Content:
        """The octets of one file of a data set or model of a project; ``relay``: through us, also when an address
        would do.

        Raises: NotFound, Unavailable, InvalidRequest.
        """
        if mount.model:
            path = self._models.content(mount, project, digest)
            return Content(size=path.stat().st_size, path=path)
        dataset = self._store.dataset(mount.dataset_id)
        file = self._files(mount.digest).get(digest)
        if dataset is None or file is None:
            raise NotFound("The data set has no such file.", field="sha256", value=digest[:80])
        if dataset.is_object_store:
            bucket = self._bucket(dataset)
            if not relay:
                return Content(size=file.size, address=bucket.signed(file.path))
            return Content(size=file.size, pieces=lambda at: _pieces(partial(bucket.read, file.path), at, file))
        if dataset.site_id == self._home:
            try:
                return Content(size=file.size, path=Folder(Path(dataset.home)).path(file.path))
            except NotFound:
                pass  # another machine of this site may have it
        place = posixpath.join(dataset.home, file.path)

        def read(start: int, end: int) -> bytes:
            return self._elsewhere(dataset.site_id, dataset.node, place, start, end - start)

        return Content(size=file.size, pieces=lambda at: _pieces(read, at, file))

    def _pinned(self, mount: DataMount, project: Project) -> DataMount:
        if mount.model:
            return self._models.pinned(mount, project)
        name, _, version = mount.dataset.partition(":")
        dataset = self._store.find_dataset(project.id, name, int(version or 0))
        if dataset is None:
            raise InvalidSpec(
                f"Project {project.name} has no data set {mount.dataset}.",
                field="data",
                value=mount.dataset,
                mend="See tidemill dataset list, or add it: tidemill dataset add.",
            )
        if not dataset.digest:
            error = _not_ready(dataset)
            raise InvalidSpec(error.detail, field="data", value=mount.dataset, mend=error.mend)
        if dataset.is_object_store and mount.mode is DataMode.MOUNT:
            raise InvalidSpec(
                "What is in S3 cannot be mounted.", field="data", value=mount.dataset, mend="Write mode: copy."
            )
        return replace(
            mount,
            dataset=dataset.reference,
            dataset_id=dataset.id,
            digest=dataset.digest,
            size=dataset.size,
            files=dataset.files,
            home=dataset.home,
            site_id=dataset.site_id,
            node=dataset.node,
        )

    def _placed(self, mount: VolumeMount, project: Project) -> VolumeMount:
        volume = self._store.volume(project.id, mount.volume)
        if volume is None:
            raise InvalidSpec(
                f"Project {project.name} has no volume {mount.volume}.",
                field="volumes",
                value=mount.volume,
                mend="See tidemill volume list, or have one made: tidemill volume create.",
            )
        return replace(
            mount,
            read_only=mount.read_only or volume.read_only,
            path=volume.path,
            site_id=volume.site_id,
            node=volume.node,
        )

    def _check_one_place(self, spec: WorkloadSpec) -> None:
        """Raises: InvalidSpec when no machine can have all that the spec is bound to."""
        bound = [("volumes", one.volume, one.site_id, one.node) for one in spec.volumes]
        bound += [("data", one.dataset, one.site_id, one.node) for one in spec.data if one.mode is DataMode.MOUNT]
        wanted = spec.placement.where.sites
        names = {site.id: site.name for site in self._sites()}
        for index, (field, name, site, node) in enumerate(bound):
            here = names.get(site, str(site))
            if wanted and site not in wanted and here not in wanted:
                raise InvalidSpec(
                    f"{name} is at site {here}, and placement asks for {', '.join(wanted)}.",
                    field=field,
                    value=name,
                    mend=f"Add {here} to placement.sites, or leave {name} out.",
                )
            for _, other, its_site, its_node in bound[:index]:
                if site != its_site or (node and its_node and node != its_node):
                    there = names.get(its_site, str(its_site)) if site != its_site else its_node
                    raise InvalidSpec(
                        f"{name} is at {here if site != its_site else node}, {other} at {there}: no machine has both.",
                        field=field,
                        value=name,
                        mend="Leave one out; a data set with mode: copy is brought to where the job runs.",
                    )

    # ------------------------------------------------------------------ looking at homes

    def _scan_forever(self) -> None:
        while not self._closing.is_set():
            try:
                for dataset in self._store.unscanned_datasets():
                    if not self._closing.is_set():
                        self._look_at(dataset)
            except TidemillError as error:
                log.warning("data sets could not be looked at: %s", error)
            except Exception:
                log.exception("data sets could not be looked at")
            self._bell.wait(_POLL_S)
            self._bell.clear()

    def _look_at(self, dataset: DataSet) -> None:
        def told(seen: int, total: int) -> None:
            self._keep(replace(dataset, detail=f"{seen:,} of {total:,} files read"))

        try:
            files = list(scan(self._s3(dataset), told=told, stopped=self._closing.is_set))
            found = manifest_of(files)
            if not dataset.digest:
                content = found.content()
                self._blobs.put(found.digest, [content])
                after = replace(dataset, digest=found.digest, size=found.size, files=len(found.files), detail="")
            else:
                after = replace(dataset, detail=differences(self._read(dataset.digest), found))
        except (TidemillError, ValueError) as error:
            if self._closing.is_set():
                return
            log.warning("data set %s of %s cannot be read: %s", dataset.reference, dataset.project_id, error)
            after = replace(dataset, detail=getattr(error, "detail", "") or f"{error}.")
        state = DataSetState.READY if after.digest else DataSetState.FAILED
        self._keep(replace(after, state=state, checked_ns=self._clock()))

    def _keep(self, dataset: DataSet) -> None:
        """Store it, unless it was deleted meanwhile."""
        known = self._store.dataset(dataset.id)
        if known is not None and not known.deleted_ns:
            self._store.put_dataset(dataset)

    def _s3(self, dataset: DataSet) -> S3Place:
        credentials = ""
        if dataset.secret:
            sealed = self._store.secret(dataset.project_id, dataset.secret)
            if sealed is None:
                mend = f"Set it again: tidemill secret set {dataset.secret}."
                raise NotFound("The data set's secret is gone.", field="secret", value=dataset.secret, mend=mend)
            credentials = _credentials(self._vault.open(sealed), dataset.secret)
        return S3Place(url=dataset.home, endpoint=dataset.endpoint, region=dataset.region, credentials=credentials)

    def _bucket(self, dataset: DataSet) -> Bucket:
        place = self._s3(dataset)
        with self._lock:
            known = self._buckets.get(dataset.id)
            if known is None or known[0] != place:
                known = self._buckets[dataset.id] = (place, Bucket(place))
            return known[1]

    # ------------------------------------------------------------------ manifests

    def _read(self, digest: str) -> Manifest:
        try:
            with self._blobs.open(digest) as file:
                return read_manifest(file.read())
        except ValueError as error:
            raise InvalidRequest(f"That is not a manifest: {error}.", field="manifest", value=digest) from error

    def _files(self, digest: str) -> dict[str, DataFile]:
        """The files of a manifest by SHA-256; a few manifests are remembered."""
        with self._lock:
            known = self._manifests.get(digest)
            if known is not None:
                self._manifests.move_to_end(digest)
                return known
        found = {file.digest: file for file in self._read(digest).files}
        with self._lock:
            self._manifests[digest] = found
            while len(self._manifests) > _KEPT_MANIFESTS:
                self._manifests.popitem(last=False)
        return found

    # ------------------------------------------------------------------ checks

    def _site(self, name: str) -> Site:
        sites = self._sites()
        for site in sites:
            if (name or self._home) in (site.name, site.id):
                return site
        mend = f"Sites: {', '.join(site.name for site in sites)}."
        raise NotFound(f"There is no site {name[:100]}.", field="site", value=name[:100], mend=mend)

    def _checked_path(self, path: str) -> str:
        if "://" in path:
            raise InvalidRequest(
                "A volume is a folder of a site, not a bucket.", field="path", value=path[:200], mend=BUCKET_MEND
            )
        if not path.startswith("/") or posixpath.normpath(path) != path or path.startswith("//") or "\0" in path:
            raise InvalidRequest(
                "That is not a whole path.", field="path", value=path[:200], mend="Write for example /mnt/data."
            )
        place = Path(path)
        if self._own.is_relative_to(place) or place.is_relative_to(self._own):
            raise InvalidRequest(
                "That folder has Tidemill's own in it, or is one.", field="path", value=path, mend="Choose another."
            )
        return path

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            mend = "Use 1 to 63 letters, digits, - _ or ., beginning and ending with a letter or digit."
            raise InvalidRequest("That cannot be a name.", field="name", value=name[:100], mend=mend)

    @staticmethod
    def _check_unused(users: Sequence[Workload], name: str) -> None:
        if users:
            names = ", ".join(sorted({one.spec.name for one in users})[:_TELL_AT_MOST])
            raise Conflict(
                f"{len(users)} workloads use it that are not over: {names}." if len(users) > 1 else f"{names} uses it.",
                field="name",
                value=name,
                mend="Wait for them, or stop them.",
            )

    def _new_id(self, prefix: str) -> str:
        return sortable_id(prefix, now=self._clock(), entropy=secrets.randbits(40))


def differences(known: Manifest, found: Manifest) -> str:
    """What is different now, in a sentence; empty when all is as it was.

    >>> one, other = (manifest_of([DataFile("a", 1, digit * 64)]) for digit in "01")
    >>> differences(one, other)
    '1 file changed: a.'
    """
    before = {file.path: file for file in known.files}
    after = {file.path: file for file in found.files}
    kinds = (
        ("missing", [path for path in before if path not in after]),
        ("changed", [path for path in before if path in after and after[path] != before[path]]),
        ("new", [path for path in after if path not in before]),
    )
    told = []
    for what, paths in kinds:
        if paths:
            some = ", ".join(paths[:_TELL_AT_MOST]) + (", …" if len(paths) > _TELL_AT_MOST else "")
            told.append(f"{len(paths):,} file{'s' if len(paths) > 1 else ''} {what}: {some}.")
    return " ".join(told)


def _pieces(read: Callable[[int, int], bytes], at: int, file: DataFile) -> Iterator[bytes]:
    """A file from an offset on, a piece at a time. Raises: Unavailable when it is shorter than it was."""
    while at < file.size:
        piece = read(at, min(at + PIECE_BYTES, file.size))
        if not piece:
            raise Unavailable(f"{file.path} is shorter than it was.")
        at += len(piece)
        yield piece


def _credentials(value: str, name: str) -> str:
    """``KEY_ID:SECRET_KEY[:SESSION_TOKEN]`` of a secret's value, which may also be JSON with AWS's names for them."""
    text = value.strip()
    if text.startswith("{"):
        try:
            given = {str(key).lower(): str(each) for key, each in json.loads(text).items()}
            parts = [given["aws_access_key_id"], given["aws_secret_access_key"], given.get("aws_session_token", "")]
            text = ":".join(part for part in parts if part)
        except (ValueError, KeyError, AttributeError):
            text = ""
    if not all(text.split(":")[:2]) or ":" not in text:
        raise InvalidRequest(
            "The secret is not a pair of keys.", field="secret", value=name, mend="Write it as KEY_ID:SECRET_KEY."
        )
    return text


def _not_ready(dataset: DataSet) -> Conflict:
    if dataset.state is DataSetState.FAILED:
        return Conflict(
            f"{dataset.reference} could not be read: {dataset.detail}",
            field="dataset",
            value=dataset.reference,
            mend="Mend that, and have it read again: tidemill dataset verify.",
        )
    detail = f" ({dataset.detail})" if dataset.detail else ""
    return Conflict(
        f"{dataset.reference} is being read for the first time{detail}.",
        field="dataset",
        value=dataset.reference,
        mend="Wait for it: tidemill dataset show.",
    )
