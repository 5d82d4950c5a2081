"""Synthetic patients with known truth. Synthetic data, not for clinical use."""

SYNTHETIC = "synthetic, not for clinical use"
"""Stands in every file that is made here."""
