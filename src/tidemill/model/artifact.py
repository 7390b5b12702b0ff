"""Artifacts: named, versioned, content-addressed outputs such as a trained model."""

from __future__ import annotations

from dataclasses import dataclass

from tidemill.model.ids import ArtifactId, JobId, ProjectId


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One version of a named artifact of a project.

    ``digest`` is the SHA-256 of its stored archive (gzip-compressed tar), ``size`` that archive's bytes.
    ``job_id`` is the job that made it, empty when it was uploaded.
    """

    id: ArtifactId
    project_id: ProjectId
    name: str
    version: int
    digest: str
    size: int
    created_ns: int
    job_id: JobId = JobId("")
    metadata: tuple[tuple[str, str], ...] = ()
