"""The tables: narrow columns for what is searched, guarded or summed, and the whole value as JSON in ``body``.

This is what the newest migration leads to; a test compares the two. Text compares by code point in every
database, so that lists have one order everywhere.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, Table, Text, UniqueConstraint

HEAD: Final = "0003"
"""The newest migration."""

TEXT: Final = Text().with_variant(Text(collation="C"), "postgresql")
LONG: Final = BigInteger()
ROW_NUMBER: Final = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite counts rows itself only in a column of exactly this type."""

metadata = MetaData()


def _text(name: str, **options: Any) -> Column[str]:
    return Column(name, TEXT, nullable=False, **options)


def _long(name: str, **options: Any) -> Column[int]:
    return Column(name, LONG, nullable=False, **options)


leadership = Table(
    "leadership",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    _long("epoch"),
    _text("holder"),
    _long("commits"),
    _long("last_seq"),
)
"""One row, which every commit changes first: so commits are one after the other, under one leader, and events
are numbered without gaps."""

replicas = Table(
    "replicas", metadata, _text("id", primary_key=True), _text("api_url"), _long("beats"), _long("seen_ms")
)
"""Control planes that share this database; ``seen_ms`` is by the database's clock."""

workloads = Table(
    "workloads",
    metadata,
    _text("id", primary_key=True),
    _text("project_id"),
    _text("kind"),
    _text("name"),
    _long("submitted_ns"),
    _text("body"),
    Index("ix_workloads_newest", "submitted_ns", "id", unique=True),
    Index("ix_workloads_project", "project_id", "submitted_ns", "id", unique=True),
    Index("ix_workloads_name", "name", "submitted_ns", "id", unique=True),
)
"""The indexes are unique, as ``id`` is, so that the database knows that they put jobs in order."""

jobs = Table(
    "jobs",
    metadata,
    _text("id", primary_key=True),
    _text("workload_id"),
    _long("position"),
    _text("state"),
    _long("version"),
    Column("reason", TEXT),
    _text("body"),
    Index("ix_jobs_workload", "workload_id", "position", "id", unique=True),
    Index("ix_jobs_state", "state"),
)
"""``reason`` is why a queued job waits; it goes when the job is not queued any more."""

attempts = Table(
    "attempts",
    metadata,
    _text("id", primary_key=True),
    _text("job_id"),
    _long("number"),
    _text("state"),
    _long("version"),
    _text("body"),
    Index("ix_attempts_job", "job_id", "number"),
    Index("ix_attempts_state", "state"),
)
allocations = Table(
    "allocations",
    metadata,
    _text("id", primary_key=True),
    _text("attempt_id"),
    _text("job_id"),
    _long("fence"),
    _long("rank"),
    _text("state"),
    _long("version"),
    _text("body"),
    Index("ix_allocations_job", "job_id", "fence", "rank"),
    Index("ix_allocations_state", "state"),
)
nodes = Table(
    "nodes",
    metadata,
    _text("id", primary_key=True),
    _text("name"),
    _long("version"),
    _text("body"),
)
queues = Table("queues", metadata, _text("id", primary_key=True), _long("version"), _text("body"))
queue_usage = Table("queue_usage", metadata, _text("id", primary_key=True), _long("version"), _text("body"))
delivery_marks = Table("delivery_marks", metadata, _text("id", primary_key=True), _long("version"), _text("body"))
reservations = Table(
    "reservations",
    metadata,
    _text("id", primary_key=True),
    _long("cancelled_ns"),
    _long("version"),
    _text("body"),
)
rentals = Table(
    "rentals",
    metadata,
    _text("id", primary_key=True),
    _text("state"),
    _long("ended_ns"),
    _long("version"),
    _text("body"),
    Index("ix_rentals_ended", "ended_ns"),
)
"""``ended_ns`` is zero until the cloud confirms that there is nothing more."""

rollouts = Table(
    "rollouts",
    metadata,
    _text("id", primary_key=True),
    _text("first_id"),
    _text("workload_id", unique=True),
    _long("ended_ns"),
    _long("version"),
    _text("body"),
    Index("ix_rollouts_first", "first_id"),
    Index("ix_rollouts_ended", "ended_ns"),
)
"""``first_id`` is the first revision of the service; ``ended_ns`` is zero while replicas are exchanged."""

