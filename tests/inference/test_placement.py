"""The engine on a device with its own memory, which runs out in every possible place: same labels, nothing twice."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import medseg
from medseg.errors import UsageError
from medseg.inference import placement as placement_module
from medseg.inference.accumulate import Ring
from medseg.inference.device import Arrival, Cost, HostDevice, Predictor, open_device, out_of_memory
from medseg.inference.placement import BatchSize, Placement
from medseg.inference.preprocess import preprocess
from medseg.inference.segment import segment
from medseg.inference.slice_inferer import SliceInferer
from medseg.inference.sliding_window import Windows, logit_planes, stacked
from medseg.io.volume import Source, Volume
from tests.builders import blob_scan, save_scan, tiny_bundle, tiny_spec

MIB = 2**20


class FakeDevice:
    """A device of so many bytes whose arrays lie on the host, and whose allocator says when they are too many.

    Args:
        capacity: bytes.
        needs: bytes that a window takes while the network runs, by how many passes came before.
        largest_batch: more windows at once fail.
        speeds_up: seconds for each window, by the windows at once.
    """

    where = torch.device("cpu")
    own_memory = True
    precision = "fp32"

    def __init__(
        self,
        capacity: int = 2**40,
        *,
        needs: Callable[[int], int] = lambda _passes: 1,
        largest_batch: int = 1000,
        speeds_up: Callable[[int], float] = lambda _batch: 1.0,
    ) -> None:
        self.capacity, self.needs, self.largest_batch, self.speeds_up = capacity, needs, largest_batch, speeds_up
        self.used = self.passes = self.peak = self.polls = 0
        self.batches: list[int] = []
        self.put_bytes: list[int] = []
        self.zeros_bytes: list[int] = []
        self.zeros_fail = False

    def _hold(self, make: Callable[[], Tensor], size: int) -> Tensor:
        if self.used + size > self.capacity:
            raise torch.OutOfMemoryError(f"{size} bytes asked for, {self.capacity - self.used} free")
        array = make()
        self.used += size
        weakref.finalize(array, self._drop, size)
        return array

    def _drop(self, size: int) -> None:
        self.used -= size

    def free(self) -> int:
        return self.capacity - self.used

    def put(self, tensor: Tensor) -> Tensor:
        array = self._hold(tensor.clone, tensor.nbytes)
        self.put_bytes.append(tensor.nbytes)
        return array

    def send(self, tensor: Tensor) -> Tensor:
        return self._hold(tensor.clone, tensor.nbytes)

    def fetch(self, tensor: Tensor) -> Arrival:
        return Arrival(tensor.clone())  # as a stream does: what is written to `tensor` later does not arrive

    def zeros(self, *shape: int) -> Tensor:
        size = 4 * int(np.prod(shape))
        if self.zeros_fail:
            raise torch.OutOfMemoryError("the driver gives less than it said")
        array = self._hold(lambda: torch.zeros(shape), size)
        self.zeros_bytes.append(size)
        return array

    def forward(self, network: Predictor, batch: Tensor) -> Tensor:
        self.peak = len(batch) * self.needs(self.passes)
        if len(batch) > self.largest_batch or self.used + self.peak > self.capacity:
            raise torch.OutOfMemoryError("no room for the network's features")
        self.passes += 1
        self.batches.append(len(batch))
        found = network(batch)
        return found if isinstance(found, Tensor) else found[0]

    def cost_of(self, step: Callable[[], Tensor]) -> tuple[Tensor, Cost]:
        done = step()
        return done, Cost(self.batches[-1] * self.speeds_up(self.batches[-1]), self.peak)

    def busy(self) -> bool:
        self.polls += 1
        return self.polls % 3 != 0

    def release(self) -> None:
        pass


class Counted(nn.Module):
    """A network that knows which windows it has seen, on whichever device."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, Counter[bytes]()

    def forward(self, windows: Tensor) -> Tensor:
        self.seen.update(window.numpy().tobytes() for window in windows)
        found: Tensor = self.inner(windows)
        return found


def _network(conv: type[nn.Module], channels: int, classes: int) -> Counted:
    torch.manual_seed(3)
    layers = [conv(channels, 4, 3, padding=1), nn.Tanh(), conv(4, classes, 3, padding=1)]
    return Counted(nn.Sequential(*layers)).eval()


IMAGE = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 30, 21, 17))).float()
WINDOWS = Windows(roi_size=(8, 8, 8), overlap=0.5, sw_batch_size=2)
CLASSES = 5
RING = 4 * 8 * 21 * 17 * (CLASSES + 1)


def _volume(place: Placement, network: nn.Module, **options: object) -> Tensor:
    return stacked(logit_planes(IMAGE, network, WINDOWS, placement=place, **options), IMAGE.shape[1:], 0)  # type: ignore[arg-type]


