"""ParaTransCNN: a ResNet and a pyramid transformer side by side as encoder, a convolutional decoder, for 2D slices.

Paper: Sun et al., "ParaTransCNN: Parallelized TransCNN Encoder for Medical Image Segmentation", 2024, arXiv 2401.15307.
Public repository: github.com/HongkunSun/ParaTransCNN at commit 2702b8b, without a licence; this file was written from a
description of what the network computes, and holds none of its code.
Weights that load (medseg/checkpoints/paratranscnn.py): checkpoints of the published trainer, torchvision's ResNet-34.

Differences from the published code, none of which changes a number beyond rounding:
  - modules have names of their own; the importer holds the published ones;
  - a one-channel slice is repeated to three channels here, not by the caller;
  - the constructor fetches no ImageNet weights;
  - the last transposed convolution and the 1x1 convolution after it are run as one (see `UpsamplingHead`);
  - `cnn_width`, `cnn_blocks` and `dropout_rate` are arguments; the defaults are the published values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up

DIVISOR = 16  # height and width are multiples of it: the coarsest level of both encoders


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions, with torchvision's parameter names.

    Shape:
        x (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(x)))


class ResNetEncoder(nn.Module):
    """ResNet without its max-pooling and classifier: torchvision's at twice the resolution, with its parameter names.

    Args:
        width: channels w of the stem and the first stage.
        blocks: basic blocks of the four stages.

    Shape:
        image (B, 3, H, W) -> (B, 2w, H/4, W/4), (B, 4w, H/8, W/8), (B, 8w, H/16, W/16).
    """

    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks[0], stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, blocks[3], stride=2)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride=stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = self.layer1(F.relu(self.bn1(self.conv1(image))))
        quarter = self.layer2(half)
        eighth = self.layer3(quarter)
        return quarter, eighth, self.layer4(eighth)


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value are one projection without bias.

    Shape:
        tokens (B, N, dim) -> (B, N, dim).
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = rearrange(self.qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        merged = rearrange(mixed, "b heads n d -> b n (heads d)")
        return F.dropout(self.proj(merged), self.dropout, training=self.training)


class FeedForward(nn.Module):
    """Two linear layers with the exact (erf) GELU between them.

    Shape:
        tokens (B, N, dim) -> (B, N, dim).
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.activation = nn.GELU(approximate="none")
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.dropout(self.activation(self.fc1(tokens)))
        result: Tensor = self.dropout(self.fc2(tokens))
        return result


class TransformerLayer(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to its input.

    Shape:
        tokens (B, N, dim) -> (B, N, dim).
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-5)
        self.attention = Attention(dim, heads, dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = FeedForward(dim, dropout)
        self.dropout = nn.Dropout(dropout)  # a second one after the attention's own: so published

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens)))
        result: Tensor = tokens + self.mlp(self.mlp_norm(tokens))
        return result


