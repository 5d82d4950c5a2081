"""``medseg evaluate``."""

def evaluate() -> None:
    """Placeholder."""
