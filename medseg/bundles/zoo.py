"""Bundles of other authors in the layout of MONAI's model zoo, read into the specification of medseg's own engine.

Four sections of inference.json (or .yaml) are read: network_def, preprocessing, inferer, postprocessing. Each step must
be one that medseg does itself, to the same numbers; a step or argument outside the list is refused by name. Nothing is
imported or executed on the way: see `medseg.bundles.zoo_expressions` for what references and expressions may say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.bundles.spec import (
    Activation,
    BundleSpec,
    CropForeground,
    IntensityStep,
    Interpolation,
    KeepLargest,
    NormalizeIntensity,
    Region,
    ScaleIntensity,
    ScaleIntensityRange,
    ScaleIntensityRangePercentiles,
    SliceSpec,
    Suitability,
    WayBack,
    check_spec,
    config_files,
    is_foreign,
    parse_calibration,
    read_json,
)
from medseg.bundles.zoo_expressions import TRUST, Configuration, painted
from medseg.bundles.zoo_networks import checked_arguments, known_networks, zoo_network
from medseg.errors import BundleError

OWN_NETWORK = "own code"
"""`BundleSpec.network` of a bundle that brings its network as code."""

_IMAGE, _PREDICTION = "image", "pred"
# Arguments that say where or in which container something is computed, not what comes out.
_FREE = {"keys", "allow_missing_keys", "device", "lazy", "track_meta", "data_type", "wrap_sequence", "_desc_"}
_FREE |= {"meta_keys", "meta_key_postfix", "orig_meta_keys", "drop_meta", "non_blocking", "image_only"}
# What medseg's own reader and writer stand for, whatever the arguments.
_READING = {"LoadImaged", "EnsureChannelFirstd", "AddChanneld", "AsChannelFirstd"}
_NOTHING = {"ToTensord", "ToDeviced", "SelectItemsd", "DeleteItemsd", "Identityd", "FlattenSubKeysd"}
_TYPES = {"EnsureTyped", "CastToTyped"}
_ABOVE_ZERO = {"$lambdax:x>0", "$lambdaimg:img>0", "$monai.transforms.utils.is_positive"}
_MODALITIES = {"ct": "CT", "mr": "MR", "mri": "MR"}
# Nested structures that the BraTS challenge made usual, in the order of painting.
_NESTED = ({"whole tumor", "wt"}, {"tumor core", "tc"}, {"enhancing tumor", "et"})


@dataclass(frozen=True)
class _Step:
    """A transform: its class's short name, its arguments as written, and where it stands."""

    name: str
    arguments: Mapping[str, Any]
    path: str


@dataclass
class _Before:
    """What the steps of preprocessing add up to."""

    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    interpolation: Interpolation = "linear"
    intensity: list[IntensityStep | CropForeground] = field(default_factory=list)
    padded: tuple[int, ...] = ()


