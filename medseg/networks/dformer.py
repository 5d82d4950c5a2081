"""D-Former: a U-shaped 3D transformer with local windows and dilated groups in turn.

Paper: Wu et al., "D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation", Neural Computing and
Applications 2022, arXiv 2201.00462.
Published code: kkk55596/D-Former, no licence, no weights; written from a description of its function. Module names are
those of its state dict, so that its checkpoints load without a map.
Differences: `num_classes` and `embed_dim` are honoured (fixed at 14 and 96 there); the choice of groups depends on the
input of the call alone (there a small input changes the network for later ones); heads run before voxels are
rearranged, and the third head, whose result the published code drops, is not run. Sizes that fail there are refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from monai.networks.layers.drop_path import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up
from medseg.networks.layers.window import dilated_partition, dilated_reverse, window_partition, window_reverse

LEVELS = 4
_AXES = ("depth", "height", "width")
_PADDING_LOGIT = -1e6


class PatchEmbed(nn.Module):
    """One token for each patch of the image.

    Shape:
        image (B, in_channels, D, H, W) -> tokens (B, D/pd, H/ph, W/pw, embed_dim).
    """

    def __init__(self, in_channels: int, embed_dim: int, patch_size: Sequence[int], *, norm: bool) -> None:
        super().__init__()
        kernel = (patch_size[0], patch_size[1], patch_size[2])
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel, stride=kernel)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        tokens: Tensor = self.norm(rearrange(self.proj(image), "b c d h w -> b d h w c"))
        return tokens


class PositionBlock(nn.Module):
    """Dynamic position encoding: a depthwise convolution beside the identity.

    Shape:
        tokens (B, D, H, W, C) -> same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv3d(dim, dim, 3, padding=1, groups=dim))

    def forward(self, x: Tensor) -> Tensor:
        encoding: Tensor = rearrange(self.proj(rearrange(x, "b d h w c -> b c d h w")), "b c d h w -> b d h w c")
        return x + encoding


