"""TransUNet: a CNN and a vision transformer as encoder, a convolutional decoder, for 2D slices.

Paper: Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation", 2021,
arXiv 2102.04306.
Public repository: github.com/Beckschen/TransUNet at commit 02ef001, licence Apache-2.0; this file was written anew.
Weights that load (medseg/checkpoints/transunet.py): checkpoints of the published trainer, and Google's ImageNet-21k
`.npz` files R50+ViT-B_16, ViT-B_16 and ViT-L_16. Parameters carry their published names.

Differences from the published code, none of which changes a number:
  - one class count, `num_classes`, instead of two of which one is ignored;
  - configurations that fail late there (n_skip 4, skips without a CNN, tokens that are not 16 pixels wide) are refused;
  - the attention is the fused one, and weights are standardised by one fused layer norm;
  - `head_channels` (512) is an argument.

Looks like a mistake and is kept, because trained weights depend on it: the pooling has no padding, so that the map of
block1 is one pixel short; its copy for the decoder is filled with zeros at the bottom and right, the short map goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isqrt
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from medseg.networks.facts import Facts
from medseg.networks.fit import Fit, round_up

PIXELS_PER_TOKEN = 16  # the decoder doubles the token grid four times

_VIT_B: dict[str, Any] = {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "num_layers": 12}
_VIT_L: dict[str, Any] = {"hidden_size": 1024, "mlp_dim": 4096, "num_heads": 16, "num_layers": 24}
_R50: dict[str, Any] = {"grid": (14, 14), "resnet_num_layers": (3, 4, 9), "resnet_width_factor": 1, "n_skip": 3}

PUBLISHED_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "R50-ViT-B_16": _VIT_B | _R50,
        "R50-ViT-L_16": _VIT_L | _R50,
        "ViT-B_16": _VIT_B | {"n_skip": 0},
        "ViT-L_16": _VIT_L | {"n_skip": 0},
    }
)
"""The paper's networks at 224 x 224, as constructor arguments; `num_classes` is the caller's."""


class StandardisedConv(nn.Conv2d):
    """Convolution without bias whose weights have zero mean and unit variance in every output channel.

    The stored weights are the raw ones; they are standardised at each call, with the biased variance and `eps` inside
    the root, which is what a layer norm over (in, kh, kw) computes.
    """

    eps = 1e-5

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=(kernel_size - 1) // 2, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=self.eps)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class ResidualUnit(nn.Module):
    """Bottleneck of three standardised convolutions; the stride sits on the 3x3.

    Shape:
        x (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride), rounded up.
    """

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = StandardisedConv(in_channels, mid_channels, 1)
        self.gn1 = nn.GroupNorm(32, mid_channels, eps=1e-6)
        self.conv2 = StandardisedConv(mid_channels, mid_channels, 3, stride=stride)
        self.gn2 = nn.GroupNorm(32, mid_channels, eps=1e-6)
        self.conv3 = StandardisedConv(mid_channels, out_channels, 1)
        self.gn3 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.downsample: nn.Module = nn.Identity()
        self.gn_proj: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = StandardisedConv(in_channels, out_channels, 1, stride=stride)
            # One group per channel and another eps than everywhere else: so published.
            self.gn_proj = nn.GroupNorm(out_channels, out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.gn_proj(self.downsample(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(shortcut + self.gn3(self.conv3(x)))


class HybridCNN(nn.Module):
    """The ResNet in front of the transformer: a root and three blocks, stride 16 in all.

    Args:
        width: channels w of the root, a multiple of 32.
        num_units: residual units in each of the three blocks.

    Shape:
        image (B, 3, S, S), S a multiple of 16 -> features (B, 16w, S/16, S/16) and the skips
        (B, 8w, S/8, S/8), (B, 4w, S/4, S/4), (B, w, S/2, S/2).
    """

    def __init__(self, width: int, num_units: Sequence[int]) -> None:
        super().__init__()
        self.root = nn.Sequential(
            OrderedDict(
                conv=StandardisedConv(3, width, 7, stride=2),
                gn=nn.GroupNorm(32, width, eps=1e-6),
                relu=nn.ReLU(inplace=True),
            )
        )
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        in_channels = width
        for number, units in enumerate(num_units, start=1):
            mid = width * 2 ** (number - 1)
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for unit in range(1, units + 1):
                stride = 2 if number > 1 and unit == 1 else 1
                layers[f"unit{unit}"] = ResidualUnit(in_channels, 4 * mid, mid, stride=stride)
                in_channels = 4 * mid
            blocks[f"block{number}"] = nn.Sequential(layers)
        self.body = nn.Sequential(blocks)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        quarter = image.shape[-1] // 4
        root = self.root(image)
        block1 = self.body[0](F.max_pool2d(root, 3, stride=2))  # one short of a quarter of the image
        block2 = self.body[1](block1)
        missing = quarter - block1.shape[-1]
        skips = [block2, F.pad(block1, (0, missing, 0, missing)), root]
        return self.body[2](block2), skips


class Embeddings(nn.Module):
    """An image, or the CNN's map of it, as tokens with learned positions; there is no class token.

    Shape:
        image (B, 3, S, S) -> tokens (B, (S/16)^2, hidden_size), row-major, and the CNN's skips (none without it).
    """

    def __init__(self, cnn: HybridCNN | None, in_channels: int, hidden_size: int, tokens: int, dropout: float) -> None:
        super().__init__()
        kernel = PIXELS_PER_TOKEN if cnn is None else 1
        self.hybrid_model = cnn
        self.patch_embeddings = nn.Conv2d(in_channels, hidden_size, kernel, stride=kernel)
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens, hidden_size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        features, skips = (image, []) if self.hybrid_model is None else self.hybrid_model(image)
        tokens = self.patch_embeddings(features).flatten(2).transpose(1, 2)
        return self.dropout(tokens + self.position_embeddings), skips


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value projections.

    Shape:
        tokens (B, N, hidden_size) -> (B, N, hidden_size).
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            rearrange(project(tokens), "b n (heads d) -> b heads n d", heads=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        merged = rearrange(mixed, "b heads n d -> b n (heads d)")
        return F.dropout(self.out(merged), self.dropout, training=self.training)


class FeedForward(nn.Module):
    """Two linear layers with the exact (erf) GELU between them.

    Shape:
        tokens (B, N, hidden_size) -> (B, N, hidden_size).
    """

    def __init__(self, hidden_size: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, hidden_size)
        self.activation = nn.GELU(approximate="none")
        self.dropout = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.dropout(self.activation(self.fc1(tokens)))
        result: Tensor = self.dropout(self.fc2(tokens))
        return result


class TransformerBlock(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to its input.

    Shape:
        tokens (B, N, hidden_size) -> (B, N, hidden_size).
    """

    def __init__(
        self, hidden_size: int, mlp_dim: int, num_heads: int, *, attention_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, attention_dropout)
        self.ffn_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ffn = FeedForward(hidden_size, mlp_dim, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.attention_norm(tokens))
        result: Tensor = tokens + self.ffn(self.ffn_norm(tokens))
        return result


