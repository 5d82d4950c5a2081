"""MDPFormer: a U-Net and a transformer with memory side by side, for lesion, pancreas and the patient's diagnosis.

Paper: Zhou et al., "Meta-information-aware Dual-path Transformer for Differential Diagnosis of Multi-type Pancreatic
Lesions in Multi-phase CT", 2023, arXiv 2303.00942.
Published code and weights: none were found. The paper's abstract says: an S-path (CNN, U-Net) segments; a C-path made
of dual-path transformer blocks takes its features together with age and sex, and classifies the patient. Everything
else (numbers of layers and tokens, the position code, the heads) is this project's choice, so no figure of the paper
carries over.

The S-path is made of MONAI's DynUNet blocks. Missing phases and unknown age or sex are inputs, not errors: the network
is told what is missing, and is trained with parts left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetUpBlock
from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up

SCALES = 3  # S-path features that the C-path reads: the coarsest ones
NORM_GROUPS = 8
UNKNOWN_SEX = 2
_AGE_CENTRES = (20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0)  # years
_SEXES = 3  # male, female, unknown
_DEVIATION = 0.02  # of learned tokens at the start


class Diagnosis(NamedTuple):
    """What the network says of a batch; the first field is what a sliding window blends.

    Attributes:
        seg_logits: (B, out_channels, D, H, W).
        class_logits: (B, patient_classes).
        mask_logits: (B, patient_classes, D / s, H / s, W / s), where each class sees its evidence.
    """

    seg_logits: Tensor
    class_logits: Tensor
    mask_logits: Tensor


class SPath(nn.Module):
    """U-Net of convolution, instance norm and leaky ReLU, twice a level; (B, in_channels, D, H, W) to logits.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        channels: of each level, the finest first.
        fold: 2x2x2 voxels become channels before the first level and voxels again after the last.

    Returns of forward:
        logits (B, out_channels, D, H, W) and the features of bottleneck and decoder, coarse to fine.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: Sequence[int], *, fold: bool) -> None:
        super().__init__()
        self.fold = 2 if fold else 1
        voxels = self.fold**3
        widths = [in_channels * voxels, *channels]
        self.encoder = nn.ModuleList(
            UnetBasicBlock(3, n_in, n_out, kernel_size=3, stride=1 if level == 0 else 2, norm_name=_INSTANCE_NORM)
            for level, (n_in, n_out) in enumerate(pairwise(widths))
        )
        self.decoder = nn.ModuleList(
            UnetUpBlock(
                3,
                n_in,
                n_out,
                kernel_size=3,
                stride=1,
                upsample_kernel_size=2,
                norm_name=_INSTANCE_NORM,
                trans_bias=True,
            )
            for n_in, n_out in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.head = nn.Conv3d(channels[0], out_channels * voxels, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        f = self.fold
        x = rearrange(image, "b c (d dz) (h dy) (w dx) -> b (c dz dy dx) d h w", dz=f, dy=f, dx=f)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        features = [x]
        for up, skip in zip(self.decoder, skips[-2::-1], strict=True):
            features.append(up(features[-1], skip))
        logits = rearrange(
            self.head(features[-1]), "b (c dz dy dx) d h w -> b c (d dz) (h dy) (w dx)", dz=f, dy=f, dx=f
        )
        return logits, features


_INSTANCE_NORM = ("INSTANCE", {"affine": True})


class Attention(nn.Module):
    """Multi-head attention with projections of its own: query (B, N, C) and source (B, M, C) to (B, N, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            rearrange(projected, "b n (heads c) -> b heads n c", heads=self.num_heads)
            for projected in (self.query(query), self.key(source), self.value(source))
        )
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        result: Tensor = self.out(mixed)
        return result


def feed_forward(dim: int) -> nn.Sequential:
    """Two linear layers with GELU, twice as wide between them."""
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class DualPathBlock(nn.Module):
    """Pixels read the memory, the memory reads the pixels, then itself; norms before, sums after.

    Shape:
        pixels (B, N, C), memory (B, M, C), position (1, N, C) -> pixels, memory of the same shapes.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.pixel_norm, self.memory_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.pixel_ffn_norm, self.self_norm, self.memory_ffn_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.memory_to_pixel, self.pixel_to_memory, self.memory_to_memory = (
            Attention(dim, num_heads) for _ in range(3)
        )
        self.pixel_ffn, self.memory_ffn = feed_forward(dim), feed_forward(dim)

    def forward(self, pixels: Tensor, memory: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        pixels = pixels + self.memory_to_pixel(self.pixel_norm(pixels) + position, self.memory_norm(memory))
        pixels = pixels + self.pixel_ffn(self.pixel_ffn_norm(pixels))
        memory = memory + self.pixel_to_memory(self.memory_norm(memory), self.pixel_norm(pixels) + position)
        normed = self.self_norm(memory)
        memory = memory + self.memory_to_memory(normed, normed)
        memory = memory + self.memory_ffn(self.memory_ffn_norm(memory))
        return pixels, memory


class PatientTokens(nn.Module):
    """Sex, age and the phases that are there, as tokens.

    Shape:
        age (B,) years, NaN unknown; sex (B,) 0 male, 1 female, 2 unknown; phases (B, P) 1 there, 0 absent
        -> (B, 3, C), or (B, 1, C) without age and sex.
    """

    def __init__(self, phases: int, dim: int, *, use_meta: bool) -> None:
        super().__init__()
        self.use_meta = use_meta
        self.phases = nn.Linear(phases, dim)
        if use_meta:
            self.sex = nn.Embedding(_SEXES, dim)
            effect = nn.Linear(dim, dim)
            self.age = nn.Sequential(nn.Linear(2 + len(_AGE_CENTRES), dim), nn.GELU(), effect)
            # Age and sex start without effect, so that the network first learns to look.
            for parameter in (self.sex.weight, effect.weight, effect.bias):
                nn.init.zeros_(parameter)

    def forward(self, age: Tensor, sex: Tensor, phases: Tensor) -> Tensor:
        there = self.phases(phases)[:, None]
        if not self.use_meta:
            return there  # type: ignore[no-any-return]
        known = ~torch.isnan(age)
        years = torch.where(known, age, 0.0)[:, None]
        bumps = torch.exp(-(((years - years.new_tensor(_AGE_CENTRES)) / 10) ** 2))
        code = torch.cat([torch.ones_like(years), (years - 55) / 20, bumps], dim=1) * known[:, None]
        return torch.cat([self.sex(sex)[:, None], self.age(code)[:, None], there], dim=1)


def position_code(size: Sequence[int], dim: int) -> Tensor:
    """Fixed sines and cosines of a voxel's place, (D * H * W, dim).

    Each axis has dim // 6 frequencies, evenly spaced in their logarithm from half a cycle to 16 cycles over the axis.
    """
    count = dim // 6
    cycles = 0.5 * 2 ** (5 * torch.arange(count) / max(count - 1, 1))
    codes = []
    for axis, n in enumerate(size):
        angle = 2 * math.pi * cycles * ((torch.arange(n) + 0.5) / n)[:, None]
        shape = [n if other == axis else 1 for other in range(len(size))]
        code = torch.cat([angle.sin(), angle.cos()], dim=1).reshape(*shape, 2 * count)
        codes.append(code.expand(*size, 2 * count))
    code = torch.cat(codes, dim=-1).reshape(-1, 6 * count)
    return F.pad(code, (0, dim - 6 * count))


class CPath(nn.Module):
    """Dual-path blocks over three scales of the S-path, coarse to fine; ends in the patient's classes.

    Shape:
        features, three of (B, C_j, d, h, w), coarse to fine; evidence (B, K, D, H, W), the softmax of the S-path;
        tokens (B, T, C) of the patient -> class_logits (B, patient_classes), mask_logits (B, patient_classes, d, h, w).
    """

    def __init__(
        self,
        features: Sequence[int],
        evidence: int,
        *,
        patient_classes: int,
        hidden_size: int,
        num_heads: int,
        depths: Sequence[int],
        free_tokens: int,
    ) -> None:
        super().__init__()
        self.hidden_size, self.patient_classes = hidden_size, patient_classes
        self.embed = nn.ModuleList(
            nn.Sequential(nn.Conv3d(width + evidence, hidden_size, 1), nn.GroupNorm(NORM_GROUPS, hidden_size))
            for width in features
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(DualPathBlock(hidden_size, num_heads) for _ in range(depth)) for depth in depths
        )
        self.class_tokens = nn.Parameter(torch.randn(patient_classes, hidden_size) * _DEVIATION)
        self.free_tokens = nn.Parameter(torch.randn(free_tokens, hidden_size) * _DEVIATION)
        self.norm = nn.LayerNorm(hidden_size)
        self.class_weight = nn.Parameter(torch.randn(patient_classes, hidden_size) * _DEVIATION)
        self.class_bias = nn.Parameter(torch.zeros(patient_classes))
        self.whole = nn.Linear(hidden_size, patient_classes)
        self.mask = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Sequence[Tensor], evidence: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        learned = torch.cat([self.class_tokens, self.free_tokens]).expand(len(tokens), -1, -1)
        memory = torch.cat([learned, tokens], dim=1)
        coarser: Tensor | None = None
        for feature, embed, blocks in zip(features, self.embed, self.blocks, strict=True):
            size = feature.shape[2:]
            x = embed(torch.cat([feature, F.adaptive_max_pool3d(evidence, size)], dim=1))
            if coarser is not None:
                x = x + F.interpolate(coarser, size=size, mode="trilinear", align_corners=False)
            pixels = rearrange(x, "b c d h w -> b (d h w) c")
            position = position_code(size, self.hidden_size).to(pixels)[None]
            for block in blocks:  # type: ignore[attr-defined]
                pixels, memory = block(pixels, memory, position)
            coarser = rearrange(pixels, "b (d h w) c -> b c d h w", d=size[0], h=size[1], w=size[2])
        memory = self.norm(memory)
        queries = memory[:, : self.patient_classes]
        class_logits = (queries * self.class_weight).sum(dim=-1) + self.class_bias + self.whole(memory.mean(dim=1))
        mask_logits = torch.einsum("bkc,bcdhw->bkdhw", self.mask(queries), coarser) / math.sqrt(self.hidden_size)
        return class_logits, mask_logits


class MDPFormer(nn.Module):
    """The two paths.

    Args:
        in_channels: phases of contrast, one channel each.
        out_channels: classes of the segmentation including background; the last one is the lesion.
        patient_classes: diagnoses; 0: no C-path, a segmentation network alone.
        channels: of the S-path's levels, the finest first; at least 3.
        fold: the S-path works at half resolution, 2x2x2 voxels as channels.
        hidden_size: width of the C-path, a multiple of 8 and of `num_heads`.
        num_heads: attention heads.
        depths: dual-path blocks at each of the three scales, coarse to fine.
        free_tokens: memory tokens beside those of the classes and of the patient.
        use_meta: age and sex are read.

    Shape:
        image (B, in_channels, D, H, W), each axis a multiple of the S-path's reduction and at least twice it.
        age (B,) years, NaN unknown; sex (B,) int64, 0 male, 1 female, 2 unknown; phases (B, in_channels), 1 there,
        0 absent, what an absent one holds has no effect; left out, age and sex are unknown and all phases there.
        -> `Diagnosis`, or with no patient classes logits (B, out_channels, D, H, W).

    Raises:
        ValueError: a configuration that does not fit together, or an image of another size or channel count.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        patient_classes: int = 9,
        *,
        channels: Sequence[int] = (32, 64, 128, 256, 320),
        fold: bool = False,
        hidden_size: int = 192,
        num_heads: int = 6,
        depths: Sequence[int] = (2, 2, 2),
        free_tokens: int = 16,
        use_meta: bool = True,
    ) -> None:
        super().__init__()
        for wrong, problem in (
            (in_channels < 1, f"in_channels is {in_channels}; at least 1 is needed"),
            (out_channels < 2, f"out_channels is {out_channels}; at least 2 are needed"),
            (patient_classes < 0, f"patient_classes is {patient_classes}; 0 or more"),
            (len(channels) < SCALES, f"channels is {list(channels)}; at least {SCALES} levels are needed"),
            (
                hidden_size < NORM_GROUPS or hidden_size % NORM_GROUPS or hidden_size % num_heads,
                f"hidden_size is {hidden_size}; it must be a multiple of {NORM_GROUPS} and of num_heads {num_heads}",
            ),
            (
                len(depths) != SCALES or min(depths) < 1,
                f"depths is {list(depths)}; it needs {SCALES} entries of at least 1",
            ),
            (free_tokens < 0, f"free_tokens is {free_tokens}; 0 or more"),
        ):
            if wrong:
                raise ValueError(f"MDPFormer: {problem}")
        self.in_channels = in_channels
        self.reduction = _reduction(channels, fold=fold)
        self.s_path = SPath(in_channels, out_channels, channels, fold=fold)
        self.patient_classes = patient_classes
        if patient_classes:
            self.patient = PatientTokens(in_channels, hidden_size, use_meta=use_meta)
            self.c_path = CPath(
                [*channels[: -SCALES - 1 : -1]],
                out_channels,
                patient_classes=patient_classes,
                hidden_size=hidden_size,
                num_heads=num_heads,
                depths=depths,
                free_tokens=free_tokens,
            )

    def forward(
        self, image: Tensor, age: Tensor | None = None, sex: Tensor | None = None, phases: Tensor | None = None
    ) -> Diagnosis | Tensor:
        self.check_input(image.shape)
        if phases is None:
            phases = image.new_ones(image.shape[:2])
        image = torch.where(phases[:, :, None, None, None] > 0, image, 0.0)
        seg_logits, features = self.s_path(image)
        if not self.patient_classes:
            return seg_logits  # type: ignore[no-any-return]
        age = image.new_full(image.shape[:1], math.nan) if age is None else age.to(image)
        sex = torch.full_like(age, UNKNOWN_SEX, dtype=torch.int64) if sex is None else sex
        tokens = self.patient(age, sex, phases.to(image))
        evidence = seg_logits.detach().softmax(dim=1)
        return Diagnosis(seg_logits, *self.c_path(features[:SCALES], evidence, tokens))

    def check_input(self, shape: Sequence[int]) -> None:
        """Refuse an image (B, C, D, H, W) that the network cannot take.

        Raises:
            ValueError: wrong number of axes or channels, or a size that the levels do not divide.
        """
        if len(shape) != 5 or shape[1] != self.in_channels:
            raise ValueError(f"MDPFormer: image of shape {tuple(shape)}; it takes (B, {self.in_channels}, D, H, W)")
        for axis, size in zip(("depth", "height", "width"), shape[2:], strict=True):
            if size % self.reduction or size < 2 * self.reduction:
                raise ValueError(
                    f"MDPFormer: {axis} is {size}; a multiple of {self.reduction}, {2 * self.reduction} or more"
                )


def _reduction(channels: Sequence[int], *, fold: bool) -> int:
    return 1 << (len(channels) - 1 + int(fold))


SMALL: Mapping[str, Any] = {
    "channels": [16, 32, 64, 96],
    "fold": True,
    "hidden_size": 64,
    "num_heads": 4,
    "depths": [1, 1, 1],
    "free_tokens": 7,
}
"""For a CPU, at 3 mm."""


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The small network for a window that covers `size`; without patient classes, unless they are given."""
    arguments = {"in_channels": in_channels, "out_channels": out_channels, "patient_classes": 0, **SMALL, **given}
    step = _reduction(arguments["channels"], fold=arguments["fold"])
    return Fit(arguments, round_up([max(n, 2 * step) for n in size], step))


ENCODER = ("s_path.encoder.",)
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="MDPFormer",
    paper="Zhou et al., Meta-information-aware Dual-path Transformer for Differential Diagnosis of Multi-type "
    "Pancreatic Lesions in Multi-phase CT, 2023, arXiv 2303.00942",
    code="none published",
    code_license="none",
    spatial_dims=(3,),
    input_rule="a channel for each phase; each axis a multiple of 16, 32 or more; age, sex, missing phases beside it",
    default={"in_channels": 3, "out_channels": 3, "patient_classes": 9},
    default_input=(1, 3, 64, 160, 160),
    parameters=21_226_485,
    gmacs=391.5,
    weights="the authors publish no trained weights",
    results=(),
)
