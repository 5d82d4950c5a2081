"""Pictures and tables of a result."""
