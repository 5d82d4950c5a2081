"""MONAI bundles: finding, checking, loading and packing them without running their code."""
