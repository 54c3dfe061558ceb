"""Alembic's migrations, shipped inside the wheel."""
