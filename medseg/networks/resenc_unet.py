"""ResidualEncoderUNet: nnU-Net's network with a residual encoder, that of its "ResEnc" presets.

Paper: Isensee et al., "nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation", 2024,
MICCAI, arXiv 2404.09556.
Published code: MIC-DKFZ/dynamic-network-architectures (Apache-2.0). Arguments have the names of nnU-Net's plans where
the plans have them. Differences: those of `medseg.networks.plain_conv_unet`; bottleneck blocks and squeeze and
excitation, which nnU-Net's presets do not use, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, strided_window
from medseg.networks.layers.conv_unet import ConvUNet, Norm, StackedConvBlocks, StackedResidualBlocks, Stages, Style

_FEATURES, _STRIDES, _BLOCKS = (32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2), (1, 3, 4, 6, 6, 6)


class _Encoder(nn.Module):
    """A convolution at full resolution, then residual blocks at each level, the first of them with its stride."""

    def __init__(self, style: Style, stages: Stages, in_channels: int) -> None:
        super().__init__()
        channels = stages.features[0]
        self.stem = StackedConvBlocks(style, 1, in_channels, channels, stages.kernel_sizes[0], style.ones())
        levels = []
        for outputs, kernel, stride, count in zip(
            stages.features, stages.kernel_sizes, stages.strides, stages.depths, strict=True
        ):
            levels.append(StackedResidualBlocks(style, count, channels, outputs, kernel, stride))
            channels = outputs
        self.stages = nn.Sequential(*levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class ResidualEncoderUNet(ConvUNet):
    """nnU-Net's U-Net with residual blocks in the encoder.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        features_per_stage: channels of each level, full resolution first, the bottleneck last.
        kernel_sizes: of each level, one number or one per axis; one number for all.
        strides: of each level, one number or one per axis.
        n_blocks_per_stage: residual blocks of each level of the encoder, or one number for all.
        n_conv_per_stage_decoder: convolutions of each level of the decoder, the coarsest first.
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
        n_blocks_per_stage: Sequence[int] | int = _BLOCKS,
        n_conv_per_stage_decoder: Sequence[int] | int = 1,
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
        stages = Stages.of(spatial_dims, features_per_stage, kernel_sizes, strides, n_blocks_per_stage)
        super().__init__(
            "ResidualEncoderUNet",
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
    small = {
        "features_per_stage": [16, 32, 64, 96],
        "strides": [1, 2, 2, 2],
        "n_blocks_per_stage": [1, 2, 2, 2],
        "deep_supervision": True,
    }
    arguments = {"in_channels": in_channels, "out_channels": out_channels, "spatial_dims": len(size), **small, **given}
    stages = Stages.of(
        len(size),
        arguments["features_per_stage"],
        arguments.get("kernel_sizes", 3),
        arguments["strides"],
        arguments["n_blocks_per_stage"],
    )
    return Fit(arguments, strided_window(size, stages.divisor))


ENCODER = ("encoder.",)
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="ResidualEncoderUNet (nnU-Net ResEnc)",
    paper="Isensee et al., nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation, "
    "2024, MICCAI, arXiv 2404.09556",
    code="github.com/MIC-DKFZ/dynamic-network-architectures",
    code_license="Apache-2.0",
    spatial_dims=(3, 2),
    input_rule="each axis a multiple of the product of its strides, 32 by default; at least one axis larger",
    default={"in_channels": 1, "out_channels": 14},
    default_input=(1, 1, 128, 128, 128),
    parameters=102_359_430,
    gmacs=718.2,
    weights="every model folder of nnU-Net v2 trained with its ResEnc plans: medseg bundles import-nnunet",
    results=(),
)
