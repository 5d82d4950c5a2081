"""Which bundles diagnose patients beside the segmentation, as their configuration says: no network is loaded for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medseg.bundles.spec import BundleSpec

_NETWORK = "mdpformer"


def patient_classes(spec: BundleSpec, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The classes of patients that a bundle tells apart, code to name, the one without a lesion first.

    Empty for a bundle that segments only.

    Args:
        spec: of the bundle.
        metadata: its metadata.json.
    """
    described = metadata.get("diagnosis")
    classes = described.get("classes") if isinstance(described, dict) else None
    wanted = spec.network_args.get("patient_classes")
    if spec.network != _NETWORK or not isinstance(classes, dict) or len(classes) != wanted:
        return {}
    return {str(code): str(name) for code, name in classes.items()}