class TransformerStage(nn.Module):
    """One level of the pyramid: patches as tokens, transformer layers, tokens back to a map.

    There are no position embeddings and no norm after the last layer.

    Shape:
        x (B, in_channels, H, W) -> (B, dim, H / patch, W / patch).
    """

    def __init__(self, in_channels: int, dim: int, *, patch: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.layers = nn.Sequential(*(TransformerLayer(dim, heads, dropout) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        height = x.shape[2]
        tokens = self.layers(rearrange(x, "b c h w -> b (h w) c"))
        result: Tensor = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        return result


class SqueezeExcitation(nn.Module):
    """Each channel weighted by a number between 0 and 1 that depends on the means of all channels.

    Shape:
        x (B, channels, H, W) -> (B, channels, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 16, bias=False)
        self.excite = nn.Linear(channels // 16, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3))))))
        return x * weights[:, :, None, None]


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with bias, each with batch norm and ReLU: (B, channels, H, W) -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )


class UpsamplingHead(nn.Module):
    """A transposed convolution to four times the size and a 1x1 convolution to the classes, run as one.

    Nothing lies between the two, so their product is one transposed convolution straight to the classes. It spares the
    full-resolution map of `dim` channels, which would be the network's largest tensor.

    Shape:
        x (B, in_channels, H, W) -> logits (B, num_classes, 4H, 4W).
    """

    def __init__(self, in_channels: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, dim, 4, stride=4)
        self.classify = nn.Conv2d(dim, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        classes = self.classify.weight[:, :, 0, 0]
        weight = einsum(classes, self.up.weight, "k d, c d h w -> c k h w")
        bias = F.linear(cast("Tensor", self.up.bias), classes, self.classify.bias)
        return F.conv_transpose2d(x, weight, bias, stride=4)


class ParaTransCNN(nn.Module):
    """Parallel CNN and transformer encoders, fused by channel attention at 1/4, 1/8 and 1/16 resolution.

    Args:
        n_channels: 3, the CNN's stem takes nothing else; a one-channel image is repeated.
        num_classes: output channels, background included.
        heads: attention heads at every level; they divide `dim`.
        dim: transformer width at 1/4 resolution; doubled at 1/8 and again at 1/16.
        depth: transformer layers of the three levels.
        patch_size: 2, else the two encoders do not meet.
        cnn_width: channels of the CNN's stem; its stages have 1, 2, 4 and 8 times as many.
        cnn_blocks: basic blocks of the CNN's four stages; (3, 4, 6, 3) is ResNet-34.
        dropout_rate: every dropout of the transformer.

    Shape:
        image (B, C, H, W), C 1 or 3, H and W multiples of 16 -> logits (B, num_classes, H, W).

    Raises:
        ValueError: the configuration does not fit together, or the image's channels or size do not.
    """

    def __init__(
        self,
        n_channels: int = 3,
        num_classes: int = 9,
        *,
        heads: int = 8,
        dim: int = 320,
        depth: Sequence[int] = (3, 3, 3),
        patch_size: int = 2,
        cnn_width: int = 64,
        cnn_blocks: Sequence[int] = (3, 4, 6, 3),
        dropout_rate: float = 0.1,
    ) -> None:
        super().__init__()
        for wrong, problem in (
            (n_channels != 3, f"n_channels is {n_channels}; the CNN takes 3 (one-channel images are repeated)"),
            (num_classes < 1, f"num_classes is {num_classes}; at least 1 is needed"),
            (heads < 1 or dim % heads, f"heads is {heads}; it must divide dim {dim}"),
            (len(depth) != 3 or min(depth) < 1, f"depth is {list(depth)}; it needs 3 entries of at least 1"),
            (patch_size != 2, f"patch_size is {patch_size}; only 2 makes the two encoders meet"),
            (
                len(cnn_blocks) != 4 or min(cnn_blocks) < 1,
                f"cnn_blocks is {list(cnn_blocks)}; it needs 4 entries of at least 1",
            ),
            (
                cnn_width < 1 or dim + 2 * cnn_width < 16,
                f"cnn_width is {cnn_width}; dim + 2 cnn_width must be at least 16 for the channel attention",
            ),
        ):
            if wrong:
                raise ValueError(f"ParaTransCNN: {problem}")

        self.depth = tuple(depth)
        # Channels of the fused maps at 1/4, 1/8 and 1/16 resolution.
        quarter, eighth, sixteenth = (dim * 2**level + cnn_width * 2 ** (level + 1) for level in range(3))
        self.cnn = ResNetEncoder(cnn_width, cnn_blocks)
        self.transformer = nn.ModuleList(
            TransformerStage(in_channels, width, patch=patch, heads=heads, depth=layers, dropout=dropout_rate)
            for in_channels, width, patch, layers in (
                (3, dim, 2 * patch_size, depth[0]),
                (dim, 2 * dim, patch_size, depth[1]),
                (2 * dim, 4 * dim, patch_size, depth[2]),
            )
        )
        # The decoder's lists run from the coarsest level to the finest.
        self.fusion = nn.ModuleList(SqueezeExcitation(channels) for channels in (sixteenth, eighth, quarter))
        self.decoder = nn.ModuleList(DoubleConv(channels) for channels in (sixteenth, 2 * eighth, quarter + eighth))
        self.up = nn.ModuleList(
            [
                nn.ConvTranspose2d(sixteenth, eighth, 2, stride=2),
                nn.ConvTranspose2d(2 * eighth, eighth, 2, stride=2),
            ]
        )
        self.head = UpsamplingHead(quarter + eighth, dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"ParaTransCNN: image is {tuple(image.shape)}; it must be (B, C, H, W) with C 1 or 3")
        for axis, size in zip(("height", "width"), image.shape[2:], strict=True):
            if size < DIVISOR or size % DIVISOR:
                raise ValueError(f"ParaTransCNN: {axis} is {size}; it must be a multiple of {DIVISOR}")
        image = image.expand(-1, 3, -1, -1)

        local_maps = self.cnn(image)
        global_maps, x = [], image
        for stage in self.transformer:
            x = stage(x)
            global_maps.append(x)
        fine, middle, coarse = (torch.cat(maps, dim=1) for maps in zip(global_maps, local_maps, strict=True))

        x = self.up[0](self.decoder[0](self.fusion[0](coarse)))
        x = self.up[1](self.decoder[1](torch.cat([self.fusion[1](middle), x], dim=1)))
        logits: Tensor = self.head(self.decoder[2](torch.cat([self.fusion[2](fine), x], dim=1)))
        return logits


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The network for slices that cover `size`.

    Raises:
        ValueError: neither one channel nor three.
    """
    if in_channels not in (1, 3):
        raise ValueError(f"ParaTransCNN: {in_channels} channels; it takes 1 or 3")
    return Fit({"num_classes": out_channels, **given}, round_up(size, DIVISOR))


ENCODER = ("cnn.", "transformer.")
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="ParaTransCNN",
    paper="Sun et al., ParaTransCNN: Parallelized TransCNN Encoder for Medical Image Segmentation, 2024, "
    "arXiv 2401.15307",
    code="github.com/HongkunSun/ParaTransCNN",
    code_license="none",
    spatial_dims=(2,),
    input_rule="1 or 3 channels; height and width multiples of 16",
    default={"num_classes": 9},
    default_input=(1, 1, 224, 224),
    parameters=245_468_937,
    gmacs=225.9,
    weights="the authors publish no trained weights",
    results=(
        ("Synapse, 8 organs, 12 test volumes", "mean Dice 83.86 %, HD95 15.86 voxels"),
        (
            "Synapse, each organ",
            "aorta 88.12, gallbladder 68.97, left kidney 87.99, right kidney 83.84, liver 95.01, pancreas 69.79, "
            "spleen 92.71, stomach 84.43 % Dice",
        ),
        ("AVT, 18 test volumes", "Dice 87.82 %, HD95 4.70 voxels"),
        ("Kvasir-SEG", "Dice 88.22 %"),
        ("BUSI", "Dice 80.94 %"),
    ),
)
