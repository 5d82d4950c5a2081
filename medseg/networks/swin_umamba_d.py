"""Swin-UMamba-D (Swin-UMamba† in the paper): visual state space blocks in the encoder and in the decoder.

Paper: Liu et al., "Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining", 2024, arXiv 2402.03302.
Published code: JiarunLiu/Swin-UMamba (Apache-2.0), nnU-Net v2 fork, commit 2c1f72e. The network is 2D.

Differences from the published code: outputs are a tuple instead of a list.

Checkpoint layout: this module's own names are the published ones. Weights that load: checkpoints of the authors'
trainers, VMamba-tiny for the encoder (see `medseg.checkpoints.swin_umamba_d`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up
from medseg.networks.layers.vss import VSSEncoder, VSSStage, check_image, check_stages, drop_path_rates

_PATCH_SIZE = 4
_DROP_PATH = 0.2


class SwinUMambaD(nn.Module):
    """Swin-UMamba-D.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        patch_size: edge of a patch in pixels; 4, since the decoder's last step enlarges by 4.
        encoder_depths: blocks in each of the encoder's four stages.
        dims: their widths.
        decoder_depths: blocks in each of the decoder's three stages, coarsest first.
        d_state: size of the scans' state; None chooses by width: ceil(dims[0] / 6) in the encoder, ceil(C / 3) in a
            decoder stage of width C.
        deep_supervision: give the outputs at 1/4, 1/8 and 1/16 too, in training and in evaluation.

    Shape:
        image (B, in_channels, H, W), H and W multiples of 32 -> logits (B, out_channels, H, W); with deep supervision
        the tuple of those and the ones at 1/4, 1/8 and 1/16.

    Raises:
        ValueError: a configuration that is not consistent, or an image of another size.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 14,
        *,
        patch_size: int = 4,
        encoder_depths: Sequence[int] = (2, 2, 9, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        decoder_depths: Sequence[int] = (2, 2, 2),
        d_state: int | None = 16,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("d_state", d_state)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if patch_size != _PATCH_SIZE:
            raise ValueError(f"patch_size must be {_PATCH_SIZE}, got {patch_size}")
        check_stages(encoder_depths, dims)
        if len(decoder_depths) != 3 or min(decoder_depths) < 1:
            raise ValueError(f"decoder_depths must be three numbers of at least 1, got {tuple(decoder_depths)}")
        self.in_channels = in_channels
        self.divisor = patch_size * 8
        self.vssm_encoder = VSSEncoder(
            in_channels,
            patch_size=patch_size,
            depths=encoder_depths,
            dims=dims,
            d_state=math.ceil(dims[0] / 6) if d_state is None else d_state,
            drop_path_rate=_DROP_PATH,
        )
        self.decoder = VSSDecoder(
            out_channels, dims=dims, depths=decoder_depths, d_state=d_state, deep_supervision=deep_supervision
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        check_image(image, in_channels=self.in_channels, divisor=self.divisor)
        outputs: tuple[Tensor, ...] = self.decoder(self.vssm_encoder(image))
        return outputs if len(outputs) > 1 else outputs[0]


class VSSDecoder(nn.Module):
    """Patch expansion, skip connection and visual state space blocks, from 1/32 up to the image's size.

    Args:
        out_channels: classes including background.
        dims: widths of the encoder's stages.
        depths: blocks in each of the three stages, coarsest first.
        d_state: size of the scans' state; None for ceil(C / 3) at width C.
        deep_supervision: evaluate the coarser heads too.

    Shape:
        The encoder's four stages, (B, dims[i], H / 2**(2 + i), W / 2**(2 + i)) -> tuple of the logits
        (B, out_channels, H, W) and, with deep supervision, those at 1/4, 1/8 and 1/16.
    """

    def __init__(
        self,
        out_channels: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        d_state: int | None,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        widths = tuple(reversed(dims))
        rates = drop_path_rates(depths, first=_DROP_PATH, last=0.0)
        self.expand_layers = nn.ModuleList(PatchExpand(c, c // 2, factor=2) for c in widths[:-1])
        self.expand_layers.append(PatchExpand(dims[0], dims[0], factor=_PATCH_SIZE))
        self.concat_back_dim = nn.ModuleList(nn.Linear(2 * c, c) for c in widths[1:])
        self.stages = nn.ModuleList(
            VSSStage(c, d_state=math.ceil(c / 3) if d_state is None else d_state, drop_paths=stage)
            for c, stage in zip(widths[1:], rates, strict=True)
        )
        # All four heads are part of the published state dict, deep supervision or not.
        self.seg_layers = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in (*widths[1:], dims[0]))

    def forward(self, stages: list[Tensor]) -> tuple[Tensor, ...]:
        *skips, coarsest = stages
        x = rearrange(coarsest, "b c h w -> b h w c")
        outputs: list[Tensor] = []
        for i, skip in enumerate(reversed(skips)):
            x = torch.cat([self.expand_layers[i](x), rearrange(skip, "b c h w -> b h w c")], dim=-1)
            x = self.stages[i](self.concat_back_dim[i](x))
            if self.deep_supervision:
                outputs.insert(0, self.seg_layers[i](rearrange(x, "b h w c -> b c h w")))
        x = rearrange(self.expand_layers[-1](x), "b h w c -> b c h w")
        return (self.seg_layers[-1](x), *outputs)


class PatchExpand(nn.Module):
    """Each token to `factor` x `factor` tokens.

    Shape:
        x (B, H, W, in_channels) -> (B, factor * H, factor * W, out_channels).
    """

    def __init__(self, in_channels: int, out_channels: int, *, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(in_channels, factor**2 * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        p = self.factor
        x = rearrange(self.expand(x), "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=p, p2=p)
        out: Tensor = self.norm(x)
        return out


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for slices that cover `size`."""
    return Fit({"in_channels": in_channels, "out_channels": out_channels, **given}, round_up(size, _PATCH_SIZE * 8))


ENCODER = ("vssm_encoder.layers.", "vssm_encoder.downsamples.")
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them. As published, the patch
embedding learns from the start."""

FACTS = Facts(
    title="Swin-UMamba-D",
    paper="Liu et al., Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining, 2024, arXiv 2402.03302",
    code="github.com/JiarunLiu/Swin-UMamba",
    code_license="Apache-2.0",
    spatial_dims=(2,),
    input_rule="height and width multiples of 32",
    default={"in_channels": 1, "out_channels": 14},
    default_input=(1, 1, 320, 320),
    parameters=27_497_720,
    gmacs=13.1,
    weights="linked from the README of github.com/JiarunLiu/Swin-UMamba (checkpoint_99.pth, AbdomenMRI)",
    results=(
        ("AbdomenMRI, 13 organs, started from ImageNet", "Dice 77.05 %, NSD 83.76 %"),
        ("Endoscopy (EndoVis17), started from ImageNet", "Dice 67.83 %, NSD 69.33 %"),
        ("Microscopy (NeurIPS cells), started from ImageNet", "F1 0.5982"),
    ),
)