class GroupAttention(nn.Module):
    """Multi-head attention within groups of tokens, without position bias.

    Shape:
        tokens (groups, N, C), optionally logits to add to the keys (groups, 1, 1, N) -> (groups, N, C).
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, key_logits: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "g n (three h c) -> three g h n c", three=3, h=self.num_heads)
        if key_logits is not None:  # under autocast, half precision must not turn them into infinities
            key_logits = key_logits.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=key_logits)
        attended: Tensor = self.proj(rearrange(x, "g h n c -> g n (h c)"))
        return attended


class MLP(nn.Module):
    """Two linear layers with exact GELU.

    Shape:
        tokens (..., C) -> same.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Transformer block, of local scope (windows of neighbours) or global scope (dilated groups).

    Args:
        dim: channels.
        num_heads: attention heads.
        group_size: tokens of a group per axis.
        interval: the level's nominal dilation. Global scope pads the grid to its multiples; the dilation itself follows
            from grid and group size, as in the published code.
        dilated: global scope.
        mlp_ratio: hidden channels of the MLP as a multiple of `dim`.
        qkv_bias: bias of the query, key and value projection.
        drop_path: probability of dropping a branch in training.

    Shape:
        tokens (B, D, H, W, C) -> same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group_size: Sequence[int],
        interval: int,
        dilated: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.group_size, self.interval, self.dilated = tuple(group_size), interval, dilated
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attend(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def attend(self, x: Tensor) -> Tensor:
        """Attention of tokens (B, D, H, W, C), normalised; the same shape comes back."""
        grid = tuple(x.shape[1:4])
        # A grid lower than a group is one group, whatever the block's scope. The published code looks at H only.
        whole = grid[1] < self.group_size[1]
        group, dilated = (grid, False) if whole else (self.group_size, self.dilated)
        padded = padded_grid(grid, (self.interval,) * 3 if dilated else group)
        # Padding follows the norm, so that padded tokens enter the projection as exact zeros.
        x = F.pad(x, [0, 0, *(edge for n, m in zip(grid[::-1], padded[::-1], strict=True) for edge in (0, m - n))])
        # The published code does not mask padding of D alone in global scope.
        masked = padded[1:] != grid[1:] if dilated else padded != grid
        if dilated:
            interval = tuple(n // g for n, g in zip(padded, group, strict=True))
            logits = _key_logits(x, grid, interval, dilated=True) if masked else None
            x = dilated_reverse(self.attn(dilated_partition(x, interval), logits), interval, padded)
        else:
            logits = _key_logits(x, grid, group, dilated=False) if masked else None
            x = window_reverse(self.attn(window_partition(x, group), logits), group, padded)
        return x[:, : grid[0], : grid[1], : grid[2]]


class PatchMerging(nn.Module):
    """Halve the grid: the eight tokens of each 2x2x2 cube become one of twice the channels.

    Shape:
        tokens (B, D, H, W, C), D, H, W even -> (B, D/2, H/2, W/2, 2C).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b (d pd) (h ph) (w pw) c -> b d h w (pd ph pw c)", pd=2, ph=2, pw=2)
        merged: Tensor = self.reduction(self.norm(x))
        return merged


class PatchExpand(nn.Module):
    """Refine the grid: each token becomes a block of tokens.

    The norm acts on channels only and so commutes with the rearrangement, which comes last.

    Args:
        dim: channels of a token.
        scale: block edge per axis.
        out_dim: channels of a token of the block.

    Shape:
        tokens (B, D, H, W, dim) -> (B, sd D, sh H, sw W, out_dim).
    """

    def __init__(self, dim: int, scale: Sequence[int], out_dim: int) -> None:
        super().__init__()
        self.scale = tuple(scale)
        self.expand = nn.Linear(dim, math.prod(scale) * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        d, h, w = self.scale
        fine: Tensor = rearrange(self.blocks(x), "b d h w (pd ph pw) c -> b (d pd) (h ph) (w pw) c", pd=d, ph=h, pw=w)
        return fine

    def blocks(self, x: Tensor) -> Tensor:
        """The tokens (B, D, H, W, dim) as normalised blocks (B, D, H, W, block, out_dim), before rearrangement."""
        blocks: Tensor = self.norm(self.expand(x).unflatten(-1, (math.prod(self.scale), -1)))
        return blocks


class Head(nn.Sequential):
    """Tokens to logits at `patch_size` times the grid's resolution.

    The classifier runs before the voxels are rearranged: classes are fewer than channels.

    Shape:
        tokens (B, D, H, W, C) -> logits (B, num_classes, pd D, ph H, pw W).
    """

    def __init__(self, dim: int, patch_size: Sequence[int], num_classes: int) -> None:
        super().__init__(PatchExpand(dim, patch_size, dim), nn.Conv3d(dim, num_classes, 1, bias=False))
        self.patch_size = tuple(patch_size)

    def forward(self, x: Tensor) -> Tensor:
        expand, classifier = cast("tuple[PatchExpand, nn.Conv3d]", tuple(self))
        x = F.linear(expand.blocks(x), classifier.weight.flatten(1))
        d, h, w = self.patch_size
        logits: Tensor = rearrange(x, "b d h w (pd ph pw) k -> b k (d pd) (h ph) (w pw)", pd=d, ph=h, pw=w)
        return logits


class Stage(nn.Module):
    """Position encoding and the blocks of one level, then a change of resolution.

    Shape:
        tokens (B, D, H, W, C) -> same, or (B, D/2, H/2, W/2, 2C) with `downsample`, (B, 2D, 2H, 2W, C/2) with
        `upsample`.
    """

    def __init__(
        self, dim: int, blocks: Sequence[Block], *, downsample: bool, upsample: bool, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.pos_block = PositionBlock(dim)
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim) if downsample else nn.Identity()
        self.upsample = PatchExpand(dim, (2, 2, 2), dim // 2) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_block(x)
        for block in self.blocks:
            recompute = self.use_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        out: Tensor = self.upsample(self.downsample(x))
        return out


class Backbone(nn.Module):
    """Encoder and decoder; their token grids are halved three times and restored.

    Shape:
        image (B, in_channels, D, H, W) -> tokens at the patch grid (B, D/pd, H/ph, W/pw, E) and at half of it
        (B, ..., 2E).
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        patch_size: Sequence[int],
        group_size: Sequence[int],
        intervals: Sequence[int],
        mlp_ratio: float,
        qkv_bias: bool,
        patch_norm: bool,
        drop_path: float,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**level for level in range(LEVELS)]
        rates = (drop_path * index / max(1, sum(depths) - 1) for index in range(sum(depths)))
        rates_of = [[next(rates) for _ in range(depth)] for depth in depths]

        def stage(level: int, *, downsample: bool = False, upsample: bool = False) -> Stage:
            blocks = [
                Block(
                    dims[level],
                    num_heads[level],
                    group_size=group_size,
                    interval=intervals[level],
                    dilated=index % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path=rate,
                )
                for index, rate in enumerate(rates_of[level])
            ]
            return Stage(dims[level], blocks, downsample=downsample, upsample=upsample, use_checkpoint=use_checkpoint)

        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size, norm=patch_norm)
        self.layers = nn.ModuleList([stage(level, downsample=level < 3) for level in range(LEVELS)])
        self.norm = nn.LayerNorm(dims[3])
        up = [PatchExpand(dims[3], (2, 2, 2), dims[2])]
        self.layers_up = nn.ModuleList([*up, *(stage(level, upsample=level > 0) for level in (2, 1, 0))])
        back = [nn.Linear(2 * dims[level], dims[level]) for level in (2, 1, 0)]
        self.concat_back_dim = nn.ModuleList([nn.Identity(), *back])
        self.norm_up = nn.LayerNorm(embed_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(image)
        skips = []
        for layer in self.layers:
            skips.append(x)  # the input of the level, before its position encoding
            x = layer(x)
        grown = [self.layers_up[0](self.norm(x))]
        for layer, back, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], skips[2::-1], strict=True):
            grown.append(layer(back(torch.cat([grown[-1], skip], dim=-1))))
        _, half, _, full = grown
        return self.norm_up(full), half


