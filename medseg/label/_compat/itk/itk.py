"""Stands for itk, which MONAI Label imports at its start for a writer that medseg does not use.

The package is 110 MB, and where it is installed every import of MONAI takes longer.
"""

from __future__ import annotations

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(f"itk.{name}: itk is not installed; pip install itk")
