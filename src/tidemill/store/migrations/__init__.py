"""Migrations of the database's schema, carried out by ``SqlStore.migrate``. Released ones are never edited."""
