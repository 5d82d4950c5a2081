"""DynUNet: MONAI's CNN after nnU-Net, the baseline that the transformers are compared with.

Paper: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
2021, Nature Methods 18; MONAI's network follows "Automated Design of Deep Learning Methods for Biomedical Image
Segmentation", 2019, arXiv 1904.08128.
Published code: Project-MONAI/MONAI (Apache-2.0). The blocks and their keys are MONAI's own class; this module fills in
the kernels and strides of an isotropic network, and goes through the levels itself: MONAI's chain of skip layers names
every tensor twice in the state dict, and deep supervision comes here as the list that the loss takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.nets import dynunet as monai_dynunet
from torch import Tensor
from torch.nn import functional as F

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, strided_window
from medseg.networks.layers.conv_unet import check_image


class DynUNet(monai_dynunet.DynUNet):
    """DynUNet as MONAI builds it.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        filters: channels of each level, full resolution first, the bottleneck last; at least 3 levels.
        strides: of each level, one number or one per axis; None: 1, then 2 for each further level.
        kernel_size: of each level, one number or one per axis; None: 3 everywhere.
        spatial_dims: 2 or 3.
        res_block: residual blocks instead of plain ones.
        deep_supervision: further outputs at the lower levels, given in training only.
        deep_supr_num: their number, at most the levels less 2.

    Shape:
        image (B, in_channels, D, H, W) -> logits (B, out_channels, D, H, W); in 2D without D. Each axis is a multiple
        of the product of its strides, and at least one is larger. In training with deep supervision a list of such
        logits, finest first, the others stretched to full size.

    Raises:
        ValueError: a configuration that has no such network, or an image of another size or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        filters: Sequence[int] = (32, 64, 128, 256, 320, 320),
        *,
        strides: Sequence[Sequence[int] | int] | None = None,
        kernel_size: Sequence[Sequence[int] | int] | None = None,
        spatial_dims: int = 3,
        res_block: bool = False,
        deep_supervision: bool = False,
        deep_supr_num: int = 1,
    ) -> None:
        levels = len(filters)
        if levels < 3:
            raise ValueError(f"filters is {list(filters)}; at least 3 levels are needed")
        steps = [1] + [2] * (levels - 1) if strides is None else list(strides)
        kernels = [3] * levels if kernel_size is None else list(kernel_size)
        if len(steps) != levels or len(kernels) != levels:
            raise ValueError(f"{levels} filters need as many strides and kernels, got {len(steps)} and {len(kernels)}")
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernels,
            strides=steps,
            upsample_kernel_size=steps[1:],
            filters=list(filters),
            deep_supervision=deep_supervision,
            deep_supr_num=deep_supr_num,
            res_block=res_block,
        )
        del self.skip_layers  # the same blocks once more
        self.divisor = _divisor(steps, spatial_dims)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image; see the class for shapes."""
        check_image("DynUNet", x.shape, self.in_channels, self.divisor)
        skips = [self.input_block(x)]
        for downsample in self.downsamples:
            skips.append(downsample(skips[-1]))
        features = self.bottleneck(skips[-1])
        levels = []  # decoder features, coarsest first
        for upsample, skip in zip(self.upsamples, reversed(skips), strict=True):
            features = upsample(features, skip)
            levels.append(features)
        logits: Tensor = self.output_block(features)
        if not (self.training and self.deep_supervision):
            return logits
        # The first head belongs to half resolution.
        coarser = zip(self.deep_supervision_heads, levels[-2::-1], strict=False)
        return [logits, *(F.interpolate(head(level), logits.shape[2:]) for head, level in coarser)]


def _divisor(strides: Sequence[Sequence[int] | int], spatial_dims: int) -> tuple[int, ...]:
    per_axis = [[step] * spatial_dims if isinstance(step, int) else list(step) for step in strides]
    return tuple(math.prod(axis) for axis in zip(*per_axis, strict=True))


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for a window that covers `size`; by default residual, with deep supervision, four levels."""
    small = {"filters": [16, 32, 64, 96], "res_block": True, "deep_supervision": True}
    arguments = {"in_channels": in_channels, "out_channels": out_channels, "spatial_dims": len(size), **small, **given}
    strides = arguments.get("strides") or [1] + [2] * (len(arguments["filters"]) - 1)
    divisor = _divisor(strides, len(size))
    return Fit(arguments, strided_window(size, divisor))


ENCODER = ("input_block.", "downsamples.", "bottleneck.")
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="DynUNet",
    paper="Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, "
    "2021, Nature Methods 18; preprint 2019, arXiv 1904.08128",
    code="github.com/Project-MONAI/MONAI",
    code_license="Apache-2.0",
    spatial_dims=(3, 2),
    input_rule="each axis a multiple of the product of its strides, 32 by default; at least one axis larger",
    default={"in_channels": 1, "out_channels": 14},
    default_input=(1, 1, 96, 96, 96),
    parameters=31_189_806,
    gmacs=201.7,
    weights="none of this configuration; the public model zoo holds DynUNet bundles",
    results=(),
)
