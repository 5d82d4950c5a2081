"""Several models over one scan against whole volumes of all classes: means, entropies, temperatures, memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from medseg.bundles.spec import BundleSpec, Calibration, Region, ScaleIntensityRange, SliceSpec
from medseg.inference.ensemble import Layout, Model, lay_out
from medseg.inference.memory import memory_plan
from medseg.inference.preprocess import model_grid, preprocess
from medseg.inference.resample import resample_linear
from medseg.inference.segment import Segmentation, segment_together
from medseg.inference.slice_inferer import SliceInferer
from medseg.inference.sliding_window import Windows, sliding_window
from medseg.inference.uncertainty import entropy
from medseg.io.volume import Source, Volume
from tests.builders import blob_scan, tiny_spec

REGIONS = {
    "activation": "sigmoid",
    "regions": (Region("whole", 1, 1), Region("core", 0, 2), Region("rim", 2, 3)),
    "labels": dict.fromkeys(range(4), ""),
}
OTHER_INTENSITY = {"intensity": (ScaleIntensityRange(100.0, 300.0),)}
SLICED = {"slices": SliceSpec(2, neighbours=1), "roi_size": (16, 16, 1)}


@dataclass(frozen=True)
class Together:
    """Members by what sets them apart, their weights and flips, and how their passes should come together."""

    members: tuple[dict[str, object], ...]
    weights: tuple[float, ...]
    on_model_grid: bool
    lockstep: bool
    flips: tuple[tuple[tuple[int, ...], ...], ...] = (((),), ((),), ((),))


CASES = {
    "one grid, other windows and intensities": Together(
        ({"roi_size": (8, 16, 16)}, {"roi_size": (8, 20, 12)} | OTHER_INTENSITY), (0.5, 0.5), True, True
    ),
    "one grid, one after the other": Together(
        tuple({"roi_size": size} for size in ((24, 16, 16), (24, 20, 16), (24, 24, 16))), (0.2, 0.3, 0.5), True, False
    ),
    "a volume and slices on one grid": Together(({"roi_size": (12, 12, 8)}, SLICED), (0.7, 0.3), True, True),
    "other spacings": Together(({}, {"spacing": (0.8, 1.5, 1.1)}), (2 / 3, 1 / 3), False, True),
    "other orientations with a common direction": Together(
        ({"roi_size": (8, 16, 8)}, {"orientation": "PIR", "spacing": None, "roi_size": (12, 8, 8)}),
        (0.5, 0.5),
        False,
        True,
    ),
    "opposite directions": Together(
        ({"roi_size": (8, 8, 8)}, {"orientation": "LPI", "roi_size": (8, 8, 8)}), (0.4, 0.6), False, False
    ),
    "slices along different axes": Together(
        (SLICED, {"slices": SliceSpec(0, "smooth"), "roi_size": (1, 16, 16)}), (0.5, 0.5), False, False
    ),
    "overlapping regions": Together((REGIONS, REGIONS | {"spacing": (1.6, 1.0, 1.3)}), (0.5, 0.5), False, True),
    "flips of some members": Together(
        ({"roi_size": (8, 16, 8)}, {"spacing": None, "roi_size": (8, 8, 8)}),
        (0.5, 0.5),
        False,
        True,
        (((), (1,), (2,), (1, 2)), ((),)),
    ),
}


def _spec(**changes: object) -> BundleSpec:
    return replace(
        tiny_spec(), **({"spacing": (1.2, 1.2, 1.2), "roi_size": (16, 20, 16), "sw_batch_size": 3} | changes)
    )


def _volume() -> Volume:
    """A scan stored with axes that have to be permuted and flipped."""
    affine = np.diag([-0.9, 1.4, 1.0, 1.0])[[1, 0, 2, 3]]
    return Volume(blob_scan((30, 26, 21))[None], affine, Source(Path("scan.nii"), "nifti"))


def _network(spec: BundleSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    conv = nn.Conv3d if spec.slices is None else nn.Conv2d
    layers = [conv(spec.network_channels, 4, 3, padding=1), nn.Tanh(), conv(4, spec.out_channels, 3, padding=1)]
    for layer in layers[::2]:
        layer.weight.data.mul_(3)
    return nn.Sequential(*layers).eval()


def _models(case: Together, temperature: float = 1.0) -> list[Model]:
    specs, volume = [_spec(**changes) for changes in case.members], _volume()
    return [
        Model(preprocess(volume, spec), _network(spec, seed), spec, weight, temperature, flips)
        for seed, (spec, weight, flips) in enumerate(zip(specs, case.weights, case.flips, strict=False))
    ]


def _on_scan(model: Model, flips: tuple[int, ...], temperature: float) -> NDArray[np.float32]:
    """Probabilities (K, X, Y, Z) of one pass, by whole volumes."""
    spec, grid, dims = model.spec, model.case.grid, [1 + axis for axis in flips]
    image = model.case.image.flip(dims)
    if spec.slices is not None:
        logits = SliceInferer.of(spec)(image[None], model.network)[0]
    else:
        logits = sliding_window(image, model.network, replace(Windows.of(spec), sw_batch_size=1))
    logits = logits.flip(dims) / temperature
    probabilities = logits.sigmoid() if spec.activation == "sigmoid" else logits.softmax(0)
    turned = resample_linear(probabilities, grid.turned_shape, [1 / step for step in grid.step]).numpy()
    return np.ascontiguousarray(grid.order.invert(turned))


def _passes(models: list[Model], temperature: float = 1.0) -> tuple[list[float], list[NDArray[np.float32]]]:
    weights = [model.weight / len(model.flips) for model in models for _ in model.flips]
    return weights, [_on_scan(model, one, temperature) for model in models for one in model.flips]


def _entropies(probabilities: NDArray[np.float32], *, regions: bool) -> NDArray[np.float64]:
    values = probabilities.astype(np.float64)
    if regions:
        return np.stack([stats.entropy(np.stack([p, 1 - p]), base=2, axis=0) for p in values]).mean(0)
    return stats.entropy(values, base=len(values), axis=0)


def _layout(models: list[Model], *, apart: bool) -> Layout:
    return lay_out(
        [model.case.grid for model in models],
        [model.spec for model in models],
        passes=[len(model.flips) for model in models],
        apart=apart,
    )


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_means_entropies_and_disagreement_are_those_of_whole_volumes(name: str) -> None:
    case = CASES[name]
    models = _models(case)
    layout = _layout(models, apart=False)
    assert (layout.on_model_grid, layout.lockstep) == (case.on_model_grid, case.lockstep)
    weights, parts = _passes(models)
    mean = np.einsum("m,mkxyz->kxyz", np.array(weights), np.stack(parts))
    regions = bool(models[0].spec.regions)
    total = _entropies(mean, regions=regions)
    inside = sum(weight * _entropies(part, regions=regions) for weight, part in zip(weights, parts, strict=True))

    seen: list[tuple[int, int]] = []
    plain = segment_together(models, progress=lambda done, all_: seen.append((done, all_)))
    assert seen[-1] == (plain.windows, plain.windows)
    sure = segment_together(models, probabilities=True, uncertainty=True)
    assert sure.uncertainty is not None
    assert sure.uncertainty.mutual_information is not None
    np.testing.assert_allclose(sure.probabilities, mean, atol=1e-5)
    np.testing.assert_allclose(sure.uncertainty.entropy, total, atol=1e-4)
    np.testing.assert_allclose(sure.uncertainty.mutual_information, total - inside, atol=1e-4)
    assert sure.uncertainty.mutual_information.min() >= 0
    assert sure.uncertainty.mutual_information.max() > 0.01
    for found in (plain, sure):
        _check_labels(found, mean, models[0].spec)


def _check_labels(found: Segmentation, mean: NDArray[np.float64], spec: BundleSpec) -> None:
    assert len(np.unique(found.labels)) > 1
    if not spec.regions:
        chosen = np.take_along_axis(mean, found.labels[None].astype(np.int64), axis=0)[0]
        assert (mean.max(0) - chosen).max() < 1e-6
        return
    expected = np.zeros(found.labels.shape)
    for region in spec.regions:
        expected[mean[region.channel] > 0.5] = region.label
    assert (expected != found.labels).mean() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"spacing": None}, REGIONS], ids=["resampled", "own grid", "regions"])
@pytest.mark.parametrize("flips", [((),), ((), (0,), (0, 2))], ids=["plain", "flips"])
@torch.inference_mode()
def test_the_temperature_of_a_model_alone_softens_its_probabilities_and_leaves_its_labels(
    changes: dict[str, object], flips: tuple[tuple[int, ...], ...]
) -> None:
    case = Together((changes,), (1.0,), True, True, (flips,))
    cold = segment_together(_models(case)).labels
    models = _models(case, 2.5)
    warm = segment_together(models, probabilities=True, uncertainty=True)
    weights, parts = _passes(models, 2.5)
    mean = np.einsum("m,mkxyz->kxyz", np.array(weights), np.stack(parts))
    assert (warm.labels != cold).mean() < 1e-4  # equal up to rounding where two classes are equal
    assert (segment_together(models).labels == cold).all()
    np.testing.assert_allclose(warm.probabilities, mean, atol=1e-5)
    assert warm.uncertainty is not None
    np.testing.assert_allclose(
        warm.uncertainty.entropy, _entropies(mean, regions=bool(models[0].spec.regions)), atol=1e-4
    )
    assert (warm.uncertainty.mutual_information is None) == (flips == ((),))


@torch.inference_mode()
def test_each_member_of_an_ensemble_has_its_own_temperature_which_counts_in_the_mean() -> None:
    case = CASES["other spacings"]
    models = [replace(model, temperature=value) for model, value in zip(_models(case), (0.5, 4.0), strict=True)]
    mean = sum(model.weight * _on_scan(model, (), model.temperature) for model in models)
    found = segment_together(models, probabilities=True)
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-5)
    _check_labels(segment_together(models), np.asarray(mean), models[0].spec)


@torch.inference_mode()
def test_a_model_with_itself_is_that_model_and_does_not_disagree() -> None:
    (model,) = _models(Together(({},), (1.0,), True, True))
    alone = segment_together([model], probabilities=True, uncertainty=True)
    twice = segment_together([replace(model, weight=0.5)] * 2, probabilities=True, uncertainty=True)
    assert (segment_together([replace(model, weight=0.5)] * 2).labels == alone.labels).all()
    assert (twice.labels == alone.labels).all()
    assert alone.uncertainty is not None
    assert twice.uncertainty is not None
    assert (twice.uncertainty.entropy == alone.uncertainty.entropy).all()
    assert twice.uncertainty.mutual_information is not None
    assert twice.uncertainty.mutual_information.max() == 0
    assert twice.uncertainty.summary.score == pytest.approx(alone.uncertainty.summary.score)


@torch.inference_mode()
def test_the_summary_counts_what_the_maps_hold() -> None:
    models = _models(CASES["other spacings"])
    found = segment_together(models, probabilities=True, uncertainty=True)
    assert found.uncertainty is not None
    assert found.probabilities is not None
    assert found.uncertainty.mutual_information is not None
    summary, maps, labels = found.uncertainty.summary, found.uncertainty.entropy, found.labels
    inside = labels > 0
    assert summary.mean_entropy == pytest.approx(maps[inside].mean(), rel=1e-5)
    assert summary.uncertain_share == pytest.approx((maps[inside] > 0.5).mean())
    assert summary.mutual_information == pytest.approx(found.uncertainty.mutual_information[inside].mean(), rel=1e-5)
    for value, mean in summary.label_entropy.items():
        assert mean == (pytest.approx(maps[labels == value].mean(), rel=1e-5) if (labels == value).any() else None)
    expected = [
        2
        * found.probabilities[value][labels == value].sum()
        / ((labels == value).sum() + found.probabilities[value].sum())
        for value in (1, 2)
    ]  # the Dice of the labels and the probabilities
    assert summary.score == pytest.approx(np.mean(expected), rel=1e-4)


@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(0, 40))
@settings(max_examples=60, deadline=None)
def test_entropy_lies_between_sure_and_unsure_and_a_mean_is_never_surer_than_its_parts(
    classes: int, seed: int, sharpness: float
) -> None:
    random = np.random.default_rng(seed)
    parts = [Tensor(random.normal(size=(classes, 3, 4)) * sharpness).softmax(0) for _ in range(3)]
    found = [entropy(part, "softmax") for part in parts]
    expected = stats.entropy(parts[0].double().numpy(), base=classes, axis=0)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)
    assert all(0 <= float(one.min()) <= float(one.max()) <= 1 for one in found)
    mean = torch.stack(parts).mean(0)
    assert (entropy(mean, "softmax") - torch.stack(found).mean(0)).min() > -1e-6
    assert entropy(torch.full((classes, 1, 1), 1 / classes), "softmax").item() == pytest.approx(1)
    assert entropy(torch.eye(classes)[:, :, None], "softmax").max() == 0
    assert entropy(torch.full((classes, 1, 1), 0.5), "sigmoid").item() == pytest.approx(1)


def test_members_in_lockstep_take_rings_and_those_in_turn_one_ring_and_the_sums_of_all_planes() -> None:
    affine, shape = np.diag([0.8, 0.8, 1.0, 1.0]), (256, 256, 600)
    labels = {value: str(value) for value in range(40)}
    one, other = (
        _spec(labels=labels, spacing=(size,) * 3, roi_size=(64, 64, 64), sw_batch_size=1) for size in (1.5, 2.0)
    )
    alone = [memory_plan(shape, affine, spec) for spec in (one, other)]
    both = memory_plan(shape, affine, one, other, flips=[1, 1])
    assert both.sums == alone[0].sums + alone[1].sums
    longer = memory_plan((256, 256, 1200), affine, one, other, flips=[1, 1])
    assert longer.sums == both.sums
    assert longer.planes == both.planes
    against = replace(other, orientation="LPI")
    grids = [model_grid(shape, affine, spec) for spec in (one, against)]
    assert not lay_out(grids, [one, against], passes=[1, 1]).lockstep
    in_turn = memory_plan(shape, affine, one, against, flips=[1, 1])
    assert in_turn.sums == max(alone[0].sums, alone[1].sums) + 4 * 40 * 256 * 256 * 600
    uncertain = memory_plan(shape, affine, one, other, flips=[1, 1], uncertainty=True)
    assert uncertain.outputs == both.outputs + 2 * 4 * 256 * 256 * 600
    warm = replace(one, calibration=Calibration(2.0))
    assert memory_plan(shape, affine, warm) == alone[0]
    assert memory_plan(shape, affine, warm, uncertainty=True).planes > alone[0].planes


_RUN = """
import sys, torch, numpy as np
from pathlib import Path
from medseg.inference.ensemble import Model
from medseg.inference.preprocess import preprocess
from medseg.inference.segment import segment_together
from medseg.io.volume import Source, Volume
from tests.inference.test_ensemble import _network, _spec

def memory(field):
    return next(int(s.split()[1]) for s in open("/proc/self/status") if s.startswith(field)) * 1024

torch.set_num_threads(1)
labels = {n: str(n) for n in range(40)}
specs = [_spec(labels=labels, roi_size=(16, 32, 16), sw_batch_size=1, spacing=(s,) * 3) for s in (1.2, 1.4)]
volume = Volume(np.zeros((1, 60, 60, 110), np.float32), np.diag([1.0, 1.0, 1.0, 1.0]), Source(Path("x"), "nifti"))
volume.data[..., 20:40, 20:40, :] = np.random.default_rng(0).normal(size=(20, 20, 110))

def run():
    segment_together([Model(preprocess(volume, spec), _network(spec), spec, 0.5) for spec in specs], uncertainty=True)

run()  # everything is loaded
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
run()
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_uncertainty_of_an_ensemble_takes_less_memory_than_one_volume_of_probabilities() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, check=True, cwd=root)
    assert int(run.stdout) < 4 * 40 * 60 * 60 * 110
