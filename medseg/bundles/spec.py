"""What a bundle says about itself: metadata.json and inference.json as frozen dataclasses.

Nothing here evaluates an expression or imports a name from a bundle's files: the JSON is read, every part
that inference needs is matched against what medseg knows, and the rest is ignored or refused. MONAI's
``ConfigParser`` is never used on the way to a segmentation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from medseg.bundles.nnunet import TARGET as _NNUNET
from medseg.bundles.nnunet import NNUNetScheme, parse_scheme, scheme_config
from medseg.errors import BundleError
from medseg.networks.registry import name_of, target_of

Padding = Literal["constant", "replicate", "reflect"]
Blend = Literal["gaussian", "constant"]
Activation = Literal["softmax", "sigmoid"]
Resize = Literal["none", "published", "smooth"]
Interpolation = Literal["linear", "cubic"]
Tiling = Literal["monai", "nnunet"]
WayBack = Literal["linear", "nearest"]

ENSEMBLE = "ensemble"
"""The section of inference.json that names the members of an ensemble."""

_VOLUMES, _SLICES = "SlidingWindowInferer", "medseg.inference.SliceInferer"
# Standard deviations on either side of the mean that hold nine tenths of a normal distribution.
_NINE_OF_TEN = 1.645
_MAX_JSON_BYTES = 1_000_000
_MAX_NESTING = 32
_INFERENCE = ("inference.json", "inference.yaml", "inference.yml")
_MAX_FOLDS = 64


@dataclass(frozen=True, slots=True)
class NormalizeIntensity:
    """Z-score over the volume: subtract the mean, divide by the standard deviation.

    Attributes:
        nonzero: use and change only voxels that are not 0.
        channel_wise: each channel by its own mean and deviation.
    """

    nonzero: bool = False
    channel_wise: bool = True


@dataclass(frozen=True, slots=True)
class ScaleIntensityRange:
    """Map [a_min, a_max] (the scan's units, HU for CT) linearly to [b_min, b_max]; `clip` cuts what lies outside."""

    a_min: float
    a_max: float
    b_min: float = 0.0
    b_max: float = 1.0
    clip: bool = True


@dataclass(frozen=True, slots=True)
class ScaleIntensityRangePercentiles:
    """Map the `lower` to `upper` percentiles (0 to 100) of the volume to [b_min, b_max]."""

    lower: float
    upper: float
    b_min: float = 0.0
    b_max: float = 1.0
    clip: bool = True
    channel_wise: bool = True


@dataclass(frozen=True, slots=True)
class ScaleIntensity:
    """Map the smallest and largest value of the volume to `minv` and `maxv`; a constant one is multiplied by `minv`."""

    minv: float = 0.0
    maxv: float = 1.0
    channel_wise: bool = False


@dataclass(frozen=True, slots=True)
class KeepLargest:
    """Keep the largest connected pieces in the label map, set the others to 0.

    Attributes:
        labels: values it is about; empty for all that occur.
        independent: of each label by itself, else of all of them together.
        connectivity: 1 (6 neighbours), 2 (18) or 3 (26).
        pieces: how many are kept.
    """

    labels: tuple[int, ...] = ()
    independent: bool = True
    connectivity: int = 3
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class CropForeground:
    """Cut the volume down to the box of all voxels above 0 in any channel, and `margin` voxels around it.

    What lies outside is background in the label map. It is for inference only: training does not crop label maps.
    """

    margin: tuple[int, int, int] = (0, 0, 0)


IntensityStep = NormalizeIntensity | ScaleIntensity | ScaleIntensityRange | ScaleIntensityRangePercentiles

_INTENSITY: dict[
    str, type[NormalizeIntensity | ScaleIntensity | ScaleIntensityRange | ScaleIntensityRangePercentiles]
] = {
    "NormalizeIntensityd": NormalizeIntensity,
    "ScaleIntensityd": ScaleIntensity,
    "ScaleIntensityRanged": ScaleIntensityRange,
    "ScaleIntensityRangePercentilesd": ScaleIntensityRangePercentiles,
}
# Transforms of the pipeline that medseg's own reader, engine and writer stand for.
_COVERED = {"LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "SaveImaged", "Invertd"}


@dataclass(frozen=True)
class Suitability:
    """What the bundle was trained on, for comparison with a scan.

    Attributes:
        modality: "MR", "CT", or "" when unknown.
        extent_mm: smallest and largest field of view along the canonical axes seen in training, millimetres.
        spacing_mm: smallest and largest voxel size along the canonical axes seen in training, millimetres.
        tolerance: a scan may go beyond a range by this factor before it counts as outside.
    """

    modality: str = ""
    extent_mm: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    spacing_mm: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None
    tolerance: float = 1.5


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """How a 2D network goes over volumes; the window's size in the slices is that of `BundleSpec.roi_size`.

    Attributes:
        axis: axis of the model grid that is cut into slices: 0, 1 or 2. The window is one voxel thick along it.
        resize: "none" slides the window over each slice; "published" and "smooth" stretch each whole slice to the
            window, see `medseg.inference.slices`.
        neighbours: slices on each side that are channels too, slice by slice, the outermost slice repeated.
        neighbour_step: distance from one of these channels to the next, in slices; 1: adjacent.
    """

    axis: int
    resize: Resize = "none"
    neighbours: int = 0
    neighbour_step: int = 1

    @property
    def reach(self) -> int:
        """Slices on each side of a slice that its channels come from."""
        return self.neighbours * self.neighbour_step


@dataclass(frozen=True, slots=True)
class Region:
    """An output channel of its own, which may overlap the others, and the label it becomes.

    Attributes:
        name: the channel's name ("WT").
        channel: its number among the network's outputs.
        label: the value that voxels above one half get in the label map.
    """

    name: str
    channel: int
    label: int


@dataclass(frozen=True, slots=True)
class DiceFit:
    """How the mean Dice of a case follows from its score: intercept + slope x score, between 0 and 1.

    The score is that of `medseg.inference.uncertainty`; the line was fitted to cases with reference labels.

    Attributes:
        intercept: Dice at a score of 0.
        slope: rise of Dice for each unit of the score.
        deviation: standard deviation of the cases around the line.
        cases: how many cases the line was fitted to.
    """

    intercept: float
    slope: float
    deviation: float
    cases: int

    def predict(self, score: float) -> tuple[float, float, float]:
        """The mean Dice of a case of this score, and the interval that holds nine of ten such cases."""
        mean, reach = self.intercept + self.slope * score, _NINE_OF_TEN * self.deviation
        low, middle, high = (min(max(value, 0.0), 1.0) for value in (mean - reach, mean, mean + reach))
        return middle, low, high


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted to make a bundle's probabilities mean what they say.

    Attributes:
        temperature: logits are divided by it before they become probabilities; of an ensemble, in addition to the
            temperature of each member.
        dice: the prediction of the mean Dice, or None when it was not fitted.
    """

    temperature: float = 1.0
    dice: DiceFit | None = None


@dataclass(frozen=True, slots=True)
class Code:
    """A term of a terminology: its code value, the terminology's designator ("SCT" for SNOMED CT) and the meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class LabelCode:
    """What a label is, in the terms of DICOM Segmentation.

    Attributes:
        category: e.g. 91723000, SCT, Anatomical Structure.
        type: e.g. 64033007, SCT, Kidney.
        modifier: of the type, e.g. 7771000, SCT, Left.
    """

    category: Code
    type: Code
    modifier: Code | None = None


@dataclass(frozen=True)
class BundleSpec:
    """Everything inference needs to know about a bundle.

    Attributes:
        network: the architecture's name in `medseg.networks.registry`.
        network_args: constructor arguments of the architecture.
        channels: name of each input channel, in order.
        labels: value of each label in the label map, 0 (background) included, to its name.
        activation: softmax (exclusive labels, one channel each) or sigmoid (overlapping channels, see `regions`).
        orientation: axis codes of the model grid ("RAS"), or None to keep the scan's axes.
        spacing: voxel size of the model grid in mm, or None to keep the scan's.
        interpolation: how a scan is brought to that spacing; "cubic" is a cubic spline. The way back is linear.
        intensity: steps applied in order on the model grid, a crop among them.
        roi_size: the sliding window in voxels.
        overlap: share of the window that neighbours share, 0 to below 1.
        blend: weighting of overlapping windows.
        padding: how a volume smaller than the window is filled up; training used the same.
        padding_value: the value for constant padding, after the intensity steps.
        sw_batch_size: windows for each pass through the network.
        mirror_axes: model-grid axes along which a flip keeps the anatomy valid; what ``--tta`` uses.
        slices: how a 2D network goes over volumes; None for a 3D network.
        regions: with sigmoid, how the channels become labels: each in turn paints over the ones before it.
        suitability: what the bundle was trained on.
        calibration: temperature and prediction of the Dice, where they were fitted.
        codes: of the labels that state one, by value.
        nnunet: the scheme of a model of nnU-Net, which then stands for spacing and intensity, decides where windows
            lie and how they are weighted, and has logits averaged and resampled; None for all other bundles.
        folds: how many networks, each with weights of its own, are run; the mean of their logits is the output.
        way_back: how probabilities come from the model grid to the scan's; "nearest" is that of a label map.
        label_steps: what is done to the finished label map, in order.
        notes: in which ways medseg departs from the bundle's own pipeline, one sentence each, for the record.
    """

    network: str
    network_args: Mapping[str, Any]
    channels: tuple[str, ...]
    labels: Mapping[int, str]
    roi_size: tuple[int, int, int]
    activation: Activation = "softmax"
    orientation: str | None = "RAS"
    spacing: tuple[float, float, float] | None = None
    interpolation: Interpolation = "linear"
    intensity: tuple[IntensityStep | CropForeground, ...] = ()
    overlap: float = 0.5
    blend: Blend = "gaussian"
    padding: Padding = "constant"
    padding_value: float = 0.0
    sw_batch_size: int = 1
    mirror_axes: tuple[int, ...] = ()
    slices: SliceSpec | None = None
    regions: tuple[Region, ...] = ()
    suitability: Suitability = field(default_factory=Suitability)
    calibration: Calibration = Calibration()
    codes: Mapping[int, LabelCode] = field(default_factory=dict)
    nnunet: NNUNetScheme | None = None
    folds: int = 1
    way_back: WayBack = "linear"
    label_steps: tuple[KeepLargest, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tiling(self) -> Tiling:
        """Whose rules say where windows lie and what their voxels weigh."""
        return "monai" if self.nnunet is None else "nnunet"

    @property
    def in_channels(self) -> int:
        """Number of the scan's channels."""
        return len(self.channels)

    @property
    def out_channels(self) -> int:
        """Number of output channels, background included where softmax is used."""
        return len(self.outputs)

    @property
    def outputs(self) -> Mapping[int, str]:
        """The network's output channels: number to name."""
        if not self.regions:
            return self.labels
        return {region.channel: region.name for region in sorted(self.regions, key=lambda region: region.channel)}

    @property
    def network_channels(self) -> int:
        """Number of channels that the network sees: with neighbouring slices a multiple of the scan's."""
        return self.in_channels * (1 if self.slices is None else 2 * self.slices.neighbours + 1)

    @property
    def network_size(self) -> tuple[int, ...]:
        """The window as the network sees it: (D, H, W), or (h, w) for a 2D network."""
        if self.slices is None:
            return self.roi_size
        return tuple(size for axis, size in enumerate(self.roi_size) if axis != self.slices.axis)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a bundle, which may be written as YAML.

    Raises:
        BundleError: absent, larger than 1 MB, not JSON, nested deeper than 32, a key twice, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BundleError(path, "larger than 1 MB", "a bundle's configuration is small; check the file")
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            value = _from_yaml(text)
        else:
            value = json.loads(text, object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise BundleError(path, "no such file", "a bundle needs it; check the bundle's folder") from None
    except OSError as err:
        raise BundleError(path, f"cannot be read ({err.strerror})", "check the permissions") from err
    except (ValueError, RecursionError) as err:
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
        raise BundleError(path, f"not valid {kind} ({err})", "restore the file") from err
    if not isinstance(value, dict):
        raise BundleError(path, f"holds a {type(value).__name__}, not a JSON object", "restore the file")
    if _nesting(value) > _MAX_NESTING:
        raise BundleError(path, f"nested deeper than {_MAX_NESTING} levels", "restore the file")
    return value


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _from_yaml(text: str) -> Any:
    """The content of a YAML document of plain values.

    Raises:
        ValueError: it is none, a key stands twice, or it repeats a part by an alias, by which a small file can unfold
            without end.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        return _unique_keys([(str(key.value), loader.construct_object(value, deep=True)) for key, value in node.value])

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader)):
            raise ValueError("it holds an alias")
        return yaml.load(text, Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as err:
        raise ValueError(" ".join(str(err).split())) from err


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
    return depth


def read_spec(root: Path) -> BundleSpec:
    """Read configs/metadata.json and configs/inference.json of a bundle folder.

    Raises:
        BundleError: a file or field is missing or contradictory, or the configuration asks for something
            medseg does not know (an expression, a transform or a network outside its list).
    """
    metadata_path, config_path = config_files(root)
    metadata, config = read_json(metadata_path), read_json(config_path)
    if ENSEMBLE in config:
        raise BundleError(root, "an ensemble, where a bundle with weights of its own is needed", "name a member")
    if is_foreign(config):
        from medseg.bundles.zoo import parse_zoo

        return parse_zoo(metadata, config, config_path)
    return parse_spec(metadata, config, config_path)


def config_files(root: Path) -> tuple[Path, Path]:
    """metadata.json and the inference configuration of a bundle's folder; bundles of others may have it as YAML."""
    folder = root / "configs"
    found = next((path for name in _INFERENCE if (path := folder / name).is_file()), folder / _INFERENCE[0])
    return folder / "metadata.json", found


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether an inference configuration is not of medseg's own bundles, which name medseg's own networks."""
    network = config.get("network_def")
    return isinstance(network, str) or (isinstance(network, dict) and "medseg." not in str(network.get("_target_")))


def parse_spec(metadata: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> BundleSpec:
    """A `BundleSpec` from the two parsed JSON objects; `where` names the file in errors."""
    network, network_args = _network(config, where)
    orientation, spacing, interpolation, intensity, scheme = _preprocessing(config, where)
    inferer = _section(config, "inferer", where)
    if inferer.get("_target_") not in (_VOLUMES, _SLICES):
        raise BundleError(where, f"inferer is {inferer.get('_target_')!r}", f"medseg knows {_VOLUMES} and {_SLICES}")
    try:
        io_format = metadata["network_data_format"]
        image, pred = io_format["inputs"]["image"], io_format["outputs"]["pred"]
        channels = tuple(str(image["channel_def"][str(i)]) for i in range(int(image["num_channels"])))
        own = metadata.get("medseg", {})
        regions = tuple(
            Region(str(pred["channel_def"][str(int(entry["channel"]))]), int(entry["channel"]), int(entry["label"]))
            for entry in own.get("regions", ())
        )
        named = own["labels"] if regions else pred["channel_def"]
        labels = {int(value): str(name) for value, name in named.items()}
        suitable = own.get("suitability", {})
        spec = BundleSpec(
            network=network,
            network_args=network_args,
            channels=channels,
            labels=dict(sorted(labels.items())),
            activation=_activation(config, where),
            orientation=orientation,
            spacing=spacing,
            interpolation=interpolation,
            intensity=intensity,
            roi_size=_triple(inferer["roi_size"], int),
            overlap=float(inferer.get("overlap", 0.25)),
            blend=inferer.get("mode", "constant"),
            padding=inferer.get("padding_mode", "constant"),
            padding_value=float(inferer.get("cval", 0.0)),
            sw_batch_size=int(inferer.get("sw_batch_size", 1)),
            mirror_axes=tuple(int(axis) for axis in own.get("mirror_axes", ())),
            slices=_slices(inferer),
            regions=regions,
            suitability=Suitability(
                modality=str(image.get("modality", "")),
                extent_mm=_range(suitable.get("extent_mm")),
                spacing_mm=_range(suitable.get("spacing_mm")),
                tolerance=float(suitable.get("tolerance", 1.5)),
            ),
            calibration=parse_calibration(own.get("calibration", {})),
            codes={int(value): _label_code(terms) for value, terms in own.get("codes", {}).items()},
            nnunet=scheme,
            folds=int(own.get("folds", 1)),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise BundleError(where, f"field missing or malformed ({err!r})", "compare with a shipped bundle") from err
    check_spec(spec, int(pred["num_channels"]), where)
    return spec


def parse_calibration(described: Mapping[str, Any]) -> Calibration:
    """A `Calibration` from ``medseg.calibration`` of metadata.json.

    Raises:
        ValueError, TypeError, KeyError: a number is missing, not finite, or of the wrong sign.
    """
    temperature, line = float(described.get("temperature", 1.0)), described.get("predicted_dice")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature {temperature} is not a positive number")
    if line is None:
        return Calibration(temperature)
    fit = DiceFit(float(line["intercept"]), float(line["slope"]), float(line["deviation"]), int(line["cases"]))
    if not (math.isfinite(fit.intercept) and math.isfinite(fit.slope) and math.isfinite(fit.deviation)):
        raise ValueError("predicted_dice holds a number that is not finite")
    if fit.deviation < 0 or fit.cases < 1:
        raise ValueError(f"predicted_dice has deviation {fit.deviation} and {fit.cases} cases")
    return Calibration(temperature, fit)


def check_spec(spec: BundleSpec, out_channels: int, where: Path) -> None:
    """Hold the parts of a specification against each other; `out_channels` is what metadata.json says.

    Raises:
        BundleError: they contradict each other; `where` is the file in the message.
    """
    if set(spec.outputs) != set(range(out_channels)):
        raise BundleError(where, f"{out_channels} outputs but labels {sorted(spec.outputs)}", "correct channel_def")
    if (spec.activation == "sigmoid") != bool(spec.regions):
        raise BundleError(
            where, f"{spec.activation} with {len(spec.regions)} regions", "sigmoid needs regions, softmax takes none"
        )
    if not {0, *(region.label for region in spec.regions)} <= set(spec.labels):
        raise BundleError(where, "a region's label has no name, or 0 has none", "correct medseg.labels")
    if spec.slices is not None and spec.roi_size[spec.slices.axis] != 1:
        raise BundleError(
            where, f"roi_size {list(spec.roi_size)} is not 1 along axis {spec.slices.axis}", "correct inferer.roi_size"
        )
    for key, expected in (
        ("in_channels", spec.network_channels),
        ("out_channels", spec.out_channels),
        ("num_classes", spec.out_channels),
    ):
        stated = spec.network_args.get(key, expected)
        if stated != expected:
            raise BundleError(where, f"network_def has {key} {stated}, metadata.json says {expected}", "correct one")
    if spec.nnunet is not None and len(spec.nnunet.normalization) != spec.in_channels:
        raise BundleError(
            where, f"{len(spec.nnunet.normalization)} normalizations, {spec.in_channels} channels", "correct one"
        )
    if not 1 <= spec.folds <= _MAX_FOLDS:
        raise BundleError(where, f"{spec.folds} folds", f"1 to {_MAX_FOLDS}; correct medseg.folds of metadata.json")
    if not 0 <= spec.overlap < 1:
        raise BundleError(where, f"overlap {spec.overlap} is not in [0, 1)", "correct inferer.overlap")
    for name, value, known in (
        ("mode", spec.blend, get_args(Blend)),
        ("padding_mode", spec.padding, get_args(Padding)),
        ("resize", "none" if spec.slices is None else spec.slices.resize, get_args(Resize)),
    ):
        if value not in known:
            raise BundleError(where, f"inferer.{name} is {value!r}", f"medseg knows {', '.join(known)}")


def _section(config: Mapping[str, Any], key: str, where: Path) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise BundleError(where, f"no section {key!r}", "compare with a shipped bundle")
    _refuse_code(section, key, where)
    return section


def _refuse_code(value: Any, path: str, where: Path) -> None:
    """Refuse expressions, macros and MONAI's debug mode anywhere in a section that inference reads."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key == "_mode_" and child not in ("default", "callable"):
                raise BundleError(where, f"{path}::_mode_ is {child!r}", "medseg does not run it")
            _refuse_code(child, f"{path}::{key}", where)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _refuse_code(child, f"{path}::{index}", where)
    elif isinstance(value, str) and value[:1] in ("$", "%"):
        raise BundleError(where, f"{path} holds the expression {value!r}", "medseg runs no code from a bundle")


def _network(config: Mapping[str, Any], where: Path) -> tuple[str, dict[str, Any]]:
    section = dict(_section(config, "network_def", where))
    target = section.pop("_target_", None)
    name = name_of(target) if isinstance(target, str) else None
    if name is None:
        raise BundleError(where, f"network_def is {target!r}", "medseg runs the networks of medseg.networks only")
    return name, section


def _transforms(config: Mapping[str, Any], key: str, where: Path) -> list[dict[str, Any]]:
    section = config.get(key)
    steps = section.get("transforms") if isinstance(section, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise BundleError(where, f"{key} is not a Compose of transforms", "compare with a shipped bundle")
    live = [step for step in steps if step.get("_target_") not in _COVERED]
    _refuse_code(live, key, where)
    return live


def _preprocessing(
    config: Mapping[str, Any], where: Path
) -> tuple[
    str | None, tuple[float, float, float] | None, Interpolation, tuple[IntensityStep, ...], NNUNetScheme | None
]:
    scheme: NNUNetScheme | None = None
    orientation: str | None = None
    spacing: tuple[float, float, float] | None = None
    interpolation: Interpolation = "linear"
    intensity: list[IntensityStep] = []
    for step in _transforms(config, "preprocessing", where):
        target = step.get("_target_")
        args = {key: value for key, value in step.items() if key not in ("_target_", "keys", "allow_missing_keys")}
        try:
            if target == "Orientationd":
                orientation = str(args["axcodes"])
            elif target == "Spacingd":
                spacing, interpolation = _triple(args["pixdim"], float), _interpolation(args, where)
            elif target in _INTENSITY:
                intensity.append(_INTENSITY[target](**args))
            elif target == _NNUNET:
                scheme = parse_scheme(args)
            else:
                raise BundleError(
                    where,
                    f"preprocessing uses {target!r}",
                    f"medseg knows Orientationd, Spacingd, {', '.join(_INTENSITY)}",
                )
        except (KeyError, TypeError, ValueError) as err:
            raise BundleError(where, f"{target}: {err!r}", "correct its arguments") from err
        if intensity and target in ("Orientationd", "Spacingd"):
            raise BundleError(where, f"{target} after an intensity step", "put spatial transforms first")
        if scheme is not None and target != _NNUNET:
            raise BundleError(where, f"{target} after {_NNUNET}", f"put {_NNUNET} last; only Orientationd goes before")
    if scheme is not None and (spacing is not None or intensity):
        raise BundleError(where, f"{_NNUNET} beside a spacing or an intensity step, for which it stands", "remove them")
    return orientation, spacing, interpolation, tuple(intensity), scheme


def _interpolation(spacingd: Mapping[str, Any], where: Path) -> Interpolation:
    """From the mode of MONAI's Spacingd: a name of torch's, or the order of SciPy's spline."""
    mode = spacingd.get("mode", "bilinear")
    mode = mode[0] if isinstance(mode, list) and len(mode) == 1 else mode
    if mode not in ("bilinear", 3) or spacingd.get("padding_mode", "border") != "border":
        raise BundleError(
            where,
            f"Spacingd with mode {mode!r}, padding_mode {spacingd.get('padding_mode', 'border')!r}",
            'medseg knows the modes "bilinear" and 3 (cubic spline), and the border held outside',
        )
    return "cubic" if mode == 3 else "linear"


def _activation(config: Mapping[str, Any], where: Path) -> Activation:
    for step in _transforms(config, "postprocessing", where):
        target = step.get("_target_")
        if target == "Activationsd":
            return "sigmoid" if step.get("sigmoid") else "softmax"
        if target != "AsDiscreted":
            raise BundleError(where, f"postprocessing uses {target!r}", "medseg knows Activationsd and AsDiscreted")
    return "softmax"


def _slices(inferer: Mapping[str, Any]) -> SliceSpec | None:
    if inferer["_target_"] != _SLICES:
        return None
    found = SliceSpec(
        int(inferer["axis"]),
        inferer.get("resize", "none"),
        int(inferer.get("neighbours", 0)),
        int(inferer.get("neighbour_step", 1)),
    )
    if found.axis not in (0, 1, 2) or found.neighbours < 0 or found.neighbour_step < 1:
        raise ValueError(f"axis {found.axis}, neighbours {found.neighbours}, neighbour_step {found.neighbour_step}")
    return found


def _label_code(terms: Mapping[str, Any]) -> LabelCode:
    """A label's code of ``medseg.codes``: category, type and perhaps modifier, each [value, scheme, meaning]."""
    named = {key: Code(*(str(part) for part in parts)) for key, parts in terms.items()}
    return LabelCode(**named)


def _triple(values: Any, kind: Any) -> Any:
    found = tuple(kind(value) for value in values)
    if len(found) != 3 or any(value <= 0 for value in found):
        raise ValueError(f"three positive numbers expected, got {values!r}")
    return found


def _range(values: Any) -> Any:
    return None if values is None else (_triple(values[0], float), _triple(values[1], float))


def config_of(spec: BundleSpec) -> dict[str, Any]:
    """The sections of inference.json that `parse_spec` reads, for a spec; the inverse of `parse_spec`."""
    spatial: list[dict[str, Any]] = []
    if spec.orientation is not None:
        spatial.append({"_target_": "Orientationd", "keys": "image", "axcodes": spec.orientation, "labels": None})
    if spec.spacing is not None:
        mode = 3 if spec.interpolation == "cubic" else "bilinear"
        spatial.append({"_target_": "Spacingd", "keys": "image", "pixdim": list(spec.spacing), "mode": mode})
    targets: dict[type, str] = {cls: target for target, cls in _INTENSITY.items()}
    intensity = [{"_target_": targets[type(step)], "keys": "image", **asdict(step)} for step in spec.intensity]
    return {
        "network_def": {"_target_": target_of(spec.network), **spec.network_args},
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                *spatial,
                *intensity,
                *([] if spec.nnunet is None else [scheme_config(spec.nnunet)]),
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "inferer": {
            **({"_target_": _VOLUMES} if spec.slices is None else {"_target_": _SLICES, **asdict(spec.slices)}),
            "roi_size": list(spec.roi_size),
            "sw_batch_size": spec.sw_batch_size,
            "overlap": spec.overlap,
            "mode": spec.blend,
            "padding_mode": spec.padding,
            "cval": spec.padding_value,
        },
    }
