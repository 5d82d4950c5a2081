"""MDPFormer: its sizes, what is missing has no effect, each patient for itself, and it can learn two of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medseg.checkpoints import load_pretrained, load_published
from medseg.errors import BundleError
from medseg.inference.sliding_window import Windows, sliding_window
from medseg.networks import create
from medseg.networks.mdpformer import SMALL, Diagnosis, MDPFormer, SPath, position_code

TINY: dict[str, Any] = {
    "channels": [8, 12, 16],
    "fold": True,
    "hidden_size": 24,
    "num_heads": 2,
    "depths": [1, 1, 1],
    "free_tokens": 2,
}


def network(**changes: Any) -> MDPFormer:
    torch.manual_seed(0)
    return MDPFormer(**(TINY | changes)).eval()


def awake(net: MDPFormer) -> MDPFormer:
    """Age and sex start without effect; here they have one."""
    with torch.no_grad():
        for parameter in (net.patient.sex.weight, net.patient.age[2].weight):
            parameter.normal_()
    return net


def test_the_small_network_has_the_stated_size_and_shapes() -> None:
    net = MDPFormer(**SMALL).eval()
    assert sum(p.numel() for p in net.parameters()) == 1_422_554
    assert sum(p.numel() for p in net.s_path.parameters()) == 1_146_248
    with torch.inference_mode():
        found = net(torch.randn(2, 3, 32, 48, 64))
    assert isinstance(found, Diagnosis)
    assert [tuple(part.shape) for part in found] == [(2, 3, 32, 48, 64), (2, 9), (2, 9, 8, 12, 16)]


@pytest.mark.parametrize("size", [(32, 32, 32), (48, 32, 80)])
@pytest.mark.parametrize("fold", [True, False])
@torch.inference_mode()
def test_any_multiple_of_the_reduction_runs(size: tuple[int, int, int], fold: bool) -> None:
    net = network(channels=[4, 4, 8, 8, 8][: 4 if fold else 5], fold=fold)
    found = net(torch.randn(1, 3, *size))
    assert found.seg_logits.shape == (1, 3, *size)
    assert found.mask_logits.shape == (1, 9, *(n // 4 for n in size))
    assert all(bool(torch.isfinite(part).all()) for part in found)


@torch.inference_mode()
def test_an_absent_phase_has_no_effect_whatever_it_holds() -> None:
    net, image = network(), torch.randn(2, 3, 16, 16, 16)
    phases = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    other = image.clone()
    other[0, 0], other[1, 2] = math.nan, 1e6
    for one, two in zip(net(image, phases=phases), net(other, phases=phases), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(net(image, phases=phases).class_logits, net(image).class_logits)


@torch.inference_mode()
def test_unknown_age_and_sex_are_the_default_and_known_ones_count_when_learned() -> None:
    fresh, image = network(), torch.randn(2, 3, 16, 16, 16)
    known = {"age": torch.tensor([40.0, 70.0]), "sex": torch.tensor([0, 1])}
    unknown = {"age": torch.full((2,), math.nan), "sex": torch.tensor([2, 2])}
    assert torch.equal(fresh(image, **known).class_logits, fresh(image).class_logits)  # without effect at the start
    net = awake(network())
    for one, two in zip(net(image, **unknown), net(image), strict=True):
        assert torch.equal(one, two)
        assert bool(torch.isfinite(one).all())
    plain = net(image).class_logits
    for part in known:
        found = net(image, **{part: known[part]})
        assert not torch.allclose(found.class_logits, plain)
        assert torch.equal(found.seg_logits, net(image).seg_logits)  # age does not move a boundary
    blind = network(use_meta=False)
    assert torch.equal(blind(image, **known).class_logits, blind(image).class_logits)


@torch.inference_mode()
def test_a_patient_alone_equals_the_same_one_in_a_batch() -> None:
    net, image = awake(network()), torch.randn(3, 3, 16, 16, 16)
    age, sex = torch.tensor([40.0, math.nan, 66.0]), torch.tensor([0, 1, 2])
    phases = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 1]])
    together = net(image, age, sex, phases)
    for index in range(3):
        one = slice(index, index + 1)
        for part, alone in zip(together, net(image[one], age[one], sex[one], phases[one]), strict=True):
            torch.testing.assert_close(part[one], alone, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_sliding_window_takes_the_segmentation() -> None:
    net, image = network(), torch.randn(3, 16, 16, 16)
    logits = sliding_window(image, net, Windows(roi_size=(16, 16, 16), overlap=0.5))
    torch.testing.assert_close(logits, net(image[None]).seg_logits[0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_without_patient_classes_it_is_the_s_path() -> None:
    net, image = network(patient_classes=0), torch.randn(1, 3, 16, 16, 16)
    logits = net(image)
    assert isinstance(logits, Tensor)
    assert torch.equal(logits, net.s_path(image)[0])
    assert {key.partition(".")[0] for key in net.state_dict()} == {"s_path"}
    whole = network().state_dict()
    assert all(
        whole[key].shape == value.shape for key, value in net.state_dict().items()
    )  # the first stage of training


@torch.inference_mode()
def test_folding_keeps_every_voxel_in_its_place() -> None:
    path = SPath(1, 1, (8, 8, 8), fold=True).eval()
    moved: list[Tensor] = []
    path.encoder[0].register_forward_pre_hook(lambda _module, arguments: moved.append(arguments[0]))
    path.head.register_forward_hook(lambda _module, _arguments, _output: moved[0])
    image = torch.arange(16.0**3).reshape(1, 1, 16, 16, 16)
    assert torch.equal(path(image)[0], image)
    # Channel dz * 4 + dy * 2 + dx of a folded voxel is its neighbour by (dz, dy, dx).
    assert moved[0][0, 6, 1, 2, 3] == image[0, 0, 3, 5, 6]


def test_the_position_code_tells_all_places_apart() -> None:
    code = position_code((4, 6, 8), 64)
    assert code.shape == (192, 64)
    assert (code[:, 60:] == 0).all()  # 6 x 10 frequencies, the rest stays empty
    assert float(torch.cdist(code, code).fill_diagonal_(9).min()) > 0.1
    # The lowest frequency is half a cycle: its sine at the first of four places is that of 2 pi / 2 / 8.
    assert float(code[0, 0]) == pytest.approx(math.sin(math.pi / 8))


def test_it_learns_two_patients_in_a_few_steps() -> None:
    torch.manual_seed(0)
    net = MDPFormer(**TINY)
    image, wanted = torch.randn(2, 3, 16, 16, 16), torch.tensor([3, 7])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(image).class_logits, wanted).backward()
        optimizer.step()
    assert torch.equal(net.eval()(image).class_logits.argmax(dim=1), wanted)
    assert all(p.grad is not None for name, p in net.named_parameters() if name.startswith("s_path.encoder"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"channels": [8, 8]}, "at least 3 levels"),
        ({"hidden_size": 20}, "multiple of 8"),
        ({"hidden_size": 32, "num_heads": 5}, "num_heads 5"),
        ({"depths": [1, 1]}, "3 entries"),
        ({"patient_classes": -1}, "patient_classes is -1"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        create("mdpformer", **(TINY | change))


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((1, 2, 16, 16, 16), "takes .B, 3, D, H, W."),
        ((1, 3, 16, 20, 16), "height is 20; a multiple of 8, 16 or more"),
        ((1, 3, 8, 16, 16), "depth is 8"),
        ((3, 16, 16, 16), "image of shape"),
    ],
)
def test_an_image_it_cannot_take_is_refused(shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        network()(torch.zeros(shape))


def test_an_s_path_trained_alone_starts_the_whole_network() -> None:
    alone, whole = network(patient_classes=0), network(patient_classes=4)
    report = load_pretrained(whole, alone.state_dict())
    assert len(report.taken) == len(alone.state_dict())
    assert all(key.startswith(("patient.", "c_path.")) for key in report.left)
    image = torch.randn(1, 3, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(whole(image).seg_logits, alone(image))
    again = load_published("mdpformer", TINY | {"patient_classes": 4}, whole.state_dict())
    with torch.inference_mode():
        assert torch.equal(again(image).class_logits, whole(image).class_logits)
    with pytest.raises(BundleError, match="of another shape"):
        load_pretrained(network(channels=[8, 12, 20]), alone.state_dict())
