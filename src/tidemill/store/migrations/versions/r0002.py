"""The quota tree, reservations, sites, volumes, data sets, models; limits of projects become queues of theirs."""

from __future__ import annotations

import json
import re
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
LONG = sa.BigInteger()

NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Names that a queue can have."""


def upgrade() -> None:
    """Make the tables, and move the limits."""
    queues = op.create_table(
        "queues",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_table(
        "queue_usage",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_table(
        "reservations",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("cancelled_ns", LONG, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )

    for name in ("sites", "outposts"):
        op.create_table(
            name,
            sa.Column("id", TEXT, primary_key=True, nullable=False),
            sa.Column("body", TEXT, nullable=False),
        )
    # Control planes that share the database.
    op.create_table(
        "replicas",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("api_url", TEXT, nullable=False),
        sa.Column("beats", LONG, nullable=False),
        sa.Column("seen_ms", LONG, nullable=False),
    )
    # Where work finds its files.
    op.create_table(
        "volumes",
        sa.Column("project_id", TEXT, primary_key=True, nullable=False),
        sa.Column("name", TEXT, primary_key=True, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_table(
        "datasets",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.UniqueConstraint("project_id", "name", "version", name="uq_datasets_version"),
    )
    op.create_index("ix_datasets_state", "datasets", ["state"])
    # How services are brought to another revision.
    op.create_table(
        "rollouts",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("first_id", TEXT, nullable=False),
        sa.Column("workload_id", TEXT, nullable=False, unique=True),
        sa.Column("ended_ns", LONG, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_rollouts_first", "rollouts", ["first_id"])
    op.create_index("ix_rollouts_ended", "rollouts", ["ended_ns"])
    # What services usually need.
    op.create_table(
        "habits",
        sa.Column("project_id", TEXT, primary_key=True, nullable=False),
        sa.Column("service", TEXT, primary_key=True, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    # Models, and their versions.
    op.create_table(
        "models",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.UniqueConstraint("project_id", "name", name="uq_models_name"),
    )
    op.create_table(
        "model_versions",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("model_id", TEXT, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("number", LONG, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("deleted_ns", LONG, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.UniqueConstraint("model_id", "number", name="uq_model_versions_number"),
    )
    op.create_index("ix_model_versions_project", "model_versions", ["project_id", "digest"])
    op.create_index("ix_model_versions_job", "model_versions", ["job_id"])
    # What was rented from clouds.
    op.create_table(
        "rentals",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("ended_ns", LONG, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_rentals_ended", "rentals", ["ended_ns"])
    # What requests to models took.
    op.create_table(
        "token_usages",
        sa.Column("line", LONG.with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("id", TEXT, nullable=False, unique=True),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("token_id", TEXT, nullable=False),
        sa.Column("model", TEXT, nullable=False),
        sa.Column("prompt_tokens", LONG, nullable=False),
        sa.Column("completion_tokens", LONG, nullable=False),
        sa.Column("estimated", LONG, nullable=False),
        sa.Column("at_ns", LONG, nullable=False),
        sa.Column("user_name", TEXT, nullable=False),
        sa.Column("label", TEXT, nullable=False),
        sa.Column("amount_pico", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_token_usages_project", "token_usages", ["project_id", "line"])
    op.create_index("ix_token_usages_job", "token_usages", ["job_id", "line"])
    op.create_index("ix_token_usages_since", "token_usages", ["project_id", "at_ns"])
    op.create_index("ix_token_usages_key", "token_usages", ["token_id", "at_ns"])

    # What guardrails decided.
    op.create_table(
        "guard_decisions",
        sa.Column("line", LONG.with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("id", TEXT, nullable=False, unique=True),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("at_ns", LONG, nullable=False),
        sa.Column("model", TEXT, nullable=False),
        sa.Column("rule", TEXT, nullable=False),
        sa.Column("action", TEXT, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_guard_decisions_project", "guard_decisions", ["project_id", "line"])

    projects = sa.table("projects", sa.column("id", TEXT), sa.column("body", TEXT))
    connection = op.get_bind()
    moved = []
    for project_id, body in connection.execute(sa.select(projects.c.id, projects.c.body)).all():
        project: dict[str, Any] = json.loads(body)
        limit = [[name, project.get(f"limit_{name}_milli", 0)] for name in ("cpu", "gpu")]
        if limit := [one for one in limit if one[1]]:
            moved.append(_queue(project_id, project.get("name", ""), limit))
            project |= {"limit_cpu_milli": 0, "limit_gpu_milli": 0}
            written = json.dumps(project, ensure_ascii=False, separators=(",", ":"))
            connection.execute(sa.update(projects).where(projects.c.id == project_id).values(body=written))
    if moved:
        op.bulk_insert(queues, moved)


def _queue(project_id: str, name: str, limit: list[list[Any]]) -> dict[str, Any]:
    """The row of a project's own queue, directly under the root, as version 0002 writes it."""
    own = project_id.partition("_")[2] or project_id
    queue_id = f"que_{own}"
    plain = re.sub(r"[^A-Za-z0-9]+", "-", own).strip("-")[:63].strip("-") or "project"
    queue = {
        "id": queue_id,
        "name": name if NAME.fullmatch(name) else plain,
        "version": 1,
        "parent_id": "",
        "project_id": project_id,
        "weight_milli": 1_000,
        "guaranteed": [],
        "limit": limit,
        "max_running": 0,
        "max_queued": 0,
    }
    written = json.dumps(queue, ensure_ascii=False, separators=(",", ":"))
    return {"id": queue_id, "version": 1, "body": written}
