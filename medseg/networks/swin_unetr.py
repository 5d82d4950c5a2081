"""Swin UNETR: a Swin transformer encoder with a convolutional U-shaped decoder, in 2D and 3D.

Paper: Hatamizadeh et al., "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images",
2022, arXiv 2201.01266; encoder pre-training: Tang et al., arXiv 2111.14791.
Published code: Project-MONAI/MONAI (Apache-2.0). The network is MONAI's own class; this module adds the patch merging
of the checkpoints published before MONAI 1.5 and says which inputs are legal before they reach an instance norm.
Published weights that load: BTCV (feature size 12, 24, 48), BraTS 21, the zoo bundle swin_unetr_btcv_segmentation,
model_swinvit.pt and the Disruptive Autoencoders encoder; see `medseg.checkpoints.swin_unetr`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.networks.nets import swin_unetr as monai_swin_unetr
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up

Merging = Literal["current", "mergingv2", "legacy"]

# The deepest feature map has this fraction of the image's size per axis: five halvings.
REDUCTION = 32


class LegacyPatchMerging(monai_swin_unetr.PatchMergingV2):
    """Patch merging of MONAI 0.9 to 1.4: two of the eight 3D sub-grids are taken twice and two never.

    Keys and shapes are those of the corrected layer, but the function is another one, and the weights published in
    that time were trained with it. In 2D all merging layers are the same.

    Shape:
        features (B, D, H, W, C) -> (B, ceil(D/2), ceil(H/2), ceil(W/2), 2C); 2D likewise without D.
    """

    offsets = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            planar: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return planar
        _, d, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        x = torch.cat([x[:, i::2, j::2, k::2, :] for i, j, k in self.offsets], dim=-1)
        merged: Tensor = self.reduction(self.norm(x))
        return merged


MERGINGS: dict[str, type[nn.Module]] = {
    "current": monai_swin_unetr.PatchMerging,
    "mergingv2": monai_swin_unetr.PatchMergingV2,
    "legacy": LegacyPatchMerging,
}


class SwinUNETR(monai_swin_unetr.SwinUNETR):
    """Swin UNETR as MONAI builds it.

    Args:
        in_channels: image channels.
        out_channels: classes including background.
        feature_size: channels at half resolution; a multiple of 12. Published: 12 (tiny), 24 (small), 48 (base).
        spatial_dims: 2 or 3.
        use_v2: one residual convolution block before each transformer stage (Swin UNETR-V2).
        merging: order of the sub-grids in patch merging. `current`: MONAI 1.5 and later. `legacy`: MONAI 0.9 to 1.4,
            so all weights published before 2025. `mergingv2`: MONAI's option of that name.
        window_size: window edge in tokens, one number or one per axis.
        depths: transformer blocks of the four stages.
        num_heads: attention heads of the four stages.
        drop_rate: dropout after projections, 0 to 1.
        attn_drop_rate: dropout of attention weights, 0 to 1.
        dropout_path_rate: stochastic depth, from 0 at the first block to this at the last.
        use_checkpoint: recompute blocks in the backward pass to save memory.
        use_flash_attention: fused attention where no gradient is recorded; same numbers up to rounding, a third less
            time on a CPU. MONAI before 1.6 does not know it and ignores it.

    Shape:
        image (B, in_channels, D, H, W) -> logits (B, out_channels, D, H, W); in 2D without D. Each axis is a multiple
        of 32, and at least one is 64 or more: the instance norm at 1/32 needs more than one element.

    Raises:
        ValueError: a configuration that has no such network, or an image of another size or channel count.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        feature_size: int = 48,
        *,
        spatial_dims: int = 3,
        use_v2: bool = False,
        merging: Merging = "current",
        window_size: Sequence[int] | int = 7,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dropout_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        use_flash_attention: bool = True,
    ) -> None:
        _check_config(
            in_channels=in_channels,
            out_channels=out_channels,
            feature_size=feature_size,
            spatial_dims=spatial_dims,
            merging=merging,
            window_size=window_size,
            depths=depths,
            num_heads=num_heads,
        )
        downsample: Any = MERGINGS[merging]  # MONAI annotates a module but takes a class
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            feature_size=feature_size,
            spatial_dims=spatial_dims,
            use_v2=use_v2,
            downsample=downsample,
            window_size=window_size,
            depths=depths,
            num_heads=num_heads,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            dropout_path_rate=dropout_path_rate,
            use_checkpoint=use_checkpoint,
        )
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        for module in self.modules():
            if isinstance(module, monai_swin_unetr.WindowAttention):
                module.use_flash_attention = use_flash_attention

    @property
    def merging(self) -> Merging:
        """The merging this network was built with."""
        return merging_of(self)

    def forward(self, x_in: Tensor) -> Tensor:
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._check_input(x_in)
        logits: Tensor = super().forward(x_in)  # type: ignore[no-untyped-call]
        return logits

    def _check_input(self, image: Tensor) -> None:
        if image.ndim != 2 + self.spatial_dims:
            raise ValueError(
                f"Swin UNETR: image must have {2 + self.spatial_dims} axes (batch, channel, space), "
                f"got shape {tuple(image.shape)}"
            )
        if image.shape[1] != self.in_channels:
            raise ValueError(f"Swin UNETR: image must have {self.in_channels} channels, got {image.shape[1]}")
        check_roi_size(image.shape[2:])


