"""Run by Alembic: takes the connection, in whose transaction all happens, from whoever asked for the migration."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
