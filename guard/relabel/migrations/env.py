"""Alembic runs this for every command; the connection and its transaction come from `guard.relabel.migrating`."""

from alembic import context

from guard.relabel.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
