"""Small bundles, scans and data sets that tests build for themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import nn

from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import Bundle
from medseg.bundles.spec import BundleSpec, NormalizeIntensity, Suitability
from medseg.bundles.write import write_configs
from medseg.networks.registry import create

SHARED = Path(__file__).parents[2] / "shared"
HIPPOCAMPUS = SHARED / "data" / "hippocampus"
SAMPLES = Path(__file__).parents[1] / "data" / "samples"


def tiny_spec(**changes: Any) -> BundleSpec:
    """Swin UNETR of the smallest size, three labels, 1 mm, window 32x64x32."""
    settings: dict[str, Any] = {
        "network": "swin_unetr",
        "network_args": {"in_channels": 1, "out_channels": 3, "feature_size": 12, "window_size": 4, "depths": [1] * 4},
        "channels": ("MRI",),
        "labels": {0: "background", 1: "Anterior", 2: "Posterior"},
        "roi_size": (32, 64, 32),
        "spacing": (1.0, 1.0, 1.0),
        "intensity": (NormalizeIntensity(),),
        "padding_value": -2.0,
        "mirror_axes": (0,),
        "suitability": Suitability("MR", ((30.0, 40.0, 24.0), (45.0, 60.0, 48.0)), ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))),
    }
    return BundleSpec(**(settings | changes))


def tiny_bundle(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """A complete bundle with random weights, the same ones each time."""
    spec, root = tiny_spec(**changes), folder / name
    write_configs(root, spec, {"name": name, "task": "Test", "description": "Random weights"}, {})
    torch.manual_seed(0)
    network = create(spec.network, **spec.network_args)
    with torch.no_grad():
        for parameter in network.parameters():  # livelier than the initialisation: labels differ from place to place
            parameter.mul_(1.5)
    (root / "models").mkdir()
    torch.save({"model": network.state_dict()}, root / "models" / "model.pt")
    (root / "docs").mkdir()
    (root / "docs" / "README.md").write_text("Random weights, for tests.\n")
    (root / "LICENSE").write_text("Apache-2.0\n")
    write_manifest(root)
    return root


def conv_network(bundle: Bundle) -> nn.Module:
    """Two convolutions, seeded by the SHA-256 of the bundle's weights: what a bundle's network is like, but quick.

    For tests of what is around the network: ``monkeypatch.setattr(Bundle, "network", conv_network)``.
    """
    torch.manual_seed(int(bundle.sha256[:8], 16))
    spec = bundle.spec
    layers = [nn.Conv3d(spec.in_channels, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, spec.out_channels, 3, padding=1)]
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(3)
    return nn.Sequential(*layers).eval()


def blob_scan(shape: tuple[int, int, int] = (34, 52, 35), seed: int = 0) -> np.ndarray:
    """Smooth structure plus noise, (X, Y, Z) float32, unlike itself under every flip and permutation."""
    random = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(0, 1, size) for size in shape), indexing="ij")
    smooth = 80 * np.sin(5 * x + 2) * np.cos(7 * y * y) + 60 * np.exp(-8 * ((x - 0.3) ** 2 + (y - 0.6) ** 2)) * z
    return (200 + smooth + random.normal(0, 5, shape)).astype(np.float32)


def save_scan(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a NIfTI-1 scan."""
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def blob_dataset(root: Path, cases: int = 4, labels: int = 3) -> Path:
    """An MSD folder: bright balls on noise, one label a ball, which a network learns in a few steps."""
    names = ["background", *(f"ball {value}" for value in range(1, labels))]
    listed = []
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number in range(cases):
        random = np.random.default_rng(number)
        shape = (34, 50, 33)
        grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
        image, label = random.normal(100, 10, shape), np.zeros(shape, dtype=np.uint8)
        for value in range(1, labels):
            centre = np.array([17, 50 * value / labels, 16]) + random.uniform(-3, 3, 3)
            inside = np.linalg.norm(grid - centre, axis=-1) < 7
            label[inside] = value
            image[inside] += 60 * value
        save_scan(root / "imagesTr" / f"case_{number}.nii.gz", image.astype(np.float32))
        save_scan(root / "labelsTr" / f"case_{number}.nii.gz", label)
        listed.append({"image": f"./imagesTr/case_{number}.nii.gz", "label": f"./labelsTr/case_{number}.nii.gz"})
    described = {
        "name": "Balls",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in enumerate(names)},
        "training": listed,
    }
    (root / "dataset.json").write_text(json.dumps(described))
    return root
