"""idempotency keys of all that is made by a POST

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "used_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("noun", sa.String(), nullable=False),
        sa.Column("caller", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("mark", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    # those of uploads were rows among the files: key-… is file-… now
    op.execute(
        "INSERT INTO used_keys (id, noun, caller, subject, mark, digest, created_ms) "
        "SELECT 'file-' || substr(id, 5), 'file', caller, filename, filename, purpose, created_ms "
        "FROM files WHERE kind = 'key'"
    )
    op.execute("DELETE FROM files WHERE kind = 'key'")


def downgrade() -> None:
    op.execute(
        "INSERT INTO files (id, caller, kind, status, filename, purpose, bytes, created_ms) "
        "SELECT 'key-' || substr(id, 6), caller, 'key', 'key', subject, digest, 0, created_ms "
        "FROM used_keys WHERE noun = 'file'"
    )
    op.drop_table("used_keys")
