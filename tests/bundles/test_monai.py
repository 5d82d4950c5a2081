"""A bundle of this project is a MONAI bundle: MONAI's own command gives the same segmentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import medseg
from tests.builders import blob_scan, save_scan, tiny_bundle


@pytest.mark.slow
def test_monai_bundle_run_gives_the_labels_of_medseg_infer(tmp_path: Path) -> None:
    root, scans = tiny_bundle(tmp_path), tmp_path / "scans"
    scans.mkdir()
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    save_scan(scans / "own.nii.gz", blob_scan((34, 52, 35)), flipped)
    save_scan(scans / "resampled.nii.gz", blob_scan((30, 45, 28), seed=1), np.diag([1.1, 1.2, 0.9, 1.0]))
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--bundle_root", str(root), "--dataset_dir", str(scans), "--output_dir", str(tmp_path / "eval")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for scan in sorted(scans.iterdir()):
        theirs = nib.load(tmp_path / "eval" / scan.name.replace(".nii.gz", "_seg.nii.gz"))
        ours = medseg.infer(scan, bundle=root)
        found = np.asarray(theirs.dataobj).squeeze()
        assert np.allclose(theirs.affine, ours.affine)
        assert found.shape == ours.label_map.shape
        differing = int((found != ours.label_map).sum())
        assert differing <= 1e-4 * found.size, f"{scan.name}: {differing} of {found.size} voxels differ"
