"""Windows and dilated groups of a 3D token grid, channel last."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor


def window_partition(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """Cut a token grid into windows of neighbours.

    Args:
        x: features (B, D, H, W, C); D, H, W are multiples of `window_size`.
        window_size: window edge per axis in tokens (d, h, w).

    Returns:
        Tokens (B * windows, d * h * w, C); windows and tokens in depth, height, width order.
    """
    d, h, w = window_size
    tokens: Tensor = rearrange(x, "b (nd d) (nh h) (nw w) c -> (b nd nh nw) (d h w) c", d=d, h=h, w=w)
    return tokens


def window_reverse(tokens: Tensor, window_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Undo `window_partition`.

    Args:
        tokens: (B * windows, d * h * w, C).
        window_size: window edge per axis in tokens (d, h, w).
        grid: size of the token grid (D, H, W).

    Returns:
        Features (B, D, H, W, C).
    """
    (d, h, w), (nd, nh, nw) = window_size, (n // edge for n, edge in zip(grid, window_size, strict=True))
    x: Tensor = rearrange(
        tokens, "(b nd nh nw) (d h w) c -> b (nd d) (nh h) (nw w) c", nd=nd, nh=nh, nw=nw, d=d, h=h, w=w
    )
    return x


def dilated_partition(x: Tensor, interval: Sequence[int]) -> Tensor:
    """Cut a token grid into groups of tokens that lie `interval` apart, so that each group spans the whole grid.

    Args:
        x: features (B, D, H, W, C); D, H, W are multiples of `interval`.
        interval: distance of a group's tokens per axis (id, ih, iw).

    Returns:
        Tokens (B * id * ih * iw, D/id * H/ih * W/iw, C); groups in the order of their first token.
    """
    d, h, w = interval
    tokens: Tensor = rearrange(x, "b (gd d) (gh h) (gw w) c -> (b d h w) (gd gh gw) c", d=d, h=h, w=w)
    return tokens


def dilated_reverse(tokens: Tensor, interval: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Undo `dilated_partition`.

    Args:
        tokens: (B * groups, tokens of a group, C).
        interval: distance of a group's tokens per axis (id, ih, iw).
        grid: size of the token grid (D, H, W).

    Returns:
        Features (B, D, H, W, C).
    """
    (d, h, w), (gd, gh, gw) = interval, (n // step for n, step in zip(grid, interval, strict=True))
    x: Tensor = rearrange(
        tokens, "(b d h w) (gd gh gw) c -> b (gd d) (gh h) (gw w) c", d=d, h=h, w=w, gd=gd, gh=gh, gw=gw
    )
    return x
