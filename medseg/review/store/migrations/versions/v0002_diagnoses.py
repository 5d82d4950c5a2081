"""Predictions of bundles that diagnose: the evidence map, and the phases as the network saw them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add two columns; predictions that are there already have neither."""
    op.add_column("predictions", sa.Column("evidence_path", sa.Text(), nullable=False, server_default=""))
    op.add_column("predictions", sa.Column("phase_paths", sa.JSON(), nullable=False, server_default="{}"))