def _slices(place: Placement, network: nn.Module, resize: str) -> Tensor:
    inferer = SliceInferer(axis=0, roi_size=(1, 16, 16), resize=resize, sw_batch_size=3)  # type: ignore[arg-type]
    with torch.inference_mode():
        return stacked(inferer.planes(IMAGE, network, place), IMAGE.shape[1:], 0)


RUNS: dict[str, tuple[type[nn.Module], Callable[[Placement, nn.Module], Tensor]]] = {
    "volume": (nn.Conv3d, _volume),
    "volume flipped": (nn.Conv3d, lambda place, network: _volume(place, network, flips=(0, 2))),
    "slices": (nn.Conv2d, lambda place, network: _slices(place, network, "none")),
    "stretched slices": (nn.Conv2d, lambda place, network: _slices(place, network, "smooth")),
}


def _after(passes: int, more: int) -> Callable[[int], int]:
    return lambda done: 1000 if done < passes else more


# What the device can do, and what is given up, in order; stretched slices have neither sums nor an image there.
HALVED, SUMS, FIELD, CPU = (
    "windows at once: 2", "the sums of logits moved to the host", "the image moved to the host", "went on with the CPU",
)  # fmt: skip
LADDER: dict[str, tuple[Callable[[], FakeDevice], list[str]]] = {
    "everything fits": (lambda: FakeDevice(speeds_up=lambda n: 1 / n), []),
    "batch of four": (lambda: FakeDevice(speeds_up=lambda n: 1 / n, largest_batch=3), [HALVED]),
    "sums in the way": (lambda: FakeDevice(MIB, needs=_after(9, MIB - 50000)), [SUMS]),
    "image in the way": (lambda: FakeDevice(MIB, needs=_after(9, MIB - 12000)), [SUMS, FIELD]),
    "nothing goes": (lambda: FakeDevice(MIB, needs=_after(9, 2 * MIB)), [SUMS, FIELD, CPU]),
    "nothing ever goes": (lambda: FakeDevice(1000, needs=lambda _: 2000), [CPU]),
    "all the way down": (
        lambda: FakeDevice(MIB, needs=_after(5, 2 * MIB), speeds_up=lambda n: 1 / n),
        [HALVED, "windows at once: 1", SUMS, FIELD, CPU],
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rung", LADDER)
def test_on_every_rung_the_labels_are_the_same_and_no_window_is_computed_twice(rung: str, run: str) -> None:
    conv, segment_with = RUNS[run]
    plain, network = _network(conv, 1, CLASSES), _network(conv, 1, CLASSES)
    expected = segment_with(Placement(), plain)
    make, steps = LADDER[rung]
    device = make()
    place = Placement(device)
    found = segment_with(place, network)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(found.argmax(0), expected.argmax(0))
    assert network.seen == plain.seen
    assert max(network.seen.values()) == 1
    if run == "stretched slices":
        steps = [step for step in steps if step not in (SUMS, FIELD)]
        if "in the way" in rung:  # for them there is nothing but the network, and its window is smaller
            steps = []
    assert place.warnings == [f"device memory ran out: {step}" for step in steps]
    assert (place.device is device) == (CPU not in steps)
    del found
    assert device.used == 0


@pytest.mark.parametrize(
    ("capacity", "image_there", "sums_there"),
    [(10 * MIB, True, True), (RING, True, False), (IMAGE.nbytes, False, False)],
)
def test_image_and_sums_lie_where_the_free_memory_says(capacity: int, image_there: bool, sums_there: bool) -> None:
    device = FakeDevice(capacity, needs=lambda _: 1000)
    found = _volume(Placement(device), _network(nn.Conv3d, 1, CLASSES))
    assert device.put_bytes == ([IMAGE.nbytes] if image_there else [])
    assert sum(device.zeros_bytes) == (RING if sums_there else 0)
    torch.testing.assert_close(found, _volume(Placement(), _network(nn.Conv3d, 1, CLASSES)), atol=1e-6, rtol=0)


def test_sums_for_which_the_driver_has_no_memory_after_all_lie_on_the_host() -> None:
    device = FakeDevice()
    device.zeros_fail = True
    place, network = Placement(device), _network(nn.Conv3d, 1, CLASSES)
    found = _volume(place, network)
    torch.testing.assert_close(found, _volume(Placement(), _network(nn.Conv3d, 1, CLASSES)), atol=1e-6, rtol=0)
    assert place.warnings == ["device memory ran out: the sums of logits stay on the host"]
    assert max(network.seen.values()) == 1


def test_memory_that_runs_out_while_a_plane_is_taken_moves_the_sums_and_keeps_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = _volume(Placement(), _network(nn.Conv3d, 1, CLASSES))
    take = Ring.take

    def failing(ring: Ring, index: int, inside: list[slice]) -> Tensor:
        if ring.on_device and index == 9:
            raise torch.OutOfMemoryError("no room for a plane")
        return take(ring, index, inside)

    monkeypatch.setattr(Ring, "take", failing)
    place, network = Placement(FakeDevice(speeds_up=lambda n: 1 / n)), _network(nn.Conv3d, 1, CLASSES)
    found = _volume(place, network)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert place.warnings == [f"device memory ran out: {SUMS}"]
    assert max(network.seen.values()) == 1


def test_passes_side_by_side_give_up_each_others_sums_before_the_device() -> None:
    spec = tiny_spec(roi_size=(8, 16, 16), spacing=(1.2, 1.2, 1.2), sw_batch_size=3)
    scan = Volume(blob_scan((40, 26, 21))[None], np.eye(4), Source(Path("scan.nii"), "nifti"))
    case, flips = preprocess(scan, spec), ((), (0,), (1, 2))
    plain, network = _network(nn.Conv3d, 1, 3), _network(nn.Conv3d, 1, 3)
    expected = segment(case, plain, spec, flips=flips)
    device = FakeDevice(MIB, needs=_after(20, MIB - 3 * case.image.nbytes - 40000))
    place = Placement(device)
    found = segment(case, network, spec, place, flips=flips)
    assert np.array_equal(found.labels, expected.labels)
    assert len(device.zeros_bytes) == 6  # sums and weights of three passes
    assert place.warnings == [f"device memory ran out: {SUMS}"]
    assert network.seen == plain.seen


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(_passes: int) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _volume(Placement(FakeDevice(needs=broken)), _network(nn.Conv3d, 1, CLASSES))
    assert out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_a_batch_doubles_while_windows_get_faster_and_memory_allows_it() -> None:
    def grown(seconds: dict[int, float], free: int) -> list[int]:
        batch, sizes = BatchSize(), []
        while batch.growing and len(sizes) < 20:
            sizes.append(batch.size)
            batch.measured(Cost(batch.size * seconds[batch.size], 100 * batch.size), free)
        return [*sizes, batch.size]

    faster = {1: 1.0, 2: 0.6, 4: 0.5, 8: 0.48, 16: 0.1}
    assert grown(faster, 10**6) == [1, 1, 2, 2, 4, 4, 8, 8, 4]  # 8 is 4 % faster than 4, which does not count
    assert grown(faster, 490) == [1, 1, 2, 2, 2]  # 4 would take 400 of 490 bytes
    assert grown({1: 1.0, 2: 0.96}, 10**6) == [1, 1, 2, 2, 1]
    warming_up = BatchSize()
    warming_up.measured(Cost(100.0, 100), 10**6)  # the first pass of all, however slow, is not what 2 is measured by
    warming_up.measured(Cost(1.0, 100), 10**6)
    warming_up.measured(Cost(50.0, 200), 10**6)
    warming_up.measured(Cost(2.0, 200), 10**6)
    assert (warming_up.size, warming_up.growing) == (1, False)


def test_batches_found_on_the_first_windows_serve_the_rest() -> None:
    device = FakeDevice(speeds_up=lambda n: {1: 1.0, 2: 0.5, 4: 0.49}[n])
    _volume(Placement(device), _network(nn.Conv3d, 1, CLASSES))
    assert device.batches[:7] == [1, 1, 2, 2, 4, 4, 2]
    assert set(device.batches[6:-1]) == {2}


def test_the_record_says_what_was_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, scan = tiny_bundle(tmp_path), save_scan(tmp_path / "scan.nii", blob_scan())
    expected = medseg.infer(scan, bundle=bundle, device="cpu")
    monkeypatch.setattr(
        placement_module, "open_device", lambda _where, _precision: FakeDevice(MIB, needs=_after(1, 2 * MIB))
    )
    found = medseg.infer(scan, bundle=bundle, device="cpu")
    assert np.array_equal(found.label_map, expected.label_map)
    assert found.record.warnings[-1] == f"device memory ran out: {CPU}"
    assert expected.record.warnings == found.record.warnings[: -len([w for w in found.record.warnings if "ran" in w])]


def test_precision_is_a_word_of_three_and_reaches_the_network() -> None:
    seen: list[torch.dtype] = []

    def network(windows: Tensor) -> Tensor:
        seen.append((windows.flatten(1) @ windows.flatten(1).T).dtype)
        return windows

    image = torch.rand(1, 8, 8, 8)
    for precision in ("auto", "fp32", "bf16"):
        place = Placement.on(torch.device("cpu"), precision)
        assert stacked(logit_planes(image, network, WINDOWS, placement=place), (8, 8, 8), 0).dtype == torch.float32
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert isinstance(open_device(torch.device("cpu")), HostDevice)
    with pytest.raises(UsageError, match="fp8"):
        open_device(torch.device("cpu"), "fp8")  # type: ignore[arg-type]
