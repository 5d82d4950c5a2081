"""``medseg bundles pack``: a finished run becomes a complete bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import load_bundle
from medseg.bundles.spec import BundleSpec, read_json
from medseg.errors import BundleError, InputError, OutputError, UsageError

_HALF_LIMIT = 65504.0  # largest float16
_LICENSES = {
    "CC-BY-SA 4.0": "Creative Commons Attribution-ShareAlike 4.0 International\n"
    "https://creativecommons.org/licenses/by-sa/4.0/legalcode\n",
}


def pack_bundle(
    run: Path,
    name: str,
    folder: Path,
    *,
    half: bool = True,
    evaluation: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Make a bundle folder of a run folder.

    Args:
        run: folder that ``medseg train`` wrote.
        name: the bundle's name, a-z, 0-9 and _.
        folder: gets the bundle as a folder of that name.
        half: store floating-point weights as float16, which halves the file; the network computes in float32.
        evaluation: JSON of ``medseg evaluate``, whose figures go into metadata.json and docs/README.md.
        overwrite: replace a bundle of that name.

    Returns:
        The bundle's folder.

    Raises:
        UsageError: a name that a bundle cannot have.
        BundleError: the run holds no weights that fit. InputError: `evaluation` cannot be read.
        OutputError: the bundle exists, or cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UsageError("--name", f"{name!r} is not made of a-z, 0-9 and _", "e.g. swin_unetr_spleen")
    target = folder / name
    if target.exists() and not overwrite:
        raise OutputError(target, "exists", "use --overwrite, or another --name")
    bundle = load_bundle(run)
    if bundle.weights is None:
        raise BundleError(run, "holds no models/model.pt yet", "train until the first validation")
    metadata = json.loads((run / "configs" / "metadata.json").read_text(encoding="utf-8"))
    metadata["name"] = name
    figures = {} if evaluation is None else _figures(evaluation)
    metadata["eval_metrics"] = figures
    metadata.get("medseg", {}).pop("validated_backends", None)  # of the run's weights, and these are rounded
    aside = folder / f".{name}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "models").mkdir(parents=True)
        shutil.copytree(run / "configs", aside / "configs")
        (aside / "configs" / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        _hide_folders(aside / "configs" / "train.json")
        _write_weights(bundle.weights, aside / "models" / "model.pt", half=half)
        _write_docs(aside, name, bundle.spec, metadata, figures)
        write_manifest(aside)
        replace(load_bundle(aside), name=name).network()  # whatever would fail later fails here, before the rename
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    except OSError as err:
        raise OutputError(target, f"cannot be written ({err.strerror})", "choose another folder") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _hide_folders(train: Path) -> None:
    """Keep the names of what a run started and learned from, and not the folders of the machine it ran on."""
    if train.is_file():
        content = read_json(train)
        training = content.get("training", {})
        for key in ("weights", "bundle", "soft_labels"):
            if training.get(key):
                training[key] = Path(training[key]).name
        train.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(source: Path, target: Path, *, half: bool) -> None:
    import torch

    from medseg.checkpoints.files import read

    state = {key: tensor.contiguous() for key, tensor in read(source).items()}
    if half:
        for key, tensor in state.items():
            if tensor.is_floating_point():
                if float(tensor.abs().max()) > _HALF_LIMIT:
                    raise BundleError(source, f"{key} does not fit into float16", "pack with --full")
                state[key] = tensor.to(torch.float16)
    torch.save({"model": state}, target)


def _figures(path: Path) -> dict[str, float]:
    """Mean Dice, HD95 and NSD of each label from an evaluation's JSON."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
        return {
            f"{row['metric']} {row['name']}": round(row["mean"], 4)
            for row in summary
            if row["metric"] in ("dice", "hd95_mm", "nsd") and row["mean"] is not None
        }
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(path, f"is not an evaluation ({err!r})", "write it with medseg evaluate -o FILE.json") from err


def _write_docs(
    root: Path, name: str, spec: BundleSpec, metadata: Mapping[str, Any], figures: Mapping[str, float]
) -> None:
    own = metadata.get("medseg", {})
    licence = own.get("data_license", "")
    credit = metadata.get("data_source", "")
    terms = _LICENSES.get(licence, f"{licence or 'the licence of the training data'}\n")
    (root / "LICENSE").write_text(
        f"The weights in models/ were trained on data under {licence or 'a licence not stated'} and are offered under "
        f"the same terms:\n\n{terms}\nThe configuration files in configs/ are under the Apache License 2.0.\n",
        encoding="utf-8",
    )
    docs = root / "docs"
    docs.mkdir()
    (docs / "data_license.txt").write_text(f"{credit}\n\n{terms}", encoding="utf-8")
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items()) or "| not measured | |"
    labels = "\n".join(f"| {value} | {label} |" for value, label in spec.labels.items())
    text = f"""# {name}

## Overview

{metadata.get("task", "")}. {metadata.get("description", "")}.
Trained on a small data set, for research only: not a medical device, not for diagnosis.

## Data

{credit or "not stated"}. Licence: {licence or "not stated"}.
{own.get("training_cases", "?")} cases to learn from, {own.get("held_out_cases", "?")} held out to choose the weights.

## Input and output

{spec.in_channels} channel(s) ({", ".join(spec.channels)}), orientation {spec.orientation}, {spec.spacing} mm,
window {spec.roi_size}, padding {spec.padding} {spec.padding_value}.
Field of view in training, mm: {own.get("suitability", {}).get("extent_mm")}.

| value | label |
| --- | --- |
{labels}

## Performance

| metric | mean |
| --- | --- |
{rows}

## Commands

    medseg infer scan.nii.gz --bundle {name}
    medseg bundles verify {name}
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir FOLDER

## License

See LICENSE and docs/data_license.txt.
"""
    (docs / "README.md").write_text(text, encoding="utf-8")
