"""What the YAML said about a machine, as a digest."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add it; the planner fills it in."""
    op.add_column("machines", sa.Column("declared", sa.String(length=20), server_default="", nullable=False))
