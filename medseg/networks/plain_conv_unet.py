"""PlainConvUNet: nnU-Net's default network.

Paper: Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
2021, Nature Methods 18; preprint 2019, arXiv 1904.08128.
Published code: MIC-DKFZ/dynamic-network-architectures (Apache-2.0). Arguments have the names of nnU-Net's plans where
the plans have them. Differences: each tensor has one name, see `medseg.networks.layers.conv_unet`; norm and
nonlinearity are chosen by words; deep supervision gives all levels at full size, and in training only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, strided_window
from medseg.networks.layers.conv_unet import ConvUNet, Norm, StackedConvBlocks, Stages, Style

_FEATURES, _STRIDES = (32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2)


class _Encoder(nn.Module):
    """Stacked convolutions at each level, the first of them with the level's stride."""

    def __init__(self, style: Style, stages: Stages, in_channels: int) -> None:
        super().__init__()
        levels, channels = [], in_channels
        for outputs, kernel, stride, count in zip(
            stages.features, stages.kernel_sizes, stages.strides, stages.depths, strict=True
        ):
            levels.append(nn.Sequential(StackedConvBlocks(style, count, channels, outputs, kernel, stride)))
            channels = outputs
        self.stages = nn.Sequential(*levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class PlainConvUNet(ConvUNet):
    """nnU-Net's U-Net of plain convolutions.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        features_per_stage: channels of each level, full resolution first, the bottleneck last.
        kernel_sizes: of each level, one number or one per axis; one number for all.
        strides: of each level, one number or one per axis.
        n_conv_per_stage: convolutions of each level of the encoder, or one number for all.
        n_conv_per_stage_decoder: of each level of the decoder, the coarsest first.
        spatial_dims: 2 or 3.
        conv_bias: whether convolutions have a bias.
        norm: instance or batch.
        norm_eps: added to the variance.
        norm_affine: whether the norm scales and shifts.
        negative_slope: of the leaky ReLU; 0 for a ReLU.
        deep_supervision: in training give the logits of all levels.

    Shape:
        as `ConvUNet`.

    Raises:
        ValueError: a configuration that has no such network, or an image of another size or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        features_per_stage: Sequence[int] = _FEATURES,
        *,
        kernel_sizes: Sequence[Sequence[int] | int] | int = 3,
        strides: Sequence[Sequence[int] | int] = _STRIDES,
        n_conv_per_stage: Sequence[int] | int = 2,
        n_conv_per_stage_decoder: Sequence[int] | int = 2,
        spatial_dims: int = 3,
        conv_bias: bool = True,
        norm: Norm = "instance",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        negative_slope: float = 0.01,
        deep_supervision: bool = False,
    ) -> None:
        style = Style(
            spatial_dims=spatial_dims,
            conv_bias=conv_bias,
            norm=norm,
            norm_eps=norm_eps,
            norm_affine=norm_affine,
            negative_slope=negative_slope,
        )
        stages = Stages.of(spatial_dims, features_per_stage, kernel_sizes, strides, n_conv_per_stage)
        super().__init__(
            "PlainConvUNet",
            style,
            stages,
            _Encoder(style, stages, in_channels),
            in_channels=in_channels,
            out_channels=out_channels,
            decoder_depths=n_conv_per_stage_decoder,
            deep_supervision=deep_supervision,
        )


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for a window that covers `size`; by default with deep supervision, four levels."""
    small = {"features_per_stage": [16, 32, 64, 96], "strides": [1, 2, 2, 2], "deep_supervision": True}
    arguments = {"in_channels": in_channels, "out_channels": out_channels, "spatial_dims": len(size), **small, **given}
    stages = Stages.of(
        len(size),
        arguments["features_per_stage"],
        arguments.get("kernel_sizes", 3),
        arguments["strides"],
        arguments.get("n_conv_per_stage", 2),
    )
    return Fit(arguments, strided_window(size, stages.divisor))


ENCODER = ("encoder.",)
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="PlainConvUNet (nnU-Net)",
    paper="Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation, "
    "2021, Nature Methods 18; preprint 2019, arXiv 1904.08128",
    code="github.com/MIC-DKFZ/dynamic-network-architectures",
    code_license="Apache-2.0",
    spatial_dims=(3, 2),
    input_rule="each axis a multiple of the product of its strides, 32 by default; at least one axis larger",
    default={"in_channels": 1, "out_channels": 14},
    default_input=(1, 1, 128, 128, 128),
    parameters=31_205_254,
    gmacs=478.0,
    weights="every model folder of nnU-Net v2 trained with its default plans: medseg bundles import-nnunet",
    results=(),
)
