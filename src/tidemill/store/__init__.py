"""Durable state: ``SqlStore`` over SQLite and PostgreSQL, ``MemoryStore`` with the same behaviour. Rows stay here."""
