"""Runs migrations inside the transaction of the connection that the store hands over."""

from alembic import context

from treadle_store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
