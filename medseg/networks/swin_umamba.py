"""Swin-UMamba: a visual state space encoder that starts from ImageNet weights, with a U-Net's convolutional decoder.

Paper: Liu et al., "Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining", 2024, arXiv 2402.03302.
Published code: JiarunLiu/Swin-UMamba (Apache-2.0), nnU-Net v2 fork, commit 2c1f72e. The network is 2D.

Differences from the published code: outputs are a tuple instead of a list; the encoder's drop path rate is fixed at
0.2, which the published code uses whatever its own argument says; only instance norm and residual blocks, the
published values, are offered. The convolutional blocks are MONAI's, as in the published code. Instance norms are group
norms of one channel each: the same function, and several times faster in PyTorch on a CPU.

Checkpoint layout: this module's own names are the published ones. Weights that load: checkpoints of the authors'
trainers, VMamba-tiny for the encoder (see `medseg.checkpoints.swin_umamba`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up
from medseg.networks.layers.vss import VSSEncoder, check_image, check_stages

_STEM_STRIDE, _PATCH_SIZE = 2, 2
_DIVISOR = 32  # stem 2, patches 2, three mergings


class SwinUMamba(nn.Module):
    """Swin-UMamba.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        feature_sizes: channels of the convolutional path at scales 1, 1/2, 1/4, 1/8, 1/16.
        hidden_size: channels at 1/32; the encoder's last width.
        encoder_depths: blocks in each of the encoder's four stages.
        encoder_dims: their widths; equal to `feature_sizes[1:]`.
        d_state: size of the scans' state.
        norm: "instance" is the only published value.
        residual_blocks: True is the only published value.
        deep_supervision: give the outputs at 1/2, 1/4 and 1/8 too, in training and in evaluation.

    Shape:
        image (B, in_channels, H, W), H and W multiples of 32 -> logits (B, out_channels, H, W); with deep supervision
        the tuple of those and the ones at 1/2, 1/4 and 1/8.

    Raises:
        ValueError: a configuration that is not consistent, or an image of another size.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        *,
        feature_sizes: Sequence[int] = (48, 96, 192, 384, 768),
        hidden_size: int = 768,
        encoder_depths: Sequence[int] = (2, 2, 9, 2),
        encoder_dims: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 16,
        norm: str = "instance",
        residual_blocks: bool = True,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("d_state", d_state)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_stages(encoder_depths, encoder_dims)
        if len(feature_sizes) != 5 or feature_sizes[0] < 1 or tuple(feature_sizes[1:]) != tuple(encoder_dims):
            raise ValueError(
                f"feature_sizes must be five numbers, the last four equal to encoder_dims {tuple(encoder_dims)},"
                f" got {tuple(feature_sizes)}"
            )
        if hidden_size != encoder_dims[-1]:
            raise ValueError(f"hidden_size must equal the last of encoder_dims, {encoder_dims[-1]}, got {hidden_size}")
        if norm != "instance":
            raise ValueError(f"norm must be 'instance', got {norm!r}")
        if not residual_blocks:
            raise ValueError("residual_blocks must be True, got False")
        self.in_channels = in_channels
        self.deep_supervision = deep_supervision
        f = tuple(feature_sizes)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, f[0], 7, stride=_STEM_STRIDE, padding=3),
            nn.GroupNorm(f[0], f[0], eps=1e-5),
        )
        self.vssm_encoder = VSSEncoder(
            f[0], patch_size=_PATCH_SIZE, depths=encoder_depths, dims=encoder_dims, d_state=d_state
        )
        self.encoder1 = _residual(in_channels, f[0])
        self.encoder2 = _residual(f[0], f[1])
        self.encoder3 = _residual(f[1], f[2])
        self.encoder4 = _residual(f[2], f[3])
        self.encoder5 = _residual(f[3], f[4])
        self.decoder6 = _up(hidden_size, f[4])
        self.decoder5 = _up(f[4], f[3])
        self.decoder4 = _up(f[3], f[2])
        self.decoder3 = _up(f[2], f[1])
        self.decoder2 = _up(f[1], f[0])
        self.decoder1 = _residual(f[0], f[0])
        # All four heads are part of the published state dict, deep supervision or not.
        self.out_layers = nn.ModuleList(UnetOutBlock(2, channels, out_channels) for channels in f[:4])

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_image(image, in_channels=self.in_channels, divisor=_DIVISOR)
        half = self.stem(image)
        v1, v2, v3, v4 = self.vssm_encoder(half)
        x = self.decoder6(v4, self.encoder5(v3))
        d3 = self.decoder5(x, self.encoder4(v2))
        d2 = self.decoder4(d3, self.encoder3(v1))
        d1 = self.decoder3(d2, self.encoder2(half))
        d0 = self.decoder1(self.decoder2(d1, self.encoder1(image)))
        logits: Tensor = self.out_layers[0](d0)
        if not self.deep_supervision:
            return logits
        coarser = (head(d) for head, d in zip(self.out_layers[1:], (d1, d2, d3), strict=True))
        return (logits, *coarser)


def _residual(in_channels: int, out_channels: int) -> UnetrBasicBlock:
    norm = _instance_norm(out_channels)
    return UnetrBasicBlock(2, in_channels, out_channels, kernel_size=3, stride=1, norm_name=norm, res_block=True)


def _up(in_channels: int, out_channels: int) -> UnetrUpBlock:
    norm = _instance_norm(out_channels)
    return UnetrUpBlock(
        2, in_channels, out_channels, kernel_size=3, upsample_kernel_size=2, norm_name=norm, res_block=True
    )


def _instance_norm(channels: int) -> tuple[str, dict[str, float]]:
    """Instance norm without weights, as MONAI's blocks take it."""
    return "group", {"num_groups": channels, "affine": False, "eps": 1e-5}


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for slices that cover `size`."""
    return Fit({"in_channels": in_channels, "out_channels": out_channels, **given}, round_up(size, _DIVISOR))


ENCODER = ("vssm_encoder.layers.", "vssm_encoder.downsamples.")
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them. As published, the patch
embedding learns from the start."""

FACTS = Facts(
    title="Swin-UMamba",
    paper="Liu et al., Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining, 2024, arXiv 2402.03302",
    code="github.com/JiarunLiu/Swin-UMamba",
    code_license="Apache-2.0",
    spatial_dims=(2,),
    input_rule="height and width multiples of 32",
    default={"in_channels": 1, "out_channels": 14},
    default_input=(1, 1, 320, 320),
    parameters=59_889_368,
    gmacs=64.2,
    weights="linked from the README of github.com/JiarunLiu/Swin-UMamba (checkpoint_99.pth, AbdomenMRI)",
    results=(
        ("AbdomenMRI, 13 organs, started from ImageNet", "Dice 77.60 %, NSD 84.21 %"),
        ("Endoscopy (EndoVis17), started from ImageNet", "Dice 67.67 %, NSD 69.22 %"),
        ("Microscopy (NeurIPS cells), started from ImageNet", "F1 0.5806"),
    ),
)
