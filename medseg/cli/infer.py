"""``medseg infer``."""

def infer() -> None:
    """Segment one scan onto its own grid."""