def check_roi_size(roi_size: Sequence[int]) -> None:
    """Refuse a window that Swin UNETR cannot take.

    Args:
        roi_size: size per axis in voxels, (D, H, W) or (H, W).

    Raises:
        ValueError: an axis is not a positive multiple of 32, or all axes are 32.
    """
    axes = ("depth", "height", "width")[-len(roi_size) :]
    for axis, size in zip(axes, roi_size, strict=True):
        if size < REDUCTION or size % REDUCTION:
            raise ValueError(f"Swin UNETR: {axis} must be a positive multiple of {REDUCTION}, got {size}")
    if all(size == REDUCTION for size in roi_size):
        raise ValueError(
            f"Swin UNETR: at least one of {', '.join(axes)} must be {2 * REDUCTION} or more, got {tuple(roi_size)}; "
            "the deepest feature map would be a single element"
        )


def merging_of(network: nn.Module) -> Merging:
    """Which patch merging a Swin UNETR of this project or of MONAI uses.

    Raises:
        ValueError: the network has no merging layer known here.
    """
    try:
        layer = network.get_submodule("swinViT.layers1.0.downsample")
    except AttributeError as err:
        raise ValueError(f"{type(network).__name__} is not a Swin UNETR") from err
    for name in ("legacy", "current", "mergingv2"):  # the second class is the base of both others
        if type(layer) is MERGINGS[name]:
            merging: Merging = name
            return merging
    raise ValueError(f"unknown patch merging {type(layer).__name__}; known: {', '.join(MERGINGS)}")


def _check_config(
    *,
    in_channels: int,
    out_channels: int,
    feature_size: int,
    spatial_dims: int,
    merging: str,
    window_size: Sequence[int] | int,
    depths: Sequence[int],
    num_heads: Sequence[int],
) -> None:
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if feature_size < 12 or feature_size % 12:
        raise ValueError(f"feature_size must be a positive multiple of 12, got {feature_size}")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
    if merging not in MERGINGS:
        raise ValueError(f"merging must be one of {', '.join(MERGINGS)}, got {merging!r}")
    windows = (window_size,) * spatial_dims if isinstance(window_size, int) else tuple(window_size)
    if len(windows) != spatial_dims or min(windows) < 2:
        raise ValueError(f"window_size must be 2 or more, one number or {spatial_dims} of them, got {window_size}")
    for name, values in (("depths", depths), ("num_heads", num_heads)):
        if len(values) != 4 or min(values) < 1:
            raise ValueError(f"{name} must be four positive numbers, got {tuple(values)}")
    for stage, heads in enumerate(num_heads):
        if (feature_size * 2**stage) % heads:
            raise ValueError(
                f"num_heads: stage {stage} has {feature_size * 2**stage} channels, not a multiple of {heads} heads"
            )


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for a window that covers `size`."""
    window = list(round_up(size, REDUCTION))
    if max(window) == REDUCTION:
        window[size.index(max(size))] = 2 * REDUCTION
    return Fit({"in_channels": in_channels, "out_channels": out_channels, **given}, tuple(window))


ENCODER = ("swinViT.",)
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="Swin UNETR",
    paper="Hatamizadeh et al., Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images, "
    "2022, arXiv 2201.01266; Tang et al., Self-Supervised Pre-Training of Swin Transformers, 2021, arXiv 2111.14791",
    code="github.com/Project-MONAI/MONAI, github.com/Project-MONAI/research-contributions",
    code_license="Apache-2.0",
    spatial_dims=(3, 2),
    input_rule="each axis a multiple of 32, at least one 64 or more",
    default={"in_channels": 1, "out_channels": 14, "feature_size": 48},
    default_input=(1, 1, 96, 96, 96),
    parameters=62_187_296,
    gmacs=318.5,
    weights="release 0.8.1 of github.com/Project-MONAI/MONAI-extra-test-data",
    results=(
        ("BTCV, 13 organs, 6 validation cases, feature size 48", "mean Dice 81.86 % (overlap 0.5), 82.25 % (0.7)"),
        ("the same, feature size 24", "79.34 %, 79.79 %"),
        ("the same, feature size 12", "70.35 %, 72.05 %"),
        ("BraTS 21, five folds", "mean Dice of WT, ET and TC 88.54, 90.59, 89.81, 89.24, 90.35 %"),
    ),
)
