"""limits of providers

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Plain ADD COLUMN, for the reason that stands in 0002.
    op.add_column("providers", sa.Column("limits", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    op.drop_column("providers", "limits")
