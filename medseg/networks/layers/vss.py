"""Visual state space blocks: a two-dimensional image scanned along four directions, and the encoder built of them.

Papers: Liu et al., "VMamba: Visual State Space Model", 2024, arXiv 2401.10166; the encoder as Swin-UMamba uses it (Liu
et al., 2024, arXiv 2402.03302). Features are channel-last, (B, H, W, C), between the blocks. Every layer norm has
eps 1e-5: the published block names 1e-6 as its default, but the published encoder hands it another class.

Module and parameter names are the published ones, so that published state dicts need no map.

Difference from the published code, none of it in the numbers: the four directions are not copied to four sequences.
Projections act on single positions, so they are computed once on the image as it lies, and `scan_directions` visits the
positions in four orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from einops import rearrange
from monai.networks.layers.drop_path import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.layers.selective_scan import scan_directions

DIRECTIONS = 4
STAGES = 4


class SS2D(nn.Module):
    """Selective scan over an image: along rows, along columns, and both backwards.

    Args:
        channels: C, width of the features.
        d_state: N, numbers in the state of each inner channel.

    Shape:
        x (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, channels: int, *, d_state: int = 16) -> None:
        super().__init__()
        inner, rank = 2 * channels, math.ceil(channels / 16)
        self.split = [rank, d_state, d_state]
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self._reset_scan()

    def _reset_scan(self) -> None:
        """Initial values as published: step sizes log-uniform in [0.001, 0.1], rates -1 .. -N."""
        inner, rank = self.dt_projs_weight.shape[1:]
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            dt = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(1e-3), math.log(0.1))).clamp_min(1e-4)
            self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of the softplus
            self.A_logs.copy_(torch.log(torch.arange(1, self.A_logs.shape[1] + 1)).expand_as(self.A_logs))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        features, gate = self.in_proj(x).chunk(2, dim=-1)
        features = F.silu(self.conv2d(rearrange(features, "b h w e -> b e h w")))
        sequence = rearrange(features, "b e h w -> b 1 (h w) e")
        projected = F.linear(sequence, self.x_proj_weight.flatten(0, 1))
        projected = rearrange(projected, "b 1 l (k p) -> b k l p", k=DIRECTIONS)
        dt_low, b, c = torch.split(projected, self.split, dim=-1)
        dt = torch.matmul(dt_low, self.dt_projs_weight.transpose(1, 2))
        per_direction = {"k": DIRECTIONS}
        y = scan_directions(
            sequence,
            dt,
            rearrange(-torch.exp(self.A_logs.float()), "(k e) n -> k e n", **per_direction),
            b,
            c,
            rearrange(self.Ds, "(k e) -> k e", **per_direction),
            self.dt_projs_bias,
            _scan_order(height, width, x.device),
        )
        y = rearrange(y.sum(1), "b (h w) e -> b h w e", h=height)
        y = self.out_norm(y.to(self.out_norm.weight.dtype))  # the scan is float32, the network may be half precision
        out: Tensor = self.out_proj(y * F.silu(gate))
        return out


def _scan_order(height: int, width: int, device: torch.device) -> Tensor:
    """The order of the positions h * width + w along rows, columns, rows backwards, columns backwards, (4, H * W)."""
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


