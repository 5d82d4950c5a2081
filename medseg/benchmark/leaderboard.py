"""The page that a measurement of accuracy becomes: Markdown tables, and what they do and do not say."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from medseg.benchmark.accuracy import TOLERANCE_MM, AccuracyReport, BundleResult, Comparison, LabelResult
from medseg.benchmark.statistics import RESAMPLES
from medseg.networks.facts import COUNTED

_WIDTH = 120
# What others report, by the data set's name in dataset.json, and why it is no row of the tables.
_CONTEXT = {
    "Hippocampus": (
        "nnU-Net's published figures for this task are a Dice of about 0.90 (anterior) and 0.89 (posterior), in "
        "five-fold cross-validation on the full training set of 260 cases. They are context and no row of this page: "
        "the bundles here were trained on one or two CPU cores in minutes or hours, on at most 160 cases, and are "
        "scored on one split."
    ),
}


def leaderboard(report: AccuracyReport, *, command: str, data: str, picture: str) -> str:
    """The page.

    Args:
        report: what was measured.
        command: that made it, for whoever wants to see it again.
        data: which cases these are, in words.
        picture: file name of the plot beside the page.

    Returns:
        Markdown. Two runs on one machine differ in seconds, memory and load only.
    """
    parts = [
        f"# Leaderboard: {report.dataset}",
        _text(
            f"{data}. Every bundle segments the same cases on the same machine, with the settings it states, and is "
            "scored as `medseg evaluate` does. Made by"
        ),
        f"    {command}",
        _text(
            "which gives the same scores again; times and memory differ from run to run. Bundles do not record which "
            "cases they were trained on: that these were not among them is for whoever makes the page to see to."
        ),
        f"![Dice of each case, and what it costs]({picture})",
        *_bundles(report),
        *(_tests(report) if len(report.bundles) > 1 else ()),
        *_labels(report),
        *_cost(report),
        *(_failures(report) if report.failures else ()),
    ]
    if report.dataset in _CONTEXT:
        parts += ["## Beside published figures", _text(_CONTEXT[report.dataset])]
    return "\n\n".join([*parts, "Research use only; not a medical device."]) + "\n"


def _bundles(report: AccuracyReport) -> tuple[str, ...]:
    rows = [
        (
            one.name,
            _interval(one.dice.mean, one.dice.low, one.dice.high),
            _number(one.dice.median, 4),
            f"{_number(one.dice.worst, 4)} ({one.dice.worst_case or '-'})",
            _number(one.hd95_mm, 2),
            _number(one.nsd, 4),
            f"{len(one.cases)} of {len(report.cases)}",
        )
        for one in report.bundles
    ]
    return (
        "## Bundles",
        _text(
            "Dice of a case is the mean over its labels. In brackets the 95 % bootstrap interval of the mean over "
            f"cases ({RESAMPLES:,} resamples, percentiles): what other cases of this kind might "
            "give, not another training."
        ),
        _table(
            ("bundle", "Dice, mean", "median", "worst (case)", "HD95, mm", f"NSD at {TOLERANCE_MM:g} mm", "cases"), rows
        ),
    )


def _tests(report: AccuracyReport) -> tuple[str, ...]:
    return (
        f"## Against {report.baseline}",
        _text(
            f"Difference of the cases' Dice to that of `{report.baseline}`: Wilcoxon's signed-rank test, two-sided, on "
            "the cases that both have; p is corrected for the number of bundles by Holm's method. One split and one "
            "training each: a small p says that these weights differ on such cases, not that one architecture is "
            "better than another."
        ),
        _table(("bundle", "mean difference", "p", "p, Holm", "cases"), [_test_row(one) for one in report.comparisons]),
    )


def _labels(report: AccuracyReport) -> tuple[str, ...]:
    header: tuple[str, ...] = ("label", "bundle", "Dice, mean", "median", "worst (case)", "HD95, mm", "missed", "NSD")
    header += ("volume error, ml", "%", "magnitude, %")
    values = dict.fromkeys(label.value for one in report.bundles for label in one.labels)
    rows = [
        _label_row(one, label)
        for value in values
        for one in report.bundles
        for label in one.labels
        if label.value == value
    ]
    return (
        "## Labels",
        _text(
            "Means over cases. HD95 is that of the cases where both maps hold the label; the others are counted as "
            "missed. The volume error is prediction minus reference: its mean shows bias, that of its magnitude how "
            "far single cases are off."
        ),
        _table(header, rows),
    )


def _cost(report: AccuracyReport) -> tuple[str, ...]:
    header: tuple[str, ...] = ("bundle", "members", "training cases", "parameters, M", "GMACs, window", "GMACs, case")
    header += ("s, mean", "s, median", "peak, MiB")
    rows = [
        (
            one.name,
            ", ".join(one.members) if len(one.members) > 1 else "-",
            ", ".join("not stated" if count is None else str(count) for count in dict.fromkeys(one.training_cases)),
            f"{one.parameters / 1e6:.2f}",
            f"{one.gmacs_window:.2f}",
            _number(one.gmacs_case, 2),
            _number(one.seconds_case, 2),
            _number(one.seconds_case_median, 2),
            f"{one.peak_rss_mib:.0f}",
        )
        for one in report.bundles
    ]
    return (
        "## Cost",
        _text(
            f"GMACs are billions of {COUNTED}; of an ensemble, of all members together. Seconds are wall time of a "
            "case from reading the scan to its measurements, the bundles taking turns; loading the weights is not in "
            "them. Memory is the peak of the bundle's process, its imports included."
        ),
        _text(
            f"Measured on {report.device}, threads: {report.threads}, {report.cpu}, load average at the start: "
            f"{report.load}, medseg {report.medseg}."
        ),
        _table(header, rows),
    )


def _failures(report: AccuracyReport) -> tuple[str, ...]:
    rows = [(one.name, failed.case, failed.problem) for one in report.bundles for failed in one.failed]
    return (
        "## Cases without scores",
        "They are in no mean of their bundle.",
        _table(("bundle", "case", "what happened"), rows),
    )


def _test_row(one: Comparison) -> tuple[str, ...]:
    difference = "-" if one.difference is None else f"{one.difference:+.4f}"
    return one.bundle, difference, _p(one.p), _p(one.p_holm), str(one.cases)


def _label_row(bundle: BundleResult, label: LabelResult) -> tuple[str, ...]:
    return (
        f"{label.value} {label.name}",
        bundle.name,
        _interval(label.dice.mean, label.dice.low, label.dice.high),
        _number(label.dice.median, 4),
        f"{_number(label.dice.worst, 4)} ({label.dice.worst_case or '-'})",
        _number(label.hd95_mm, 2),
        str(label.hd95_infinite),
        _number(label.nsd, 4),
        "-" if label.volume_error_ml is None else f"{label.volume_error_ml:+.3f}",
        "-" if label.volume_error_percent is None else f"{label.volume_error_percent:+.1f}",
        _number(label.volume_difference_percent, 1),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows])


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    return "-" if mean is None else f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