@dataclass
class _After:
    """What the steps of postprocessing add up to."""

    activation: Activation | None = None
    discrete: Activation | None = None
    inverted: bool = False
    way_back: WayBack = "linear"
    painting: list[tuple[int, int]] = field(default_factory=list)
    label_steps: list[KeepLargest] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse_zoo(
    metadata: Mapping[str, Any], tree: Mapping[str, Any], where: Path, *, own_network: bool = False
) -> BundleSpec:
    """A `BundleSpec` from the two parsed files.

    Args:
        metadata: content of metadata.json.
        tree: content of inference.json.
        where: the latter's path, for errors.
        own_network: the network is the bundle's own code, which others build; network_def is not read.

    Raises:
        BundleError: something is missing, contradictory, or not on the list; the message names it.
    """
    config = Configuration(tree, where)
    network, network_args = (OWN_NETWORK, {}) if own_network else _network(config)
    before, after, window = _preprocessing(config), _postprocessing(config), _inferer(config)
    channels, outputs, modality = _format(metadata, where.with_name("metadata.json"))
    activation: Activation = after.discrete or after.activation or "softmax"
    regions, labels = _labels(outputs, activation, after.painting)
    if any(label not in labels for step in after.label_steps for label in step.labels):
        raise BundleError(where, "KeepLargestConnectedComponentd names a label that there is not", "correct it")
    _check_padding(config, before.padded, window)
    notes = list(after.notes)
    own = metadata.get("medseg", {})
    if activation == "sigmoid" and own.get("regions"):
        regions, labels = _own_regions(own, outputs, where.with_name("metadata.json"))
    elif regions and not after.painting:
        notes.append(
            "overlapping channels became one label map, later labels over earlier ones; --probabilities has all"
        )
    spec = BundleSpec(
        network=network,
        network_args=network_args,
        channels=channels,
        labels=labels,
        activation=activation,
        orientation=before.orientation,
        spacing=before.spacing,
        interpolation=before.interpolation,
        intensity=tuple(before.intensity),
        regions=regions,
        mirror_axes=tuple(own.get("mirror_axes", ())),
        suitability=Suitability(modality=modality),
        calibration=parse_calibration(own.get("calibration", {})),
        way_back=after.way_back,
        label_steps=tuple(after.label_steps),
        notes=tuple(notes),
        **window,
    )
    check_spec(spec, len(outputs), where)
    return spec


def stated_weights(root: Path) -> Path | None:
    """The weights that the configuration of a bundle of others has loaded; None where it does not tell.

    Raises:
        BundleError: it names a file that is not in the bundle.
    """
    where = config_files(root)[1]
    tree = read_json(where)
    if not is_foreign(tree):
        return None
    config = Configuration(tree, where)
    handlers = tree.get("handlers")
    loaders = [tree.get("checkpointloader"), *(handlers if isinstance(handlers, list) else [])]
    for loader in loaders:
        if not (isinstance(loader, dict) and str(loader.get("_target_")).rpartition(".")[2] == "CheckpointLoader"):
            continue
        try:
            named = str(config.value(loader.get("load_path"), "load_path"))
            base = str(config.value(tree.get("bundle_root", "."), "bundle_root"))
        except BundleError:
            return None  # only code tells; models/model.pt is what the zoo means
        if named.startswith("/") and not named.startswith(base):
            return None  # a folder of its authors
        path = root / named.removeprefix(base).lstrip("/")
        if not path.is_file() or not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(where, f"has {named!r} loaded, which is not in the bundle", "put the weights there")
        return path
    return None


def bare_spec(metadata: Mapping[str, Any], where: Path) -> BundleSpec:
    """What metadata.json alone tells, of a bundle that runs its own pipeline; `where` is its configuration's path.

    Raises:
        BundleError: metadata.json does not tell inputs and outputs.
    """
    channels, outputs, modality = _format(metadata, where.with_name("metadata.json"))
    return BundleSpec(
        network=OWN_NETWORK,
        network_args={},
        channels=channels,
        labels=outputs,
        roi_size=(1, 1, 1),
        orientation=None,
        suitability=Suitability(modality=modality),
    )


def overlapping(outputs: Mapping[int, str]) -> tuple[tuple[Region, ...], dict[int, str]]:
    """Regions and labels of channels that overlap, where no rule is stated: see `_labels`."""
    return _labels(outputs, "sigmoid", ())


def _format(metadata: Mapping[str, Any], where: Path) -> tuple[tuple[str, ...], dict[int, str], str]:
    """Names of the input and output channels, and the modality ("" where it is none that medseg can tell)."""
    try:
        io_format = metadata["network_data_format"]
        image, pred = (_only(io_format[group], name) for group, name in (("inputs", _IMAGE), ("outputs", _PREDICTION)))
        inputs, outputs = _channel_names(image, "channel"), _channel_names(pred, "label")
        return tuple(inputs.values()), outputs, _MODALITIES.get(str(image.get("modality", "")).lower(), "")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise BundleError(where, f"network_data_format is missing or malformed ({err!r})", "correct it") from err


