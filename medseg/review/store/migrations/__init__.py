"""Alembic's folder: `env.py` runs the files in `versions/` in the transaction of `engine.open_database`."""
