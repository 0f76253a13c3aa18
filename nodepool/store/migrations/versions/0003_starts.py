"""How nodes were started, and what is known about starting each build."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"

_JSON = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    """Nothing is known about the builds that there are."""
    op.add_column("nodes", sa.Column("started_by", sa.String(length=20), server_default="", nullable=False))
    op.add_column("builds", sa.Column("starts", _JSON, server_default="{}", nullable=False))
