"""What is measured: a bundle with its weights, an architecture with random ones, or `quant`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from medseg.bundles.spec import BundleSpec, ScaleIntensityRange, SliceSpec
from medseg.errors import UsageError

if TYPE_CHECKING:
    from medseg.bundles.load import Bundle

QUANT = "quant"
_SPACING = (1.5, 1.5, 1.5)
_WINDOW = ScaleIntensityRange(-160.0, 240.0)


class Subject(BaseModel):
    """A bundle as a measured process loads it.

    Attributes:
        bundle: name or folder; empty for `quant`.
        quant_classes: classes of `quant`.
        quant_roi_size: window of `quant` in voxels.
        overlap: share that neighbouring windows have in common; None takes the bundle's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str = ""
    quant_classes: int = 0
    quant_roi_size: tuple[int, int, int] = (96, 96, 96)
    overlap: float | None = None

    def load(self) -> Bundle:
        """The bundle.

        Raises:
            BundleError: as `load_bundle`.
        """
        if self.bundle:
            from medseg.bundles.load import load_bundle

            found = load_bundle(self.bundle)
        else:
            from medseg.benchmark.quant import quant_bundle

            found = quant_bundle(self.quant_classes, self.quant_roi_size)
        if self.overlap is None:
            return found
        return replace(found, spec=replace(found.spec, overlap=self.overlap))


def ct_spec(network: str, arguments: Mapping[str, Any], *, classes: int, roi_size: tuple[int, int, int]) -> BundleSpec:
    """Settings as bundles for CT have them: 1.5 mm voxels, -160 to 240 HU mapped to 0 to 1, windows half overlap."""
    return BundleSpec(
        network=network,
        network_args=arguments,
        channels=("CT",),
        labels={value: "background" if value == 0 else f"class {value}" for value in range(classes)},
        roi_size=roi_size,
        spacing=_SPACING,
        intensity=(_WINDOW,),
        slices=SliceSpec(roi_size.index(1)) if 1 in roi_size else None,
    )


def random_bundle(
    root: Path, architecture: str, arguments: Mapping[str, Any], *, classes: int, roi_size: tuple[int, int, int]
) -> Path:
    """Write a bundle with random weights, the same ones each time, so that every pipeline loads the same.

    Args:
        root: the bundle's folder, made here.
        architecture: a name of `medseg networks list`.
        arguments: of its constructor; channels and classes are filled in.
        classes: background included.
        roi_size: window in voxels; 1 along an axis for a 2D network.

    Raises:
        UsageError: arguments or a window that the architecture does not take.
    """
    import torch
    from safetensors.torch import save_model

    from medseg.bundles.integrity import write_manifest
    from medseg.bundles.write import write_configs
    from medseg.networks.fit import fit
    from medseg.networks.registry import create, network_class

    size = tuple(n for n in roi_size if n > 1)
    try:
        network_class(architecture)
    except ValueError as err:
        raise UsageError("--architecture", str(err), f"or {QUANT}") from err
    try:
        fitted = fit(architecture, size, in_channels=1, out_channels=classes, given=arguments)
        torch.manual_seed(0)
        network = create(architecture, **fitted.arguments)
    except ValueError as err:
        raise UsageError("--network", str(err), f"see medseg networks show {architecture}") from err
    if tuple(fitted.size) != size:
        taken = "x".join(map(str, fitted.size))
        raise UsageError("--roi", f"{architecture} does not take {'x'.join(map(str, size))}", f"{taken} is near")
    spec = ct_spec(architecture, fitted.arguments, classes=classes, roi_size=roi_size)
    described = {"name": root.name, "task": "Benchmark", "description": f"{architecture} with random weights"}
    write_configs(root, spec, described, {})
    (root / "models").mkdir()
    save_model(network, str(root / "models" / "model.safetensors"))
    write_manifest(root)
    return root
