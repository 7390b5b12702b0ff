"""The projects of an installation, in memory, and who sees which."""

from __future__ import annotations

from collections.abc import Mapping

from tidemill.control.identity import Identity
from tidemill.errors import NotFound
from tidemill.model.ids import ProjectId
from tidemill.model.tenant import Project
from tidemill.ports import Store


class Projects:
    """All projects. Thread-safe: who reads sees all of a project's change or none of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._projects: dict[ProjectId, Project] = {project.id: project for project in store.projects()}
        self.version = 1
        """Another number whenever a project is added or changed."""

    @property
    def by_id(self) -> Mapping[ProjectId, Project]:
        """All projects by their ids, for reading only."""
        return self._projects

    def all(self) -> tuple[Project, ...]:
        """All projects, of every organization."""
        return tuple(self._projects.values())

    def add(self, project: Project) -> None:
        """Nothing; the project, new or in place of the one of that id, is stored and known from now on."""
        self._store.put_project(project)
        self._projects = {**self._projects, project.id: project}
        self.version += 1

    def of(self, identity: Identity) -> tuple[Project, ...]:
        """The projects that the identity may see."""
        return tuple(
            project
            for project in self._projects.values()
            if project.organization_id == identity.organization_id and identity.may_see(project.id)
        )

    def find(self, identity: Identity, name: str = "") -> Project:
        """The project of that name or id that the identity may see; without a name its only one, or ``default``.

        Raises: NotFound.
        """
        visible = self.of(identity)
        wanted = name or (visible[0].name if len(visible) == 1 else "default")
        for project in visible:
            if wanted in (project.name, project.id):
                return project
        names = ", ".join(sorted(project.name for project in visible)) or "none"
        raise NotFound(f"There is no project {wanted}.", field="project", value=wanted, mend=f"Projects: {names}.")
