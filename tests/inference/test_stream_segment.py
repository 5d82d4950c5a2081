"""`segment` against whole volumes of all classes, and what it takes of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg.bundles.spec import BundleSpec, Region, SliceSpec
from medseg.inference.ensemble import lay_out
from medseg.inference.memory import memory_plan
from medseg.inference.preprocess import model_grid, preprocess
from medseg.inference.resample import resample_linear
from medseg.inference.segment import plane_axis, segment
from medseg.inference.slice_inferer import SliceInferer
from medseg.inference.sliding_window import Windows, sliding_window
from medseg.io.volume import Source, Volume
from tests.builders import blob_scan, tiny_spec

REGIONS = (Region("whole", 1, 1), Region("core", 0, 2), Region("rim", 2, 3))
CASES = {
    "one pass": ({}, ((),), False),
    "kept probabilities": ({"spacing": (1.3, 0.8, 1.1)}, ((),), True),
    "own grid": ({"spacing": None, "roi_size": (16, 16, 16)}, ((), (1,)), True),
    "flips side by side": ({"roi_size": (8, 16, 16)}, ((), (0,), (0, 2)), False),
    "flips in turn": ({"roi_size": (24, 16, 16)}, ((), (0,), (1,), (0, 1)), False),
    "regions": ({"activation": "sigmoid", "regions": REGIONS, "labels": dict.fromkeys(range(4), "")}, ((), (2,)), True),
    "slices": ({"slices": SliceSpec(2, neighbours=1), "roi_size": (16, 16, 1)}, ((), (0,), (2,)), True),
    "stretched slices": ({"slices": SliceSpec(1, "smooth"), "roi_size": (16, 1, 16)}, ((), (0, 1)), False),
}


def _spec(**changes: object) -> BundleSpec:
    return replace(
        tiny_spec(), **({"spacing": (1.2, 1.2, 1.2), "roi_size": (16, 20, 16), "sw_batch_size": 3} | changes)
    )


def _volume() -> Volume:
    """A scan stored with axes that have to be permuted and flipped."""
    affine = np.diag([-0.9, 1.4, 1.0, 1.0])[[1, 0, 2, 3]]
    return Volume(blob_scan((30, 26, 21))[None], affine, Source(Path("scan.nii"), "nifti"))


def _network(spec: BundleSpec) -> nn.Module:
    torch.manual_seed(2)
    conv = nn.Conv3d if spec.slices is None else nn.Conv2d
    layers = [conv(spec.network_channels, 4, 3, padding=1), nn.Tanh(), conv(4, spec.out_channels, 3, padding=1)]
    for layer in layers[::2]:
        layer.weight.data.mul_(3)
    return nn.Sequential(*layers).eval()


def _whole(image: Tensor, network: nn.Module, spec: BundleSpec) -> Tensor:
    """Probabilities on the model grid."""
    if spec.slices is not None:
        logits = SliceInferer.of(spec)(image[None], network)[0]
    else:
        logits = sliding_window(image, network, replace(Windows.of(spec), sw_batch_size=1))
    return logits.sigmoid() if spec.activation == "sigmoid" else logits.softmax(0)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_labels_and_probabilities_are_those_of_whole_volumes(name: str) -> None:
    changes, flips, keep = CASES[name]
    spec = _spec(**changes)
    network, case = _network(spec), preprocess(_volume(), spec)
    seen: list[tuple[int, int]] = []
    found = segment(
        case, network, spec, flips=flips, probabilities=keep, progress=lambda done, all_: seen.append((done, all_))
    )
    dims = [tuple(1 + axis for axis in one) for one in flips]
    mean = torch.stack([_whole(case.image.flip(one), network, spec).flip(one) for one in dims]).mean(0)
    turned = resample_linear(mean, case.grid.turned_shape, [1 / step for step in case.grid.step]).numpy()
    maps = np.ascontiguousarray(case.grid.order.invert(turned))
    assert maps.shape[1:] == found.labels.shape == (30, 26, 21)
    if spec.regions:
        expected = np.zeros(found.labels.shape)
        for region in REGIONS:
            expected[maps[region.channel] > 0.5] = region.label
        assert (expected != found.labels).mean() < 1e-4
    else:
        chosen = np.take_along_axis(maps, found.labels[None].astype(np.int64), axis=0)[0]
        assert (maps.max(0) - chosen).max() < 1e-6
    assert len(np.unique(found.labels)) > 2
    assert found.labels.dtype == np.uint8
    assert (found.probabilities is not None) == keep
    if keep:
        np.testing.assert_allclose(found.probabilities, maps, atol=1e-5)
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_passes_run_side_by_side_where_their_rings_are_smaller_than_the_mean_of_all_planes() -> None:
    def in_lockstep(shape: tuple[int, int, int], spec: BundleSpec, passes: int) -> bool:
        return lay_out([model_grid(shape, np.diag([1.2, 1.2, 1.2, 1.0]), spec)], [spec], passes=[passes]).lockstep

    assert in_lockstep((300, 50, 50), _spec(roi_size=(96, 48, 48)), 4)
    assert not in_lockstep((200, 50, 50), _spec(roi_size=(96, 48, 48)), 4)
    assert in_lockstep((20, 20, 20), _spec(slices=SliceSpec(1), roi_size=(16, 1, 16)), 8)
    assert plane_axis((20, 20, 20), _spec(slices=SliceSpec(1), roi_size=(16, 1, 16))) == 1


def test_no_term_of_the_plan_grows_with_classes_times_volume() -> None:
    affine, spec = np.diag([0.8, 0.8, 1.0, 1.0]), _spec(spacing=(1.5,) * 3, roi_size=(96,) * 3, sw_batch_size=1)
    spec = replace(spec, labels={value: str(value) for value in range(104)})
    short, long = (memory_plan((512, 512, length), affine, spec) for length in (800, 1600))
    assert long.sums == short.sums
    assert long.planes == short.planes
    assert long.total - short.total < 30 * 512 * 512 * 800
    assert memory_plan((512, 512, 400), affine, spec).total < 8 * 2**30
    assert memory_plan((512, 512, 400), affine, spec, probabilities=True).outputs > 4 * 104 * 512 * 512 * 400
    assert memory_plan((512, 512, 800), affine, spec, flips=2).sums == 2 * short.sums


_RUN = """
import sys, torch, numpy as np
from pathlib import Path
from medseg.inference.memory import memory_plan
from medseg.inference.preprocess import preprocess
from medseg.inference.segment import segment
from medseg.io.volume import Source, Volume
from tests.inference.test_stream_segment import _network, _spec

def memory(field):
    return next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith(field)) * 1024

torch.set_num_threads(1)
spec = _spec(labels={n: str(n) for n in range(40)}, roi_size=(32, 32, 32), sw_batch_size=1)
volume = Volume(np.zeros((1, 90, 90, 260), np.float32), np.diag([1.0, 1.0, 1.0, 1.0]), Source(Path("x"), "nifti"))
volume.data[..., 20:70, 20:70, :] = np.random.default_rng(0).normal(size=(50, 50, 260))
plan = memory_plan(volume.shape, volume.affine, spec)
network = _network(spec)
segment(preprocess(volume, spec), network, spec)  # everything is loaded
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
segment(preprocess(volume, spec), network, spec)
print(memory("VmHWM") - before, plan.total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_the_memory_taken_stays_below_the_plan_and_below_the_logits_of_the_volume() -> None:
    root = Path(__file__).parents[2]
    # Fixed, as glibc moves it while a program runs, and freed arrays then stay in the process or not by chance.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, check=True, cwd=root, env=fixed)
    taken, planned = map(int, run.stdout.split())
    assert taken < planned
    assert taken < 4 * 40 * 75 * 75 * 217  # one volume of logits on the model grid
