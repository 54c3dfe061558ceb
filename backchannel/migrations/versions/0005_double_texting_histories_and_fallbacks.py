"""double-texting, histories and fallbacks

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # plain ADD COLUMN, for the reason that stands in 0002
    op.add_column("jobs", sa.Column("fallbacks", sa.JSON(), nullable=True))
    op.add_column("jobs", sa.Column("fallback_from", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("interrupted_by", sa.String(), nullable=True))
    op.add_column("jobs", sa.Column("turns_dropped", sa.Integer(), nullable=True))
    op.add_column("usage", sa.Column("model_reason", sa.String(), nullable=True))
    op.add_column(
        "sessions",
        sa.Column("double_texting", sa.String(), nullable=False, server_default="enqueue"),
    )
    op.add_column("sessions", sa.Column("history", sa.JSON(), nullable=True))
    op.add_column("sessions", sa.Column("model_rule", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("sessions", "model_rule")
    op.drop_column("sessions", "history")
    op.drop_column("sessions", "double_texting")
    op.drop_column("usage", "model_reason")
    op.drop_column("jobs", "turns_dropped")
    op.drop_column("jobs", "interrupted_by")
    op.drop_column("jobs", "fallback_from")
    op.drop_column("jobs", "fallbacks")
