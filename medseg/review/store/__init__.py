"""What the review app remembers: one database, SQLite by default, PostgreSQL by URL."""
