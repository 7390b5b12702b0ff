"""What jobs leave behind: their output folders, and artifacts made of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

from tidemill.control.blobs import BlobStore
from tidemill.control.sites import Sites
from tidemill.control.turns import TurnLoop
from tidemill.errors import InvalidRequest, NotFound
from tidemill.model.artifact import Artifact
from tidemill.model.ids import ArtifactId, sortable_id
from tidemill.model.job import Job
from tidemill.model.tenant import Project
from tidemill.ports import Store


class Outputs:
    """Finds what jobs wrote, where it is seen from here. Thread-safe.

    ``root`` is the folder of all outputs; ``is_shared`` says whether the machines see it too.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        turns: TurnLoop,
        sites: Sites,
        *,
        root: Path,
        is_shared: bool,
        clock: Callable[[], int],
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._turns = turns
        self._sites = sites
        self._root = root
        self._is_shared = is_shared
        self._clock = clock

    def folder(self, job: Job) -> Path:
        """Where a job's output folder is on this machine."""
        return self._root / job.project_id / job.id / "output"

    def create_artifact(self, project: Project, name: str, job: Job, path: str) -> Artifact:
        """A new version of the artifact, packed from ``path`` in the job's output folder.

        Raises: NotFound when there is nothing there, InvalidRequest when the path leaves the folder.
        """
        root = self.folder(job).resolve()
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise InvalidRequest("The path leaves the job's output folder.", field="path", value=path)
        if not folder.exists():
            raise NotFound("The job's output folder has nothing there.", field="path", value=path, mend=self.where(job))
        digest, size = self._blobs.pack(folder)
        now = self._clock()
        return self._store.put_artifact(
            Artifact(
                id=ArtifactId(sortable_id("art", now=now, entropy=secrets.randbits(40))),
                project_id=project.id,
                name=name,
                version=0,
                digest=digest,
                size=size,
                created_ns=now,
                job_id=job.id,
            )
        )

    def where(self, job: Job) -> str:
        """What to do when an output is not found here: it may be on the machine on which the job ran."""
        ran_on = {worker.node_id for worker in self._store.allocations(job.id)}
        nodes = self._turns.world.nodes
        names = sorted(nodes[one].name for one in ran_on if one in nodes and self._sites.is_leased(one))
        if names and not self._is_shared:
            shared = "Have machines share a folder for outputs: the setting volumes, and tidemill join --volumes."
            return f"It ran on {', '.join(names)}, whose folders are not seen from here. {shared}"
        return "Write to $TIDEMILL_OUTPUT_DIR in the job; see tidemill cp JOB:. for what it has."
