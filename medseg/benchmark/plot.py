"""The picture beside a leaderboard: Dice of every case, and accuracy over cost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medseg.benchmark.accuracy import AccuracyReport, BundleResult
from medseg.errors import DeviceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _GREY = "#1f6fb4", "#555555"
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
    figure = Figure(figsize=(12, 3.2 + 0.35 * len(bundles)), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    rows = list(reversed(bundles))
    values = [[case.dice for case in one.cases if case.dice is not None] for one in rows]
    left.boxplot(
        values,
        orientation="horizontal",
        widths=0.55,
        medianprops={"color": _BLUE, "linewidth": 2},
        flierprops={"marker": ".", "markersize": 4, "markeredgecolor": _GREY},
    )
    left.set_yticks(range(1, len(rows) + 1), [one.name for one in rows])
    left.set_xlabel("Dice of a case, mean over its labels")
    left.set_title(f"{report.dataset}, {len(report.cases)} cases")
    left.locator_params(axis="x", nbins=7)
    left.grid(axis="x", alpha=0.3)
    _scatter(middle, bundles, [one.gmacs_case or 0.0 for one in bundles], "GMACs of a case")
    _scatter(right, bundles, [one.seconds_case or 0.0 for one in bundles], f"s of a case, threads: {report.threads}")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _scatter(axes: Axes, bundles: Sequence[BundleResult], cost: Sequence[float], label: str) -> None:
    """Mean Dice with its interval over a cost."""
    for one, x in zip(bundles, cost, strict=True):
        mean, low, high = (value or 0.0 for value in (one.dice.mean, one.dice.low, one.dice.high))
        axes.errorbar(x, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=_BLUE, capsize=3)
        axes.annotate(one.name, (x, mean), xytext=(5, 5), textcoords="offset points", fontsize=8, color=_GREY)
    positive = [x for x in cost if x > 0]
    if positive and max(positive) > _DECADES * min(positive):
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.25)
    axes.set_xlabel(label)
    axes.set_ylabel("mean Dice, 95 % interval")
    axes.grid(alpha=0.3)
