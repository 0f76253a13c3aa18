"""Migrations by alembic, run when the daemon opens its database."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Engine, inspect, text

from nodepool.store.tables import metadata

HEAD = "0004"  # the newest migration in versions/; a test says when this is forgotten
_VERSION = "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"


def upgrade(engine: Engine) -> None:
    """Bring the tables of `engine` up to date.

    An empty database is given today's tables at once, which a test holds to be what all migrations together give; one
    that is up to date is left alone.  Neither pays for loading alembic.
    """
    found = inspect(engine)
    if not found.get_table_names():
        with engine.begin() as connection:
            metadata.create_all(connection)
            connection.execute(text(_VERSION))
            connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})
        return
    with engine.connect() as connection:
        known = found.has_table("alembic_version")
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if known else None
    if version != HEAD:
        migrate(engine)


def migrate(engine: Engine) -> None:
    """Run every migration that `engine` has not had."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["engine"] = engine
    command.upgrade(config, "head")