class VSSBlock(nn.Module):
    """One visual state space block: norm, scan, residual; there is no MLP.

    Args:
        channels: C, width of the features.
        d_state: N of the scan.
        drop_path: probability that a sample skips the block in training.

    Shape:
        x (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, channels: int, *, d_state: int = 16, drop_path: float = 0.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels, eps=1e-5)
        self.self_attention = SS2D(channels, d_state=d_state)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop_path(self.self_attention(self.ln_1(x)))
        return out


class VSSStage(nn.Module):
    """Blocks of one width.

    Args:
        channels: C, width of the features.
        d_state: N of the scans.
        drop_paths: for each block, the probability that a sample skips it in training.

    Shape:
        x (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, channels: int, *, d_state: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(VSSBlock(channels, d_state=d_state, drop_path=p) for p in drop_paths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PatchEmbed(nn.Module):
    """Patches of the image to tokens.

    Shape:
        image (B, in_channels, H, W) -> (B, H / patch_size, W / patch_size, channels).
    """

    def __init__(self, in_channels: int, channels: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.norm(rearrange(self.proj(image), "b c h w -> b h w c"))
        return tokens


class PatchMerging(nn.Module):
    """Each 2 x 2 neighbourhood to one token of twice the width.

    Shape:
        x (B, H, W, C), H and W even -> (B, H / 2, W / 2, 2 C).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        # The published order of the four: top left, bottom left, top right, bottom right.
        merged: Tensor = self.reduction(self.norm(rearrange(x, "b (h p1) (w p2) c -> b h w (p2 p1 c)", p1=2, p2=2)))
        return merged


class VSSEncoder(nn.Module):
    """Four stages of visual state space blocks.

    Args:
        in_channels: channels of the input.
        patch_size: edge of a patch in pixels.
        depths: blocks per stage.
        dims: width per stage, each twice the one before.
        d_state: N of the scans.
        drop_path_rate: probability to skip the last block; it grows linearly from 0 at the first.

    Shape:
        image (B, in_channels, H, W), H and W divisible by 8 * patch_size -> the four stages' features, channel-first:
        (B, dims[i], H / s, W / s) with s = patch_size * 2**i.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        patch_size: int,
        depths: Sequence[int],
        dims: Sequence[int],
        d_state: int,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, dims[0], patch_size=patch_size)
        rates = drop_path_rates(depths, first=0.0, last=drop_path_rate)
        self.layers = nn.ModuleList(
            VSSStage(dim, d_state=d_state, drop_paths=stage) for dim, stage in zip(dims, rates, strict=True)
        )
        self.downsamples = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):  # all of them are without bias
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.patch_embed(image)
        stages = []
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else self.downsamples[i - 1](x))
            stages.append(rearrange(x, "b h w c -> b c h w"))
        return stages


def drop_path_rates(depths: Sequence[int], *, first: float, last: float) -> list[list[float]]:
    """Rates that change linearly from block to block, one list for each stage.

    Args:
        depths: blocks per stage.
        first: rate of the first block of all.
        last: rate of the last.
    """
    final = max(1, sum(depths) - 1)
    rates = iter([((final - i) * first + i * last) / final for i in range(sum(depths))])
    return [list(itertools.islice(rates, depth)) for depth in depths]


def check_image(image: Tensor, *, in_channels: int, divisor: int) -> None:
    """Refuse an image that the network cannot take.

    Args:
        image: input (B, in_channels, H, W).
        in_channels: the channels that the network was built for.
        divisor: what H and W must be multiples of.

    Raises:
        ValueError: another number of axes or channels, no image at all, or a size that is no multiple.
    """
    if image.ndim != 4:
        raise ValueError(f"image must have four axes (B, C, H, W), got shape {tuple(image.shape)}")
    if image.shape[0] == 0:
        raise ValueError("batch must hold at least one image, got 0")
    if image.shape[1] != in_channels:
        raise ValueError(f"channels must be {in_channels} as configured, got {image.shape[1]}")
    for axis, size in zip(("height", "width"), image.shape[2:], strict=True):
        if size == 0 or size % divisor:
            raise ValueError(f"{axis} must be a positive multiple of {divisor}, got {size}")


def check_stages(depths: Sequence[int], dims: Sequence[int]) -> None:
    """Refuse an encoder configuration that cannot be built.

    Args:
        depths: blocks per stage.
        dims: width per stage.

    Raises:
        ValueError: not four stages, a stage without blocks, or a width that is not twice the one before.
    """
    if len(depths) != STAGES or min(depths) < 1:
        raise ValueError(f"encoder_depths must be {STAGES} numbers of at least 1, got {tuple(depths)}")
    if len(dims) != STAGES or dims[0] < 1 or any(b != 2 * a for a, b in itertools.pairwise(dims)):
        raise ValueError(f"encoder widths must be {STAGES} numbers, each twice the one before, got {tuple(dims)}")
