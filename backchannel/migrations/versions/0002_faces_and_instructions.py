"""faces and instructions

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Plain ADD COLUMN: a batch copies the table on SQLite, and dropping the old one would delete,
    # by ON DELETE CASCADE, the rows of every table that refers to it.
    op.add_column("jobs", sa.Column("kind", sa.String(), nullable=False, server_default="job"))
    op.add_column("job_requests", sa.Column("instructions", sa.String(), nullable=True))
    op.add_column("job_requests", sa.Column("asked", sa.JSON(), nullable=True))
    op.add_column("sessions", sa.Column("system", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("sessions", "system")
    op.drop_column("job_requests", "asked")
    op.drop_column("job_requests", "instructions")
    op.drop_column("jobs", "kind")
