"""Everything, from nothing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
LONG = sa.BigInteger()
ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table of the first version."""
    leadership = op.create_table(
        "leadership",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", LONG, nullable=False),
        sa.Column("holder", TEXT, nullable=False),
        sa.Column("commits", LONG, nullable=False),
        sa.Column("last_seq", LONG, nullable=False),
    )
    op.bulk_insert(leadership, [{"id": 1, "epoch": 0, "holder": "", "commits": 0, "last_seq": 0}])

    op.create_table(
        "workloads",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("kind", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("submitted_ns", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_workloads_newest", "workloads", ["submitted_ns", "id"], unique=True)
    op.create_index("ix_workloads_project", "workloads", ["project_id", "submitted_ns", "id"], unique=True)
    op.create_index("ix_workloads_name", "workloads", ["name", "submitted_ns", "id"], unique=True)

    op.create_table(
        "jobs",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("workload_id", TEXT, nullable=False),
        sa.Column("position", LONG, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("reason", TEXT),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_jobs_workload", "jobs", ["workload_id", "position", "id"], unique=True)
    op.create_index("ix_jobs_state", "jobs", ["state"])

    op.create_table(
        "attempts",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("number", LONG, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_attempts_job", "attempts", ["job_id", "number"])
    op.create_index("ix_attempts_state", "attempts", ["state"])

    op.create_table(
        "allocations",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("attempt_id", TEXT, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("fence", LONG, nullable=False),
        sa.Column("rank", LONG, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_allocations_job", "allocations", ["job_id", "fence", "rank"])
    op.create_index("ix_allocations_state", "allocations", ["state"])

    op.create_table(
        "nodes",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )

    op.create_table(
        "events",
        sa.Column("seq", ROW_NUMBER, primary_key=True, autoincrement=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("workload_id", TEXT, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_events_project", "events", ["project_id", "seq"])
    op.create_index("ix_events_workload", "events", ["workload_id", "seq"])
    op.create_index("ix_events_job", "events", ["job_id", "seq"])

    op.create_table(
        "ledger",
        sa.Column("line", ROW_NUMBER, primary_key=True),
        sa.Column("id", TEXT, nullable=False, unique=True),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("job_id", TEXT, nullable=False),
        sa.Column("launch_id", TEXT, nullable=False),
        sa.Column("resource", TEXT, nullable=False),
        sa.Column("to_ns", LONG, nullable=False),
        sa.Column("held_high", LONG, nullable=False),
        sa.Column("held_low", LONG, nullable=False),
        sa.Column("amount_micro", LONG, nullable=False),
        sa.Column("energy_mj", LONG, nullable=False),
        sa.Column("carbon_mg", LONG, nullable=False),
        sa.Column("evidence", TEXT, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_index("ix_ledger_project", "ledger", ["project_id", "line"])
    op.create_index("ix_ledger_job", "ledger", ["job_id", "line"])

    op.create_table(
        "meter_marks",
        sa.Column("node_id", TEXT, primary_key=True, nullable=False),
        sa.Column("meter", TEXT, primary_key=True, nullable=False),
        sa.Column("until_ns", LONG, nullable=False),
    )
    op.create_table(
        "idempotency",
        sa.Column("principal_id", TEXT, primary_key=True, nullable=False),
        sa.Column("key", TEXT, primary_key=True, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    for name in ("organizations", "projects", "principals", "tokens"):
        op.create_table(
            name,
            sa.Column("id", TEXT, primary_key=True, nullable=False),
            sa.Column("body", TEXT, nullable=False),
        )
    op.create_table(
        "secrets",
        sa.Column("project_id", TEXT, primary_key=True, nullable=False),
        sa.Column("name", TEXT, primary_key=True, nullable=False),
        sa.Column("body", TEXT, nullable=False),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", TEXT, primary_key=True, nullable=False),
        sa.Column("project_id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("version", LONG, nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.UniqueConstraint("project_id", "name", "version", name="uq_artifacts_version"),
    )