class DFormer(nn.Module):
    """D-Former.

    Args:
        in_channels: image channels.
        num_classes: classes including background.
        embed_dim: channels at the patch grid; doubled at each of the three lower levels.
        depths: transformer blocks of each level, the same in the encoder and the decoder.
        num_heads: attention heads of each level.
        patch_size: voxels of a token per axis (D, H, W).
        group_size: tokens of an attention group per axis (D, H, W).
        intervals: nominal dilation of each level; it decides padding only, and the default pads no legal size.
        mlp_ratio: hidden channels of the MLPs as a multiple of the channels.
        qkv_bias: bias of the query, key and value projections.
        patch_norm: layer norm after the patch embedding.
        drop_path: stochastic depth, from 0 at the first encoder block to this at the last, in training.
        deep_supervision: also return logits at half resolution, in training and in inference. The parameters are the
            same without it.
        use_checkpoint: recompute blocks in the backward pass to save memory.

    Shape:
        image (B, in_channels, D, H, W) -> logits (B, num_classes, D, H, W), or with deep supervision the pair of these
        and logits (B, num_classes, D/2, H/2, W/2). See `check_roi_size` for the legal sizes.

    Raises:
        ValueError: a configuration that has no such network, or an image of another size or channel count.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 14,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        patch_size: Sequence[int] = (2, 4, 4),
        group_size: Sequence[int] = (2, 8, 8),
        intervals: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        drop_path: float = 0.0,
        deep_supervision: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes), ("embed_dim", embed_dim)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name, values, length in (
            ("depths", depths, LEVELS),
            ("num_heads", num_heads, LEVELS),
            ("intervals", intervals, LEVELS),
            ("patch_size", patch_size, 3),
            ("group_size", group_size, 3),
        ):
            if len(values) != length or min(values) < 1:
                raise ValueError(f"{name} must be {length} positive numbers, got {tuple(values)}")
        for level, heads in enumerate(num_heads):
            if (embed_dim * 2**level) % heads:
                raise ValueError(
                    f"num_heads: level {level} has {embed_dim * 2**level} channels, not a multiple of {heads} heads"
                )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be from 0 to below 1, got {drop_path}")
        self.in_channels, self.deep_supervision = in_channels, deep_supervision
        self.depths, self.intervals = tuple(depths), tuple(intervals)
        self.patch_size, self.group_size = tuple(patch_size), tuple(group_size)
        self.model_down = Backbone(
            in_channels,
            embed_dim,
            depths,
            num_heads,
            patch_size=patch_size,
            group_size=group_size,
            intervals=intervals,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            patch_norm=patch_norm,
            drop_path=drop_path,
            use_checkpoint=use_checkpoint,
        )
        # The third head is in every published state dict; its result is dropped there and not computed here.
        self.final = nn.ModuleList([Head(embed_dim * 2**level, patch_size, num_classes) for level in range(3)])
        # What is not computed gets no gradient, and says so to optimisers and distributed training.
        self.final[1].requires_grad_(deep_supervision)
        self.final[2].requires_grad_(requires_grad=False)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._check_input(image)
        tokens, half_tokens = self.model_down(image)
        full: Tensor = self.final[0](tokens)
        if not self.deep_supervision:
            return full
        half: Tensor = self.final[1](half_tokens)
        return full, half

    def check_roi_size(self, roi_size: Sequence[int]) -> None:
        """Refuse a window that this network cannot take.

        Args:
            roi_size: size per axis in voxels (D, H, W).

        Raises:
            ValueError: an axis is no positive multiple of 8 patches, or its tokens at some level do not divide into
                dilated groups.
        """
        for axis, size, patch in zip(_AXES, roi_size, self.patch_size, strict=True):
            step = patch * 2 ** (LEVELS - 1)
            if size < step or size % step:
                raise ValueError(f"D-Former: {axis} must be a positive multiple of {step}, got {size}")
        for level, (depth, interval) in enumerate(zip(self.depths, self.intervals, strict=True)):
            grid = [size // patch // 2**level for size, patch in zip(roi_size, self.patch_size, strict=True)]
            if depth < 2 or grid[1] < self.group_size[1]:
                continue  # no block of global scope, or one group of the whole grid
            padded = padded_grid(grid, (interval,) * 3)
            for axis, size, tokens, group in zip(_AXES, roi_size, padded, self.group_size, strict=True):
                if tokens < group or tokens % (tokens // group):
                    raise ValueError(
                        f"D-Former: {axis} {size} gives {tokens} tokens at level {level}, "
                        f"which do not divide into dilated groups of {group}"
                    )

    def _check_input(self, image: Tensor) -> None:
        if image.ndim != 5:
            raise ValueError(f"D-Former: image must have 5 axes (B, C, D, H, W), got shape {tuple(image.shape)}")
        if image.shape[1] != self.in_channels:
            raise ValueError(f"D-Former: image must have {self.in_channels} channels, got {image.shape[1]}")
        self.check_roi_size(image.shape[2:])


def padded_grid(grid: Sequence[int], multiple: Sequence[int]) -> tuple[int, ...]:
    """The grid (D, H, W), each axis rounded up to its multiple."""
    return tuple(math.ceil(n / m) * m for n, m in zip(grid, multiple, strict=True))


def _key_logits(x: Tensor, grid: Sequence[int], edges: Sequence[int], *, dilated: bool) -> Tensor:
    """Logits (groups, 1, 1, N) that take padded tokens out of the softmax.

    Args:
        x: padded tokens (B, D, H, W, C).
        grid: the grid without padding; padding is at the end.
        edges: window size or interval per axis.
        dilated: `edges` are intervals.
    """
    padding = x.new_full((1, *x.shape[1:4], 1), max(_PADDING_LOGIT, torch.finfo(x.dtype).min))
    padding[:, : grid[0], : grid[1], : grid[2]] = 0
    groups = (dilated_partition if dilated else window_partition)(padding, edges)
    return rearrange(groups, "g n 1 -> g 1 1 n").repeat(x.shape[0], 1, 1, 1)


def _initialise(module: nn.Module) -> None:
    """Truncated normal weights of the linear layers; convolutions and norms keep PyTorch's own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for the smallest legal window that covers `size`.

    Raises:
        ValueError: `given` has no such network, or no window near `size` is legal.
    """
    arguments = {"in_channels": in_channels, "num_classes": out_channels, **given}
    with torch.device("meta"):
        network = DFormer(**arguments)
    steps = [patch * 2 ** (LEVELS - 1) for patch in network.patch_size]
    start = [round_up((n,), step)[0] for n, step in zip(size, steps, strict=True)]
    larger = itertools.product(*([n + more * step for more in range(5)] for n, step in zip(start, steps, strict=True)))
    for window in sorted(larger, key=math.prod):
        try:
            network.check_roi_size(window)
        except ValueError:
            continue
        return Fit(arguments, tuple(window))
    raise ValueError(f"D-Former: no legal window near {tuple(size)} with groups of {network.group_size}")


ENCODER = ("model_down.patch_embed.", "model_down.layers.", "model_down.norm.")
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="D-Former",
    paper="Wu et al., D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation, 2022, "
    "arXiv 2201.00462",
    code="github.com/kkk55596/D-Former",
    code_license="none",
    spatial_dims=(3,),
    input_rule="depth a multiple of 16, height and width of 32, and tokens that divide into dilated groups: with "
    "the default groups 32, 64, 96, 128, 160, 192, 256, ... but not 224",
    default={"in_channels": 1, "num_classes": 14},
    default_input=(1, 1, 64, 128, 128),
    parameters=50_557_248,
    gmacs=57.9,
    weights="the authors publish no trained weights",
    results=(),
)
