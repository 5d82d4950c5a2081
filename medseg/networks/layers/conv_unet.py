"""Blocks of nnU-Net's convolutional U-Nets: what `PlainConvUNet` and `ResidualEncoderUNet` are made of.

Names of modules are those of `dynamic_network_architectures`, so that state dicts fit. That package registers each
convolution and norm of a block twice (``conv`` and ``all_modules.0``), and the encoder once more inside the decoder;
here each tensor has its first name only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["instance", "batch"]

_CONV: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_NORMS: dict[tuple[str, int], Callable[..., nn.Module]] = {
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """What all blocks of a network share.

    Attributes:
        spatial_dims: 2 or 3.
        conv_bias: whether convolutions have a bias; projections on the skip of a residual block never have.
        norm: instance or batch.
        norm_eps: added to the variance.
        norm_affine: whether the norm scales and shifts.
        negative_slope: of the leaky ReLU; 0 for a ReLU.
    """

    spatial_dims: int
    conv_bias: bool
    norm: Norm
    norm_eps: float
    norm_affine: bool
    negative_slope: float

    def __post_init__(self) -> None:
        if (self.norm, self.spatial_dims) not in _NORMS:
            raise ValueError(f"no {self.norm!r} norm in {self.spatial_dims} dimensions; instance or batch, 2 or 3")

    def conv(self, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool) -> nn.Module:
        """A convolution that keeps the size but for its stride; kernels are odd."""
        padding = tuple((size - 1) // 2 for size in kernel)
        return _CONV[self.spatial_dims](inputs, outputs, tuple(kernel), tuple(stride), padding, bias=bias)

    def make_norm(self, channels: int) -> nn.Module:
        """The norm of so many channels."""
        return _NORMS[self.norm, self.spatial_dims](channels, eps=self.norm_eps, affine=self.norm_affine)

    def activation(self) -> nn.Module:
        """The nonlinearity."""
        return nn.LeakyReLU(self.negative_slope, inplace=True) if self.negative_slope else nn.ReLU(inplace=True)

    def ones(self) -> tuple[int, ...]:
        """A kernel or stride of 1."""
        return (1,) * self.spatial_dims


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The resolution levels of an encoder, full resolution first.

    Attributes:
        features: channels of each.
        kernel_sizes: of each, a number for each axis.
        strides: of each; the first is that of full resolution.
        depths: blocks or convolutions of each.
    """

    features: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]

    @classmethod
    def of(
        cls,
        spatial_dims: int,
        features: Sequence[int],
        kernel_sizes: Sequence[Sequence[int] | int] | int,
        strides: Sequence[Sequence[int] | int],
        depths: Sequence[int] | int,
    ) -> Stages:
        """Stages from what a network's constructor takes.

        Raises:
            ValueError: there are not as many kernels, strides and depths as levels, at least 2.
        """
        levels = len(features)
        kernels = [kernel_sizes] * levels if isinstance(kernel_sizes, int) else list(kernel_sizes)
        counts = [depths] * levels if isinstance(depths, int) else list(depths)
        if levels < 2 or not levels == len(kernels) == len(strides) == len(counts):
            raise ValueError(
                f"{levels} levels of features, {len(kernels)} kernels, {len(strides)} strides, {len(counts)} depths; "
                "as many of each are needed, at least 2"
            )
        return cls(
            features=tuple(features),
            kernel_sizes=tuple(_per_axis(kernel, spatial_dims) for kernel in kernels),
            strides=tuple(_per_axis(stride, spatial_dims) for stride in strides),
            depths=tuple(counts),
        )

    @property
    def divisor(self) -> tuple[int, ...]:
        """What each axis of an image must be a multiple of."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


def _per_axis(value: Sequence[int] | int, spatial_dims: int) -> tuple[int, ...]:
    found = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(found) != spatial_dims or any(n < 1 for n in found):
        raise ValueError(f"{value} is no kernel or stride of {spatial_dims} axes")
    return found


class ConvNormAct(nn.Module):
    """Convolution, norm and, unless it is left out, the nonlinearity.

    Shape:
        (B, inputs, ...) -> (B, outputs, ...), each axis divided by the stride.
    """

    def __init__(
        self,
        style: Style,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        *,
        bias: bool | None = None,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = style.conv(inputs, outputs, kernel, stride, bias=style.conv_bias if bias is None else bias)
        self.norm = style.make_norm(outputs)
        self.act = style.activation() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(self.conv(x)))
        return found


class StackedConvBlocks(nn.Module):
    """Several `ConvNormAct` in a row; the first has the stride."""

    def __init__(
        self, style: Style, count: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        first = ConvNormAct(style, inputs, outputs, kernel, stride)
        others = [ConvNormAct(style, outputs, outputs, kernel, style.ones()) for _ in range(count - 1)]
        self.convs = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.convs(x)
        return found


class BasicBlockD(nn.Module):
    """Residual block of ResNet-D: the skip is pooled, then projected, where stride or channels ask for it."""

    def __init__(self, style: Style, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(style, inputs, outputs, kernel, stride)
        self.conv2 = ConvNormAct(style, outputs, outputs, kernel, style.ones(), act=False)
        self.act = style.activation()
        skip: list[nn.Module] = []
        if any(step != 1 for step in stride):
            skip.append(_POOL[style.spatial_dims](tuple(stride), tuple(stride)))
        if inputs != outputs:
            skip.append(ConvNormAct(style, inputs, outputs, style.ones(), style.ones(), bias=False, act=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.conv2(self.conv1(x)) + self.skip(x))
        return found


class StackedResidualBlocks(nn.Module):
    """Several `BasicBlockD` in a row; the first has the stride."""

    def __init__(
        self, style: Style, count: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]
    ) -> None:
        super().__init__()
        first = BasicBlockD(style, inputs, outputs, kernel, stride)
        self.blocks = nn.Sequential(
            first, *(BasicBlockD(style, outputs, outputs, kernel, style.ones()) for _ in range(count - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(x)
        return found


class UNetDecoder(nn.Module):
    """Transposed convolutions up, the skip beside them, convolutions, and a head of logits at each level.

    Args:
        style: of the blocks.
        stages: of the encoder.
        depths: convolutions of each level, the coarsest first.
        out_channels: of the heads.

    Shape:
        features of the encoder, full resolution first -> logits of each level, the coarsest first; those of the levels
        below the finest only where all are asked for.
    """

    def __init__(self, style: Style, stages: Stages, depths: Sequence[int] | int, out_channels: int) -> None:
        super().__init__()
        levels = len(stages.features) - 1
        counts = [depths] * levels if isinstance(depths, int) else list(depths)
        if len(counts) != levels:
            raise ValueError(f"{len(counts)} depths of the decoder for {levels} levels")
        self.transpconvs, self.stages, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, count in zip(range(levels - 1, -1, -1), counts, strict=True):
            below, here, stride = stages.features[level + 1], stages.features[level], stages.strides[level + 1]
            up = _UP[style.spatial_dims](below, here, stride, stride, bias=style.conv_bias)
            self.transpconvs.append(up)
            self.stages.append(
                StackedConvBlocks(style, count, 2 * here, here, stages.kernel_sizes[level], style.ones())
            )
            self.seg_layers.append(style.conv(here, out_channels, style.ones(), style.ones(), bias=True))

    def forward(self, skips: Sequence[Tensor], *, every_level: bool) -> list[Tensor]:
        features, logits = skips[-1], []
        for number, (up, stage, head) in enumerate(
            zip(self.transpconvs, self.stages, self.seg_layers, strict=True), start=1
        ):
            features = stage(torch.cat([up(features), skips[-1 - number]], dim=1))
            if every_level or number == len(self.stages):
                logits.append(head(features))
        return logits


def check_image(name: str, shape: Sequence[int], in_channels: int, divisor: Sequence[int]) -> None:
    """Refuse an image that a U-Net cannot take.

    Args:
        name: what messages call the network.
        shape: (B, C, ...) of the image.
        in_channels: that the network takes.
        divisor: product of the strides per axis.

    Raises:
        ValueError: wrong number of axes or channels, or a size that the strides do not divide.
    """
    wanted, size = tuple(divisor), tuple(shape[2:])
    if len(size) != len(wanted) or shape[1] != in_channels:
        raise ValueError(
            f"{name}: image of shape {tuple(shape)}; it takes {in_channels} channels and {len(wanted)} axes"
        )
    if any(n % step or n == 0 for n, step in zip(size, wanted, strict=True)):
        raise ValueError(f"{name}: size {size}; each axis must be a multiple of {wanted}")
    if size == wanted:  # the instance norm at the bottleneck needs more than one element
        raise ValueError(f"{name}: size {size}; at least one axis must be larger than {wanted}")


class ConvUNet(nn.Module):
    """An encoder of any blocks and nnU-Net's decoder.

    Args:
        name: what messages call the network.
        style: of the blocks.
        stages: of the encoder.
        encoder: maps an image to the features of each stage, full resolution first.
        in_channels: image channels.
        out_channels: classes including background.
        decoder_depths: convolutions of each level of the decoder, the coarsest first.
        deep_supervision: in training give the logits of all levels.

    Shape:
        image (B, in_channels, D, H, W) -> logits (B, out_channels, D, H, W); in 2D without D. Each axis is a multiple
        of the product of its strides, and at least one is larger. In training with deep supervision a list of such
        logits, finest first, the others stretched to full size.

    Raises:
        ValueError: an image of another size or channel count.
    """

    def __init__(
        self,
        name: str,
        style: Style,
        stages: Stages,
        encoder: nn.Module,
        *,
        in_channels: int,
        out_channels: int,
        decoder_depths: Sequence[int] | int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self._name, self.in_channels = name, in_channels
        self.divisor, self.deep_supervision = stages.divisor, deep_supervision
        self.encoder = encoder
        self.decoder = UNetDecoder(style, stages, decoder_depths, out_channels)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        check_image(self._name, x.shape, self.in_channels, self.divisor)
        every_level = self.training and self.deep_supervision
        *coarser, finest = self.decoder(self.encoder(x), every_level=every_level)
        if not every_level:
            logits: Tensor = finest
            return logits
        return [finest, *(F.interpolate(level, finest.shape[2:]) for level in reversed(coarser))]


def _initialize(module: nn.Module) -> None:
    """As nnU-Net begins: He's normal for a slope of 0.01, no bias; a residual block begins as its skip."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, BasicBlockD) and isinstance(module.conv2.norm.weight, Tensor):
        nn.init.zeros_(module.conv2.norm.weight)
