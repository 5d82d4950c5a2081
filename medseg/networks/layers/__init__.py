"""Blocks that several architectures share, one subject per file."""