def _only(group: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = group[name] if name in group or len(group) != 1 else next(iter(group.values()))
    return found


def _channel_names(tensor: Mapping[str, Any], unnamed: str) -> dict[int, str]:
    count = int(tensor["num_channels"])
    if not 1 <= count <= 1000:
        raise ValueError(f"num_channels {count}")
    stated = {int(number): str(name) for number, name in dict(tensor.get("channel_def") or {}).items()}
    found: dict[int, str] = {}
    for number in range(count):
        name = stated.get(number, f"{unnamed} {number}")
        found[number] = name if name not in found.values() else f"{name} {number}"
    return found


def _network(config: Configuration) -> tuple[str, dict[str, Any]]:
    section = config.shallow(config.tree.get("network_def"), "network_def")
    if not isinstance(section, dict):
        raise BundleError(config.where, "no section 'network_def'", f"medseg builds networks from it; {TRUST}")
    target = config.shallow(section.get("_target_"), "network_def::_target_")
    name = zoo_network(str(target))
    if name is None:
        known = f"medseg knows medseg.networks and of MONAI {known_networks()}"
        raise BundleError(config.where, f"network_def is {target!r}", f"{known}; {TRUST}")
    given = {key: value for key, value in section.items() if key not in ("_target_", "_desc_")}
    arguments = {key: config.value(value, f"network_def::{key}") for key, value in given.items()}
    try:
        return name, checked_arguments(name, arguments)
    except ValueError as err:
        raise BundleError(config.where, f"network_def: {err}", TRUST) from err


def _steps(config: Configuration, section: str, key: str) -> list[_Step]:
    """The transforms of a Compose that touch `key`, disabled ones left out."""
    node = config.shallow(config.tree.get(section), section)
    if node is None:
        return []
    if isinstance(node, dict):
        target = config.shallow(node.get("_target_"), f"{section}::_target_")
        if _short(target) != "Compose":
            raise BundleError(config.where, f"{section} is {target!r}, not a Compose", TRUST)
        node = config.shallow(node.get("transforms"), f"{section}::transforms")
    if not isinstance(node, list):
        raise BundleError(config.where, f"{section} is not a Compose of transforms", TRUST)
    found = []
    for number, written in enumerate(node):
        path = f"{section}::{number}"
        entry = config.shallow(written, path)
        if not isinstance(entry, dict):
            raise BundleError(config.where, f"{path} is {written!r}, not a transform", TRUST)
        if config.value(entry.get("_disabled_", False), f"{path}::_disabled_") in (True, "true", "True"):
            continue
        target = config.shallow(entry.get("_target_"), f"{path}::_target_")
        name = _short(target)
        if name is None:
            raise BundleError(config.where, f"{path} is {target!r}, code of the bundle's own or of others", TRUST)
        arguments = {name: value for name, value in entry.items() if name not in ("_target_", "_disabled_")}
        keys = config.value(arguments.get("keys", []), f"{path}::keys")
        if key in (keys if isinstance(keys, list) else [keys]):
            found.append(_Step(name, arguments, path))
        elif name not in _NOTHING:
            raise BundleError(config.where, f"{path} ({name}) works on {keys!r}, not on {key!r}", TRUST)
    return found


def _short(target: Any) -> str | None:
    """The name of one of MONAI's transforms in the spelling that ends in d; None for anything else."""
    prefix, _, name = str(target).rpartition(".")
    if prefix not in ("", "monai.transforms") and not prefix.startswith("monai.transforms."):
        return None
    for ending in ("Dict", "D"):
        if name.endswith(ending) and len(name) > len(ending):
            return name.removesuffix(ending) + "d"
    return name if name.isidentifier() else None


class _Arguments:
    """A step's arguments, taken one by one; what is left over in the end is refused.

    Args:
        config: works out references and expressions.
        step: the step.
    """

    def __init__(self, config: Configuration, step: _Step) -> None:
        self._config, self._step = config, step
        self._left = {name: value for name, value in step.arguments.items() if name not in _FREE}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an argument; of a list with one entry for each key, the first."""
        if name not in self._left:
            return default
        return self._config.value(self._left.pop(name), f"{self._step.path}::{name}")

    def written(self, name: str) -> Any:
        """The value of an argument as it stands in the file."""
        return self._left.pop(name, None)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A truth value; some bundles write the text "True"."""
        value = self.take(name, default)
        value = value[0] if isinstance(value, list) and value else value
        if value not in (True, False, None, "True", "true"):
            self.refuse(name, value)
        return bool(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(name, value)
        return float(value)

    def only(self, name: str, *allowed: Any) -> None:
        """Take an argument that must be absent, none, or one of these values."""
        value = self.take(name)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if value is not None and value not in allowed:
            self.refuse(name, value)

    def off(self, *names: str) -> None:
        """Take flags that must not be set."""
        for name in names:
            if self.flag(name):
                self.refuse(name, True)  # noqa: FBT003  the value that was found

    def ignore(self, *names: str) -> None:
        """Leave arguments out that do not change the result, without working them out."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, name: str, value: Any) -> None:
        """Raise for an argument whose value medseg does not do."""
        raise BundleError(
            self._config.where,
            f"{self._step.path} ({self._step.name}): {name} is {value!r}, which medseg does not do",
            TRUST,
        )

    def done(self) -> None:
        """Refuse what nobody asked for."""
        for name, value in self._left.items():
            self.refuse(name, value)


def _preprocessing(config: Configuration) -> _Before:
    found = _Before()
    for step in _steps(config, "preprocessing", _IMAGE):
        if step.name in _READING | _NOTHING:
            continue
        arguments = _Arguments(config, step)
        try:
            _read_step(config, step, arguments, found)
        except (KeyError, TypeError, ValueError) as err:
            raise BundleError(config.where, f"{step.path} ({step.name}): {err}", "correct its arguments") from err
        arguments.done()
    return found


def _read_step(config: Configuration, step: _Step, arguments: _Arguments, found: _Before) -> None:
    if step.name in _TYPES:
        arguments.only("dtype", "float32")
    elif step.name in ("Orientationd", "Spacingd"):
        if found.intensity or found.padded:
            raise BundleError(
                config.where, f"{step.path} ({step.name}) after a step that changes values or size", TRUST
            )
        if step.name == "Orientationd":
            arguments.ignore("labels")
            canonical = arguments.flag("as_closest_canonical")
            found.orientation = "RAS" if canonical else str(arguments.take("axcodes"))
            if len(found.orientation) != 3 or {*found.orientation} not in [
                {a, b, c} for a in "LR" for b in "AP" for c in "SI"
            ]:
                arguments.refuse("axcodes", found.orientation)
        else:
            found.spacing, found.interpolation = _spacing(arguments)
    elif step.name == "SpatialPadd":
        arguments.only("mode", "constant")
        arguments.only("method", "symmetric")
        arguments.only("value", 0)
        found.padded = _sizes(arguments.take("spatial_size"))
    elif step.name in _INTENSITY:
        found.intensity.append(_INTENSITY[step.name](arguments))
        arguments.only("dtype", "float32")
    else:
        known = sorted({*_READING, *_NOTHING, *_TYPES, *_INTENSITY, "Orientationd", "Spacingd", "SpatialPadd"})
        raise BundleError(
            config.where, f"{step.path} is {step.name}, which medseg does not do", f"known: {', '.join(known)}; {TRUST}"
        )


def _spacing(arguments: _Arguments) -> tuple[tuple[float, float, float], Interpolation]:
    sizes = arguments.take("pixdim")
    sizes = [float(size) for size in (sizes if isinstance(sizes, list) else [sizes])]
    sizes += sizes[-1:] * (3 - len(sizes))  # as MONAI: what is missing is the last
    if len(sizes) != 3 or min(sizes) <= 0:
        arguments.refuse("pixdim", sizes)
    mode = arguments.take("mode", "bilinear")
    mode = mode[0] if isinstance(mode, list) and mode else mode
    if mode not in ("bilinear", 3):
        arguments.refuse("mode", mode)
    arguments.only("padding_mode", "border")
    arguments.off("diagonal", "scale_extent", "align_corners")
    arguments.only("min_pixdim")
    arguments.only("max_pixdim")
    arguments.only("dtype", "float64", "float32")
    arguments.ignore("recompute_affine", "ensure_same_shape")
    x, y, z = sizes
    return (x, y, z), "cubic" if mode == 3 else "linear"


def _normalize(arguments: _Arguments) -> IntensityStep:
    nonzero, channel_wise = arguments.flag("nonzero"), arguments.flag("channel_wise")
    mean, deviation = arguments.take("subtrahend"), arguments.take("divisor")
    if mean is None and deviation is None:
        return NormalizeIntensity(nonzero=nonzero, channel_wise=channel_wise)
    numbers = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in (mean, deviation)]
    if nonzero or not all(isinstance(one, int | float) for one in numbers) or not numbers[1]:
        arguments.refuse("subtrahend, divisor", [mean, deviation])
    return ScaleIntensityRange(float(numbers[0]), float(numbers[0]) + float(numbers[1]), clip=False)


def _scale(arguments: _Arguments) -> IntensityStep:
    arguments.only("factor")
    return ScaleIntensity(arguments.number("minv", 0.0), arguments.number("maxv", 1.0), arguments.flag("channel_wise"))


def _scale_range(arguments: _Arguments) -> IntensityStep:
    bounds = arguments.take("b_min"), arguments.take("b_max")
    clip = arguments.flag("clip")
    if (None in bounds) and (clip or bounds != (None, None)):
        arguments.refuse("b_min, b_max", list(bounds))
    low, high = (0.0, 1.0) if None in bounds else (float(bounds[0]), float(bounds[1]))
    return ScaleIntensityRange(arguments.number("a_min"), arguments.number("a_max"), low, high, clip=clip)


def _scale_percentiles(arguments: _Arguments) -> IntensityStep:
    arguments.off("relative")
    return ScaleIntensityRangePercentiles(
        arguments.number("lower"),
        arguments.number("upper"),
        arguments.number("b_min"),
        arguments.number("b_max"),
        arguments.flag("clip"),
        arguments.flag("channel_wise"),
    )


def _crop(arguments: _Arguments) -> CropForeground:
    arguments.only("source_key", _IMAGE)
    function = arguments.written("select_fn")
    if function is not None and "".join(str(function).split()) not in _ABOVE_ZERO:
        arguments.refuse("select_fn", function)
    arguments.only("channel_indices")
    arguments.only("k_divisible", 1)
    arguments.only("mode", "constant")
    arguments.ignore("start_coord_key", "end_coord_key")
    margin, cut = _sizes(arguments.take("margin", 0)), arguments.flag("allow_smaller")
    if any(margin) and not cut:  # MONAI would pad
        arguments.refuse("margin", list(margin))
    x, y, z = margin
    return CropForeground((x, y, z))


_INTENSITY: Mapping[str, Callable[[_Arguments], IntensityStep | CropForeground]] = {
    "CropForegroundd": _crop,
    "NormalizeIntensityd": _normalize,
    "ScaleIntensityd": _scale,
    "ScaleIntensityRanged": _scale_range,
    "ScaleIntensityRangePercentilesd": _scale_percentiles,
}


def _sizes(value: Any) -> tuple[int, ...]:
    """Three voxel counts, from three or from one for all."""
    given = value if isinstance(value, list) else [value] * 3
    return tuple(int(size) for size in given)


def _inferer(config: Configuration) -> dict[str, Any]:
    """The window's fields of `BundleSpec`."""
    section = config.shallow(config.tree.get("inferer"), "inferer")
    if not isinstance(section, dict):
        raise BundleError(config.where, "no section 'inferer'", TRUST)
    target = str(config.shallow(section.get("_target_"), "inferer::_target_"))
    name = target.removeprefix("monai.inferers.").removeprefix("inferer.")
    if name not in ("SlidingWindowInferer", "SliceInferer"):
        raise BundleError(
            config.where, f"inferer is {target!r}", f"medseg knows SlidingWindowInferer and SliceInferer; {TRUST}"
        )
    given = {key: value for key, value in section.items() if key != "_target_"}
    arguments = _Arguments(config, _Step(name, given, "inferer"))
    arguments.only("sigma_scale", 0.125)
    arguments.off("with_coord")
    arguments.ignore("sw_device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps", "buffer_dim")
    sizes, slices = arguments.take("roi_size"), None
    if name == "SliceInferer":
        axis = int(arguments.number("spatial_dim", 0))
        slices = SliceSpec(axis)
        sizes = [*sizes[:axis], 1, *sizes[axis:]] if isinstance(sizes, list) and len(sizes) == 2 else sizes
    if not (isinstance(sizes, int) or (isinstance(sizes, list) and len(sizes) == 3)) or min(_sizes(sizes)) < 1:
        arguments.refuse("roi_size", sizes)
    overlap = arguments.take("overlap", 0.25)
    overlap = overlap[0] if isinstance(overlap, list) and len(set(overlap)) == 1 else overlap
    if isinstance(overlap, bool) or not isinstance(overlap, int | float):
        arguments.refuse("overlap", overlap)
    found = {
        "roi_size": _sizes(sizes),
        "overlap": float(overlap),
        "blend": arguments.take("mode", "constant"),
        "padding": arguments.take("padding_mode", "constant"),
        "padding_value": arguments.number("cval", 0.0),
        "sw_batch_size": int(arguments.number("sw_batch_size", 1)),
        "slices": slices,
    }
    arguments.done()
    return found


def _check_padding(config: Configuration, padded: Sequence[int], window: Mapping[str, Any]) -> None:
    """Padding up to the window's size is what the window does itself; more would move the windows."""
    same = window["padding"] == "constant" and window["padding_value"] == 0
    if padded and not (same and all(size <= roi for size, roi in zip(padded, window["roi_size"], strict=True))):
        raise BundleError(config.where, f"SpatialPadd to {list(padded)} beside the window {window['roi_size']}", TRUST)


def _postprocessing(config: Configuration) -> _After:
    found = _After()
    for step in _steps(config, "postprocessing", _PREDICTION):
        if step.name == "SaveImaged" or step.name in _NOTHING | _TYPES:
            continue
        arguments = _Arguments(config, step)
        if step.name not in _AFTER:
            known = sorted({*_AFTER, *_NOTHING, *_TYPES, "SaveImaged"})
            raise BundleError(
                config.where,
                f"{step.path} is {step.name}, which medseg does not do",
                f"known: {', '.join(known)}; {TRUST}",
            )
        _AFTER[step.name](arguments, step, found)
        arguments.done()
    if found.activation == "sigmoid" and found.discrete is None:
        found.discrete = "sigmoid"
    return found


def _activation(arguments: _Arguments, _step: _Step, found: _After) -> None:
    sigmoid, softmax = arguments.flag("sigmoid"), arguments.flag("softmax")
    arguments.only("other")
    arguments.only("dim", 0)
    if found.discrete is not None or (sigmoid and softmax):
        arguments.refuse("sigmoid", sigmoid)
    found.activation = "sigmoid" if sigmoid else "softmax" if softmax else found.activation


def _discrete(arguments: _Arguments, _step: _Step, found: _After) -> None:
    arguments.off("to_onehot")
    arguments.only("rounding")
    arguments.only("dim", 0)
    arguments.ignore("keepdim")
    argmax, threshold = arguments.flag("argmax"), arguments.take("threshold")
    threshold = threshold[0] if isinstance(threshold, list) and threshold else threshold
    if argmax == (threshold is not None) or (argmax and found.activation == "sigmoid"):
        arguments.refuse("argmax, threshold", [argmax, threshold])
    if not argmax and (found.activation != "sigmoid" or threshold not in (0.5, True)):
        arguments.refuse("threshold", threshold)
    found.discrete = "softmax" if argmax else "sigmoid"


def _invert(arguments: _Arguments, step: _Step, found: _After) -> None:
    arguments.ignore("transform", "orig_keys", "to_tensor")
    arguments.only("post_func")
    nearest = arguments.flag("nearest_interp", default=True)
    if found.inverted:
        return
    found.inverted = True
    if found.discrete is not None and not nearest:
        found.notes.append(
            f"{step.path}: the bundle interpolates label values, which gives fractions; the nearest voxel is taken"
        )
    found.way_back = "nearest" if nearest or found.discrete is not None else "linear"


def _keep_largest(arguments: _Arguments, step: _Step, found: _After) -> None:
    if found.discrete != "softmax" or found.painting:
        arguments.refuse("keys", "channels that overlap")
    arguments.off("is_onehot")
    labels = arguments.take("applied_labels", [])
    labels = labels if isinstance(labels, list) else [] if labels is None else [labels]
    connectivity = arguments.take("connectivity")
    found.label_steps.append(
        KeepLargest(
            tuple(int(label) for label in labels),
            arguments.flag("independent", default=True),
            3 if connectivity is None else int(connectivity),
            int(arguments.number("num_components", 1)),
        )
    )
    if not found.inverted:
        found.notes.append(f"{step.path}: the largest pieces are chosen on the scan's grid, not before the way back")


def _paint(arguments: _Arguments, step: _Step, found: _After) -> None:
    arguments.ignore("overwrite", "inv_func")
    written = step.arguments.get("func")
    rule = painted(written) if isinstance(written, str) else None
    if found.discrete != "sigmoid" or rule is None:
        arguments.refuse("func", written)
    arguments.ignore("func")
    found.painting = list(rule or [])


_AFTER: Mapping[str, Callable[[_Arguments, _Step, _After], None]] = {
    "Activationsd": _activation,
    "AsDiscreted": _discrete,
    "Invertd": _invert,
    "KeepLargestConnectedComponentd": _keep_largest,
    "Lambdad": _paint,
}


def _labels(
    outputs: Mapping[int, str], activation: Activation, painting: Sequence[tuple[int, int]]
) -> tuple[tuple[Region, ...], dict[int, str]]:
    """Regions and the names of the labels; overlapping channels become labels in the order of painting.

    A label painted over by later ones holds what they leave of it, and its name says so.
    """
    if activation == "softmax":
        return (), dict(outputs)
    order = list(painting) or [(channel, channel + 1) for channel in _nested(outputs)]
    regions = tuple(Region(outputs[channel], channel, label) for channel, label in order if channel in outputs)
    labels = {0: "background"}
    for number, region in enumerate(regions):
        later = [other.name for other in regions[number + 1 :]]
        outside = ", ".join(later) if len(later) <= 3 else f"{len(later)} others"
        labels[region.label] = f"{region.name} outside {outside}" if later else region.name
    return regions, dict(sorted(labels.items()))


def _own_regions(
    own: Mapping[str, Any], outputs: Mapping[int, str], where: Path
) -> tuple[tuple[Region, ...], dict[int, str]]:
    """Regions and labels as ``medseg`` of metadata.json states them, where a user has added that."""
    try:
        stated = [(int(entry["channel"]), int(entry["label"])) for entry in own["regions"]]
        regions = tuple(Region(outputs[channel], channel, label) for channel, label in stated)
        labels = {int(value): str(name) for value, name in own["labels"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise BundleError(where, f"medseg.regions or medseg.labels is malformed ({err!r})", "correct it") from err
    return regions, dict(sorted(labels.items()))


def _nested(outputs: Mapping[int, str]) -> list[int]:
    """Channels in the order of painting: from whole to part where the names tell, else as they are."""
    found = [channel for names in _NESTED for channel, name in outputs.items() if name.lower() in names]
    return found if len(found) == len(outputs) else list(outputs)