class Encoder(nn.Module):
    """The transformer blocks and the norm after the last of them.

    Shape:
        tokens (B, N, hidden_size) -> (B, N, hidden_size).
    """

    def __init__(self, blocks: Sequence[TransformerBlock], hidden_size: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(blocks)
        self.encoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.layer:
            tokens = block(tokens)
        result: Tensor = self.encoder_norm(tokens)
        return result


class Transformer(nn.Module):
    """Embeddings and encoder: what the ImageNet-21k files hold.

    Shape:
        image (B, 3, S, S) -> tokens (B, (S/16)^2, hidden_size) and the CNN's skips.
    """

    def __init__(self, embeddings: Embeddings, encoder: Encoder) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, skips = self.embeddings(image)
        return self.encoder(tokens), skips


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution without bias, batch norm, ReLU: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DecoderBlock(nn.Module):
    """Twice the size, joined with a skip where there is one, two convolutions.

    Shape:
        x (B, in_channels, H, W) and skip (B, skip_channels, 2H, 2W) -> (B, out_channels, 2H, 2W).
    """

    def __init__(self, in_channels: int, out_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(in_channels + skip_channels, out_channels)
        self.conv2 = conv_bn_relu(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        result: Tensor = self.conv2(self.conv1(x))
        return result


class Decoder(nn.Module):
    """Tokens back to a map, and from 1/16 to full resolution in four steps.

    Args:
        hidden_size: width of the tokens.
        head_channels: channels of the map before the first step.
        channels: output channels of the four steps.
        skip_channels: channels of the skips in use, from 1/8 resolution on; none to three.

    Shape:
        tokens (B, g*g, hidden_size) and the skips -> (B, channels[3], 16g, 16g).
    """

    def __init__(
        self, hidden_size: int, head_channels: int, channels: Sequence[int], skip_channels: Sequence[int]
    ) -> None:
        super().__init__()
        self.skips_used = len(skip_channels)
        skips = [*skip_channels, *[0] * (len(channels) - len(skip_channels))]
        steps = pairwise([head_channels, *channels])
        self.conv_more = conv_bn_relu(hidden_size, head_channels)
        self.blocks = nn.ModuleList(DecoderBlock(*step, skip) for step, skip in zip(steps, skips, strict=True))

    def forward(self, tokens: Tensor, skips: Sequence[Tensor]) -> Tensor:
        x: Tensor = self.conv_more(rearrange(tokens, "b (h w) c -> b c h w", h=isqrt(tokens.shape[1])))
        for number, block in enumerate(self.blocks):
            x = block(x, skips[number] if number < self.skips_used else None)
        return x


class TransUNet(nn.Module):
    """TransUNet for square slices of one size; with a CNN (hybrid) if and only if `grid` is given.

    Args:
        img_size: edge S of the slices in pixels, a multiple of 16; the position embeddings fix it.
        num_classes: output channels, background included.
        hidden_size: width of the tokens.
        mlp_dim: width of the feed-forward layers.
        num_heads: attention heads; they divide `hidden_size`.
        num_layers: transformer blocks.
        attention_dropout_rate: on the attention's probabilities and after its output.
        dropout_rate: on the embeddings and in the feed-forward layers.
        classifier: "seg", the only value that the published code can run.
        n_skip: skips in use, 0 to 3, from 1/8 resolution on; default 3 with a CNN, else 0 and nothing else.
        decoder_channels: output channels of the four decoder steps.
        patch_size: token edges in pixels without a CNN, (16, 16); the hybrid ignores it, as published.
        grid: tokens per axis (S/16, S/16) of the hybrid, or None for the transformer on raw pixels.
        resnet_num_layers: residual units in the CNN's three blocks. Hybrid only, like the next two.
        resnet_width_factor: times 64 gives the CNN's width w, a multiple of 32.
        skip_channels: channels of the skips, (8w, 4w, w) and an unused fourth; default: these.
        head_channels: channels between the tokens and the first decoder step, 512 as published.

    Shape:
        image (B, C, S, S) with C 1 (repeated three times) or 3 -> logits (B, num_classes, S, S).

    Raises:
        ValueError: the configuration does not fit together, or the image is not C x S x S.
    """

    def __init__(
        self,
        img_size: int = 224,
        num_classes: int = 9,
        *,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        num_layers: int = 12,
        attention_dropout_rate: float = 0.0,
        dropout_rate: float = 0.1,
        classifier: str = "seg",
        n_skip: int | None = None,
        decoder_channels: Sequence[int] = (256, 128, 64, 16),
        patch_size: Sequence[int] = (16, 16),
        grid: Sequence[int] | None = None,
        resnet_num_layers: Sequence[int] = (3, 4, 9),
        resnet_width_factor: float = 1,
        skip_channels: Sequence[int] | None = None,
        head_channels: int = 512,
    ) -> None:
        super().__init__()
        hybrid = grid is not None
        n_skip = (3 if hybrid else 0) if n_skip is None else n_skip
        side = img_size // PIXELS_PER_TOKEN
        width = int(64 * resnet_width_factor)
        skip_widths = (8 * width, 4 * width, width)
        for wrong, problem in (
            (classifier != "seg", f"classifier is {classifier!r}; only 'seg' exists"),
            (num_classes < 1, f"num_classes is {num_classes}; at least 1 is needed"),
            (
                img_size < PIXELS_PER_TOKEN or img_size % PIXELS_PER_TOKEN,
                f"img_size is {img_size}; it must be a multiple of 16",
            ),
            (
                num_heads < 1 or hidden_size % num_heads,
                f"num_heads is {num_heads}; it must divide hidden_size {hidden_size}",
            ),
            (num_layers < 1, f"num_layers is {num_layers}; at least 1 is needed"),
            (len(decoder_channels) != 4, f"decoder_channels is {list(decoder_channels)}; it needs 4 entries"),
            (
                not hybrid and list(patch_size) != [PIXELS_PER_TOKEN] * 2,
                f"patch_size is {list(patch_size)}; the decoder needs [16, 16]",
            ),
            (not hybrid and n_skip != 0, f"n_skip is {n_skip}; without a CNN (no grid) there are no skips, give 0"),
            (hybrid and n_skip not in range(4), f"n_skip is {n_skip}; the CNN has 3 skips, give 0 to 3"),
            (
                grid is not None and list(grid) != [side, side],
                f"grid is {list(grid or ())}; img_size {img_size} needs [{side}, {side}], 16 pixels a token",
            ),
            (
                hybrid and (width < 32 or width % 32),
                f"resnet_width_factor is {resnet_width_factor}; 64 times it must be a multiple of 32",
            ),
            (
                hybrid and (len(resnet_num_layers) != 3 or min(resnet_num_layers) < 1),
                f"resnet_num_layers is {list(resnet_num_layers)}; it needs 3 entries of at least 1",
            ),
            (
                hybrid and skip_channels is not None and tuple(skip_channels[:n_skip]) != skip_widths[:n_skip],
                f"skip_channels is {list(skip_channels or ())}; "
                f"resnet_width_factor {resnet_width_factor} needs {list(skip_widths)} first",
            ),
        ):
            if wrong:
                raise ValueError(f"TransUNet: {problem}")

        self.img_size, self.num_heads = img_size, num_heads
        cnn = HybridCNN(width, resnet_num_layers) if hybrid else None
        self.transformer = Transformer(
            Embeddings(cnn, 16 * width if hybrid else 3, hidden_size, side**2, dropout_rate),
            Encoder(
                [
                    TransformerBlock(
                        hidden_size,
                        mlp_dim,
                        num_heads,
                        attention_dropout=attention_dropout_rate,
                        dropout=dropout_rate,
                    )
                    for _ in range(num_layers)
                ],
                hidden_size,
            ),
        )
        self.decoder = Decoder(hidden_size, head_channels, decoder_channels, skip_widths[:n_skip])
        self.segmentation_head = nn.Sequential(nn.Conv2d(decoder_channels[-1], num_classes, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"TransUNet: image is {tuple(image.shape)}; it must be (B, C, H, W) with C 1 or 3")
        for axis, size in zip(("height", "width"), image.shape[2:], strict=True):
            if size != self.img_size:
                raise ValueError(f"TransUNet: {axis} is {size}; img_size {self.img_size} allows no other size")
        tokens, skips = self.transformer(image.expand(-1, 3, -1, -1))
        logits: Tensor = self.segmentation_head(self.decoder(tokens, skips))
        return logits


def fit(size: Sequence[int], *, in_channels: int, out_channels: int, given: Mapping[str, Any]) -> Fit:
    """The hybrid for square slices that cover `size`; a smaller network, or the one without a CNN, is for `given`.

    Raises:
        ValueError: neither one channel nor three.
    """
    if in_channels not in (1, 3):
        raise ValueError(f"TransUNet: {in_channels} channels; it takes 1 or 3")
    smallest = 2 * PIXELS_PER_TOKEN  # the shortcut's norm needs more than one pixel
    edge = int(given.get("img_size") or max(smallest, *round_up(size, PIXELS_PER_TOKEN)))
    side = edge // PIXELS_PER_TOKEN
    return Fit({"img_size": edge, "num_classes": out_channels, "grid": [side, side], **given}, (edge, edge))


ENCODER = ("transformer.",)
"""Prefixes of the encoder's tensors; `freeze_encoder` holds what a pretrained start gave them."""

FACTS = Facts(
    title="TransUNet",
    paper="Chen et al., TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation, 2021, "
    "arXiv 2102.04306",
    code="github.com/Beckschen/TransUNet",
    code_license="Apache-2.0",
    spatial_dims=(2,),
    input_rule="1 or 3 channels; slices S x S of the one size img_size, a multiple of 16, 32 or more",
    default={"img_size": 224, "num_classes": 9, "grid": (14, 14)},
    default_input=(1, 1, 224, 224),
    parameters=105_277_081,
    gmacs=29.2,
    weights="the authors publish ImageNet-21k weights of the encoder (R50+ViT-B_16.npz), no trained segmenter",
    results=(
        ("Synapse, 8 organs, 12 test volumes", "mean Dice 77.48 %, HD95 31.69 voxels"),
        (
            "Synapse, each organ",
            "aorta 87.23, gallbladder 63.13, left kidney 81.87, right kidney 77.02, liver 94.08, pancreas 55.86, "
            "spleen 85.08, stomach 75.62 % Dice",
        ),
        ("ACDC", "mean Dice 0.8971"),
    ),
)