events = Table(
    "events",
    metadata,
    Column("seq", ROW_NUMBER, primary_key=True, autoincrement=False),
    _text("project_id"),
    _text("workload_id"),
    _text("job_id"),
    _text("body"),
    Index("ix_events_project", "project_id", "seq"),
    Index("ix_events_workload", "workload_id", "seq"),
    Index("ix_events_job", "job_id", "seq"),
)
ledger = Table(
    "ledger",
    metadata,
    Column("line", ROW_NUMBER, primary_key=True),
    _text("id", unique=True),
    _text("project_id"),
    _text("job_id"),
    _text("launch_id"),
    _text("resource"),
    _long("to_ns"),
    _long("held_high"),
    _long("held_low"),
    _long("amount_micro"),
    _long("energy_mj"),
    _long("carbon_mg"),
    _text("evidence"),
    _text("body"),
    Index("ix_ledger_project", "project_id", "line"),
    Index("ix_ledger_job", "job_id", "line"),
)
"""``held_high`` and ``held_low`` are milli-units x ns, which a day of a large node brings past 63 bits: the
number over 2**32, and the rest."""

token_usages = Table(
    "token_usages",
    metadata,
    Column("line", ROW_NUMBER, primary_key=True),
    _text("id", unique=True),
    _text("project_id"),
    _text("job_id"),
    _text("token_id"),
    _text("model"),
    _long("prompt_tokens"),
    _long("completion_tokens"),
    _long("estimated"),
    _long("at_ns"),
    _text("user_name"),
    _text("label"),
    _long("amount_pico"),
    _text("body"),
    Index("ix_token_usages_project", "project_id", "line"),
    Index("ix_token_usages_job", "job_id", "line"),
    Index("ix_token_usages_since", "project_id", "at_ns"),
    Index("ix_token_usages_key", "token_id", "at_ns"),
)
"""A request to a model in each row."""

guard_decisions = Table(
    "guard_decisions",
    metadata,
    Column("line", ROW_NUMBER, primary_key=True),
    _text("id", unique=True),
    _text("project_id"),
    _long("at_ns"),
    _text("model"),
    _text("rule"),
    _text("action"),
    _text("body"),
    Index("ix_guard_decisions_project", "project_id", "line"),
)
"""What guardrails decided, a row for each rule and request; only added to."""

meter_marks = Table(
    "meter_marks",
    metadata,
    _text("node_id", primary_key=True),
    _text("meter", primary_key=True),
    _long("until_ns"),
)
idempotency = Table(
    "idempotency",
    metadata,
    _text("principal_id", primary_key=True),
    _text("key", primary_key=True),
    _text("body"),
)
organizations = Table("organizations", metadata, _text("id", primary_key=True), _text("body"))
projects = Table("projects", metadata, _text("id", primary_key=True), _text("body"))
principals = Table("principals", metadata, _text("id", primary_key=True), _text("body"))
tokens = Table("tokens", metadata, _text("id", primary_key=True), _text("body"))
sites = Table("sites", metadata, _text("id", primary_key=True), _text("body"))
outposts = Table("outposts", metadata, _text("id", primary_key=True), _text("body"))
volumes = Table(
    "volumes",
    metadata,
    _text("project_id", primary_key=True),
    _text("name", primary_key=True),
    _text("body"),
)
habits = Table(
    "habits",
    metadata,
    _text("project_id", primary_key=True),
    _text("service", primary_key=True),
    _text("body"),
)
datasets = Table(
    "datasets",
    metadata,
    _text("id", primary_key=True),
    _text("project_id"),
    _text("name"),
    _long("version"),
    _text("state"),
    _text("body"),
    UniqueConstraint("project_id", "name", "version", name="uq_datasets_version"),
    Index("ix_datasets_state", "state"),
)
"""A version that was deleted keeps its row, so that its number is not given again; its ``state`` is ``deleted``."""

secrets = Table(
    "secrets",
    metadata,
    _text("project_id", primary_key=True),
    _text("name", primary_key=True),
    _text("body"),
)
artifacts = Table(
    "artifacts",
    metadata,
    _text("id", primary_key=True),
    _text("project_id"),
    _text("name"),
    _long("version"),
    _text("body"),
    UniqueConstraint("project_id", "name", "version", name="uq_artifacts_version"),
)
models = Table(
    "models",
    metadata,
    _text("id", primary_key=True),
    _text("project_id"),
    _text("name"),
    _long("version"),
    _text("body"),
    UniqueConstraint("project_id", "name", name="uq_models_name"),
)
model_versions = Table(
    "model_versions",
    metadata,
    _text("id", primary_key=True),
    _text("model_id"),
    _text("project_id"),
    _long("number"),
    _text("job_id"),
    _text("digest"),
    _long("deleted_ns"),
    _long("version"),
    _text("body"),
    UniqueConstraint("model_id", "number", name="uq_model_versions_number"),
    Index("ix_model_versions_project", "project_id", "digest"),
    Index("ix_model_versions_job", "job_id"),
)
"""``job_id`` is the job that made it, empty when none is known. One that was deleted keeps its row, and its number."""
