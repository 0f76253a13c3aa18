"""Who holds a node and until when, who accepted a machine by command and when."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add them; nobody has held or accepted anything so far."""
    op.add_column("machines", _text("accepted_by"))
    op.add_column("machines", _number("accepted_at"))
    op.add_column("nodes", _text("held_by"))
    op.add_column("nodes", _number("hold_until"))


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.String(length=255), server_default="", nullable=False)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)
