"""The picture beside a leaderboard: Dice of every case, and accuracy over cost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medseg.benchmark.accuracy import AccuracyReport, BundleResult
from medseg.errors import DeviceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of the bundles in their order, the same in all panels; Tol's muted scheme, which colour-blind readers can tell apart.
_COLOURS = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#AA4499", "#44AA99", "#882255", "#999933")
_MARKERS = "os^Dv"
_DECADES = 20  # costs that differ by more are drawn on a logarithmic axis


def require_matplotlib() -> None:
    """Fail before the work when the picture could not be drawn after it.

    Raises:
        DeviceError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as err:
        raise DeviceError("matplotlib", "is not installed", "pip install 'medseg[benchmark]'") from err


def plot_png(report: AccuracyReport) -> bytes:
    """Box plots of the cases' Dice for each bundle, and the mean over GMACs and over seconds of a case.

    Args:
        report: at least one bundle has scores.

    Returns:
        A PNG file, the same one for the same report.
    """
    from matplotlib.figure import Figure

    bundles = [one for one in report.bundles if one.dice.mean is not None]
    figure = Figure(figsize=(12, 3.6 + 0.4 * len(bundles)), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    rows = list(reversed(bundles))
    values = [[case.dice for case in one.cases if case.dice is not None] for one in rows]
    drawn = left.boxplot(
        values,
        orientation="horizontal",
        widths=0.55,
        patch_artist=True,
        medianprops={"color": "black", "linewidth": 2},
        flierprops={"marker": ".", "markersize": 4},
    )
    for number, box in enumerate(drawn["boxes"]):
        box.set_facecolor(_colour(len(rows) - 1 - number))
        box.set_alpha(0.7)
    left.set_yticks(range(1, len(rows) + 1), [one.name for one in rows])
    left.set_xlabel("Dice of a case, mean over its labels")
    left.set_title(f"{report.dataset}, {len(report.cases)} cases")
    left.locator_params(axis="x", nbins=7)
    left.grid(axis="x", alpha=0.3)
    _scatter(middle, bundles, [one.gmacs_case or 0.0 for one in bundles], "GMACs of a case")
    _scatter(right, bundles, [one.seconds_case or 0.0 for one in bundles], f"s of a case, threads: {report.threads}")
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _colour(number: int) -> str:
    """Of the bundle at a place in the report."""
    return _COLOURS[number % len(_COLOURS)]


def _scatter(axes: Axes, bundles: Sequence[BundleResult], cost: Sequence[float], label: str) -> None:
    """Mean Dice with its interval over a cost."""
    for number, (one, x) in enumerate(zip(bundles, cost, strict=True)):
        mean, low, high = (value or 0.0 for value in (one.dice.mean, one.dice.low, one.dice.high))
        axes.errorbar(
            x,
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt=_MARKERS[number % len(_MARKERS)],
            color=_colour(number),
            capsize=3,
            label=one.name,
        )
    positive = [x for x in cost if x > 0]
    if positive and max(positive) > _DECADES * min(positive):
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    axes.set_ylabel("mean Dice, 95 % interval")
    axes.grid(alpha=0.3)
