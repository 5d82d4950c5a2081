"""The losses of a diagnosing network against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from medseg.networks.mdpformer import Diagnosis
from medseg.training.diagnosis_losses import DiagnosisLoss, class_weights, evidence_loss, segmentation_loss


def test_segmentation_by_hand() -> None:
    # Two voxels: an organ found with probability 1/2 (lesion 1/4), a background found with 1/2 (organ, lesion 1/4).
    logits = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])).T.reshape(1, 3, 2, 1, 1)
    label = torch.tensor([1, 0]).reshape(1, 2, 1, 1)
    entropy = (1.0 * math.log(2) + 0.2 * math.log(2)) / 1.2
    organ = (2 * 0.5 + 1) / (0.5 + 0.25 + 1 + 1)
    lesion = (0 + 1) / (0.25 + 0.25 + 0 + 1)
    expected = entropy + 1 - (organ + lesion) / 2
    assert float(segmentation_loss(logits, label)) == pytest.approx(expected, rel=1e-6)


def test_a_small_lesion_counts_as_much_as_a_large_one() -> None:
    label = torch.zeros(3, 4, 4, 4, dtype=torch.int64)  # the third patient has none
    label[0, 0, 0, 0] = 2
    label[1, 1:] = 2

    def cost(*missed: int) -> float:
        found = label.clone()
        for patient in missed:
            found[patient][found[patient] == 2] = 0
        logits = 40.0 * torch.nn.functional.one_hot(found, 3).movedim(-1, 1)
        return float(segmentation_loss(logits, label)) - entropy(logits)

    def entropy(logits: torch.Tensor) -> float:
        weight = torch.tensor([0.2, 1.0, 2.0])
        return float(torch.nn.functional.cross_entropy(logits, label, weight=weight))

    # Without it a Dice of 1 / (0 + voxels + 1) is left of each, halved by the other patient and by the organ.
    assert cost(0) - cost() == pytest.approx((1 - 1 / 2) / 4, abs=1e-5)
    assert cost(1) - cost() == pytest.approx((1 - 1 / 49) / 4, abs=1e-5)
    assert cost(0, 1) - cost() == pytest.approx((2 - 1 / 2 - 1 / 49) / 4, abs=1e-5)


def test_a_perfect_segmentation_costs_nothing() -> None:
    label = torch.randint(0, 3, (2, 4, 4, 4))
    logits = 40.0 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
    assert float(segmentation_loss(logits, label)) == pytest.approx(0, abs=1e-6)


def test_evidence_is_that_of_the_true_class_in_patients_with_a_lesion() -> None:
    lesion = torch.zeros(3, 4, 4, 4)
    lesion[0, 0, 0, 0] = 1  # one voxel of eight: the coarse voxel counts
    lesion[2, 2:, 2:, 2:] = 1
    target = torch.tensor([1, 0, 2])
    masks = torch.full((3, 3, 2, 2, 2), 5.0)
    masks[0, 1], masks[2, 2] = 0.0, 0.0
    # One of eight coarse voxels is positive: (3 log 2 + 7 log 2) / 8, in both ill patients.
    assert float(evidence_loss(masks, lesion, target)) == pytest.approx(10 * math.log(2) / 8, rel=1e-6)
    masks.requires_grad_()
    evidence_loss(masks, lesion, target).backward()  # type: ignore[no-untyped-call]
    assert masks.grad is not None
    moved = masks.grad.abs().flatten(2).sum(dim=2) > 0
    assert moved.tolist() == [[False, True, False], [False, False, False], [False, False, True]]
    healthy = evidence_loss(masks, torch.zeros(3, 4, 4, 4), target)
    assert float(healthy.detach()) == 0
    healthy.backward()  # type: ignore[no-untyped-call]


def test_rare_classes_weigh_more() -> None:
    weights = class_weights([0] * 16 + [1] * 4, 3)
    # 1/4, 1/2 and 1 for the class that nobody has; their mean is 7/12.
    torch.testing.assert_close(weights, torch.tensor([3 / 7, 6 / 7, 12 / 7]))
    torch.testing.assert_close(class_weights([0, 1, 2] * 5, 3), torch.ones(3))


def test_the_three_parts_add_up_with_their_weights() -> None:
    torch.manual_seed(0)
    found = Diagnosis(torch.randn(2, 3, 8, 8, 8), torch.zeros(2, 4), torch.randn(2, 4, 2, 2, 2))
    label, target = torch.randint(0, 3, (2, 1, 8, 8, 8)), torch.tensor([1, 3])
    parts = [
        segmentation_loss(found.seg_logits, label[:, 0]),
        torch.tensor(math.log(4)),  # nothing known of four classes, smoothed or not
        evidence_loss(found.mask_logits, label[:, 0] == 2, target),
    ]
    total = DiagnosisLoss(torch.ones(4), classification=2.0, evidence=0.25)(found, label, target)
    assert float(total) == pytest.approx(float(parts[0] + 2 * parts[1] + 0.25 * parts[2]), rel=1e-5)
