"""Write the project's own golden cases: ``python -m tests.golden.make_fixtures [NAME ...]``.

One small case for each architecture, computed by this project when all cases of the published networks pass. They hold
the parity where those cases are not at hand; run this only after a wanted change of the cases themselves.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from medseg.checkpoints import load_published
from medseg.networks import create, names
from tests.golden.cases import HERE, draw_input, fill, find_cases, strided

_STORED = 2_000  # values of each output, about

# The published configurations cut down until a forward pass takes a second; input sizes that need padding, masks and
# unequal axes where the architecture has them.
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "dformer": (
        {"num_classes": 3, "embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "group_size": [2, 7, 7]},
        [1, 1, 32, 96, 64],
    ),
    "dynunet": (
        {"in_channels": 1, "out_channels": 3, "filters": [4, 6, 8, 12], "res_block": True, "deep_supervision": True},
        [1, 1, 48, 32, 40],
    ),
    "mdpformer": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "patient_classes": 4,
            "channels": [4, 6, 8, 12],
            "fold": True,
            "hidden_size": 24,
            "num_heads": 2,
            "depths": [1, 2, 1],
            "free_tokens": 3,
        },
        [1, 3, 32, 48, 64],
    ),
    "paratranscnn": (
        {"n_channels": 3, "num_classes": 4, "heads": 4, "dim": 32, "depth": [1, 2, 1], "patch_size": 2},
        [1, 3, 64, 64],
    ),
    "plain_conv_unet": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "features_per_stage": [4, 6, 8],
            "kernel_sizes": [[1, 3, 3], 3, 3],
            "strides": [1, [1, 2, 2], 2],
            "deep_supervision": True,
        },
        [1, 1, 24, 32, 40],
    ),
    "resenc_unet": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "features_per_stage": [4, 6, 8],
            "kernel_sizes": [[1, 3, 3], 3, 3],
            "strides": [1, [1, 2, 2], 2],
            "n_blocks_per_stage": [1, 2, 2],
            "deep_supervision": True,
        },
        [1, 1, 24, 32, 40],
    ),
    "swin_umamba": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "feature_sizes": [8, 16, 32, 64, 128],
            "hidden_size": 128,
            "encoder_depths": [1, 1, 2, 1],
            "encoder_dims": [16, 32, 64, 128],
            "d_state": 16,
            "norm": "instance",
            "residual_blocks": True,
            "deep_supervision": True,
        },
        [1, 1, 64, 96],
    ),
    "swin_umamba_d": (
        {
            "in_channels": 1,
            "out_channels": 3,
            "patch_size": 4,
            "encoder_depths": [1, 1, 2, 1],
            "dims": [16, 32, 64, 128],
            "decoder_depths": [2, 2, 2],
            "d_state": 16,
            "deep_supervision": True,
        },
        [1, 1, 64, 96],
    ),
    "swin_unetr": (
        {"in_channels": 1, "out_channels": 3, "feature_size": 12, "merging": "legacy", "use_v2": True},
        [1, 1, 64, 32, 32],
    ),
    "transunet": (
        {
            "img_size": 64,
            "num_classes": 3,
            "hidden_size": 24,
            "mlp_dim": 48,
            "num_heads": 3,
            "num_layers": 2,
            "attention_dropout_rate": 0.0,
            "dropout_rate": 0.1,
            "classifier": "seg",
            "n_skip": 3,
            "decoder_channels": [32, 24, 16, 8],
            "patch_size": [16, 16],
            "grid": [4, 4],
            "resnet_num_layers": [1, 2, 1],
            "resnet_width_factor": 0.5,
            "skip_channels": [256, 128, 32, 16],
        },
        [1, 1, 64, 64],
    ),
}

# Where the network's own keys are not the published ones, the keys are those of a published case of the same config.
_PUBLISHED_KEYS = {"paratranscnn": "small_64"}

_KINDS = (
    ("num_batches_tracked", "zero"),
    ("relative_position_index", "keep"),
    ("running_var", "var"),
    ("running_mean", "shift"),
    ("A_logs", "a_log"),
    ("A_log", "a_log"),
    ("dt_projs_bias", "dt_bias"),
    ("Ds", "scale"),
    ("x_proj_weight", "shift"),
    ("dt_projs_weight", "shift"),
    ("bias", "shift"),
    ("bias_table", "shift"),
    ("position_embeddings", "shift"),
)


def kind_of(key: str, shape: tuple[int, ...]) -> str:
    """How a tensor is filled, from its name and shape."""
    for ending, kind in _KINDS:
        if key.endswith(ending):
            return kind
    return "weight" if len(shape) > 1 else "scale"


def published_entries(name: str, config: dict[str, Any]) -> list[tuple[str, list[int], str]]:
    """Key, shape and kind of each tensor of the published state dict."""
    if name in _PUBLISHED_KEYS:
        case = next(case for case in find_cases(name) if case.path.stem in (name, _PUBLISHED_KEYS[name]))
        return [(key, shape, kind) for key, shape, kind in case.description()["state"]]
    own = create(name, **config).state_dict()
    return [(key, list(value.shape), kind_of(key, tuple(value.shape))) for key, value in own.items()]


def main() -> None:
    """Write the cases that are named on the command line, or all."""
    for name in sys.argv[1:] or names():
        config, shape = CASES[name]
        state = published_entries(name, config)
        network = load_published(name, config, fill(state))
        with torch.inference_mode():
            results = network(torch.from_numpy(draw_input("image", shape)))
        results = (results,) if isinstance(results, torch.Tensor) else results
        outputs, stored = {}, {}
        for index, result in enumerate(results):
            axes = result.ndim - 2
            step = max(1, round((result.numel() / _STORED) ** (1 / max(axes, 1))))
            stride = [1, 1, *[step] * axes]
            outputs[f"out{index}"] = {"shape": list(result.shape), "stride": stride}
            stored[f"out{index}"] = strided(result.numpy(), stride)
        case = {
            "source": "medseg itself",
            "config": config,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "inputs": {"image": shape},
            "outputs": outputs,
        }
        entries = ",\n".join(json.dumps(entry) for entry in state)
        text = json.dumps(case, indent=1)[:-2] + f',\n "state": [\n{entries}\n]\n}}\n'
        (HERE / f"{name}.json").write_text(text)
        np.savez_compressed(HERE / f"{name}.npz", **stored)
        sizes = [(HERE / f"{name}{ending}").stat().st_size for ending in (".json", ".npz")]
        print(name, "bytes:", *sizes)  # noqa: T201, a command line tool


if __name__ == "__main__":
    main()
