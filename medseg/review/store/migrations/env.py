"""Alembic's environment: always on the connection that it is given, never by a file of settings."""

from __future__ import annotations

from alembic import context

from medseg.review.store.models import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, transactional_ddl=True
)
context.run_migrations()
