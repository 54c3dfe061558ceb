"""Alembic's entry: runs the migrations on the connection that `backchannel.db.migrate` opened."""

from alembic import context
from sqlmodel import SQLModel

import backchannel.tables  # noqa: F401  registers the tables

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=SQLModel.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
