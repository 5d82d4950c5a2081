"""What a bundle costs: parameters and multiply-accumulates of a window, and how many windows a scan takes."""

from __future__ import annotations

from collections.abc import Sequence

from medseg.bundles.spec import BundleSpec
from medseg.inference.slice_inferer import SliceInferer
from medseg.inference.sliding_window import window_count
from medseg.networks.cost import Cost, measure_cost


def window_cost(spec: BundleSpec) -> Cost:
    """Parameters of a bundle's network, and billions of multiply-accumulates for one window."""
    return measure_cost(spec.network, spec.network_args, (1, spec.network_channels, *spec.network_size))


def windows_of(spec: BundleSpec, shape: Sequence[int]) -> int:
    """How many windows (slices, for a 2D network) cover an image of this shape on the model grid."""
    if spec.slices is not None:
        return SliceInferer.of(spec).window_count(tuple(shape))
    return window_count(shape, spec.roi_size, spec.overlap, spec.tiling)
