"""Bundles beside each other on labelled cases: scores with their uncertainty, and what they cost in the same run."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

import medseg
from medseg.benchmark.machine import cpu_name, load_average
from medseg.benchmark.process import BundleProcess
from medseg.benchmark.statistics import bootstrap_interval, holm, signed_rank_p
from medseg.benchmark.worker import Described, Segmented, Start
from medseg.errors import BundleError, InputError, UsageError
from medseg.evaluation.compare import CaseScores, Evaluation, Metric, evaluate
from medseg.evaluation.pairing import case_name
from medseg.io.read import read_labels

if TYPE_CHECKING:
    from medseg.training.dataset import CaseFiles

TOLERANCE_MM = 1.0
Progress = Callable[[str, int, int], None]
"""Called with (what is under way, done, all)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Strict):
    """One score over the cases.

    Attributes:
        count: cases that it is taken of.
        mean: arithmetic mean; null without a case, as are the others.
        median: median.
        low: lower bound of the mean's 95 % bootstrap interval.
        high: upper bound.
        worst: lowest Dice.
        worst_case: the case it belongs to.
    """

    count: int
    mean: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    worst: float | None = None
    worst_case: str | None = None


class LabelResult(_Strict):
    """One label over the cases; null where there is no case with a finite score."""

    value: int
    name: str
    dice: Spread
    hd95_mm: float | None = Field(description="Mean of the finite ones.")
    hd95_infinite: int = Field(description="Cases where only one of the two maps holds the label.")
    nsd: float | None = Field(description=f"Mean, at {TOLERANCE_MM:g} mm.")
    volume_error_ml: float | None = Field(description="Mean; positive: too large.")
    volume_error_percent: float | None = Field(description="Mean, in percent of the reference.")
    volume_difference_percent: float | None = Field(description="Mean of the error's magnitude, in percent.")


class CaseResult(_Strict):
    """One case: its scores and what it took."""

    case: str
    dice: float | None = Field(description="Mean over the labels that apply to it.")
    seconds: float
    windows: int
    gmacs: float
    labels: tuple[dict[str, float | int | str | None], ...] = Field(
        description="Scores of each label as medseg evaluate --json gives them; an infinite distance is null."
    )


class FailedCase(_Strict):
    """A case without scores."""

    case: str
    problem: str


class BundleResult(_Strict):
    """One bundle on all cases."""

    name: str
    sha256: str
    members: tuple[str, ...]
    training_cases: tuple[int | None, ...]
    parameters: int
    gmacs_window: float
    gmacs_case: float | None = Field(description="Mean over the cases.")
    seconds_case: float | None = Field(description="Mean wall time from reading the scan to its measurements.")
    seconds_case_median: float | None
    peak_rss_mib: float = Field(description="Of the process that did all cases, its imports included.")
    dice: Spread = Field(description="Of the cases' means over labels.")
    hd95_mm: float | None = Field(description="Mean over cases of the mean over labels, finite ones.")
    nsd: float | None = Field(description="Mean over cases of the mean over labels.")
    labels: tuple[LabelResult, ...]
    cases: tuple[CaseResult, ...]
    failed: tuple[FailedCase, ...]


class Comparison(_Strict):
    """A bundle beside the baseline, on the cases that both have."""

    bundle: str
    cases: int
    difference: float | None = Field(
        description="Mean difference of the cases' Dice; positive: better than the baseline."
    )
    p: float | None = Field(description="Two-sided, Wilcoxon's signed-rank test.")
    p_holm: float | None = Field(description="The same, corrected for the number of bundles by Holm's method.")


class AccuracyReport(_Strict):
    """Everything that a measurement of accuracy says."""

    schema_version: Literal[1] = Field(default=1, serialization_alias="schema")
    medseg: str
    cpu: str
    device: str
    threads: int
    load: float | None
    dataset: str
    labels: dict[int, str]
    cases: tuple[str, ...]
    baseline: str
    bundles: tuple[BundleResult, ...] = Field(description="By mean Dice, best first.")
    comparisons: tuple[Comparison, ...]

    @property
    def failures(self) -> int:
        """Cases without scores, over all bundles."""
        return sum(len(bundle.failed) for bundle in self.bundles)

    def to_json(self) -> str:
        """The report as JSON."""
        return self.model_dump_json(indent=1, by_alias=True) + "\n"


def benchmark_accuracy(
    dataset: str,
    labels: Mapping[int, str],
    cases: Sequence[CaseFiles],
    bundles: Sequence[str],
    *,
    baseline: str | None = None,
    device: str = "cpu",
    threads: int = 1,
    progress: Progress | None = None,
) -> AccuracyReport:
    """Segment cases with each bundle and score them.

    Each bundle has a process of its own that holds its weights; the bundles take turns, case after case.

    Args:
        dataset: the data set's name.
        labels: value to name, background included.
        cases: what to segment.
        bundles: names or folders.
        baseline: one of `bundles`, that the others are tested against; the first when None.
        device: auto, cpu, cuda or cuda:N.
        threads: CPU threads of each process.
        progress: called as the work goes on.

    Raises:
        UsageError: a bundle twice, or a baseline that is not among them.
        BundleError: a bundle that cannot be loaded, or whose labels are not those of the data set.
        InputError: no case at all could be segmented and scored.
    """
    report = progress or (lambda _text, _done, _all: None)
    base = bundles[0] if baseline is None else baseline
    if base not in bundles:
        raise UsageError("--baseline", f"{base} is none of the bundles", f"choose one of {', '.join(bundles)}")
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="medseg-benchmark-") as folder:
        workers: list[BundleProcess] = []
        try:
            for number, bundle in enumerate(bundles):
                report(f"loading {bundle}", number, len(bundles))
                place = Path(folder) / str(number)
                place.mkdir()
                workers.append(BundleProcess(Start(bundle=bundle, device=device, threads=threads), place))
            names = [worker.described.name for worker in workers]
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UsageError("--bundle", f"{twice} is there twice", "name each bundle once")
            for worker in workers:
                _check_labels(worker.described, labels)
            for done, case in enumerate(cases):
                for worker in workers:
                    report(f"{case_name(case.label)}: {worker.described.name}", done, len(cases))
                    worker.segment(case)
        finally:
            for worker in workers:
                worker.close()
        results = []
        for number, worker in enumerate(workers):
            report(f"scoring {worker.described.name}", number, len(workers))
            evaluation = evaluate(
                worker.folder,
                cases[0].label.parent,
                read=read_labels,
                labels=[value for value in sorted(labels) if value],
                tolerance_mm=TOLERANCE_MM,
                cases=[case_name(case.label) for case in cases],
            )
            results.append(_result(worker.described, evaluation, worker.answers))
    by_name = {result.name: result for result in results}
    if not any(result.cases for result in results):
        first = results[0].failed[0]
        raise InputError(first.case, first.problem)
    against = by_name[names[bundles.index(base)]]
    return AccuracyReport(
        medseg=medseg.__version__,
        cpu=cpu_name(),
        device=device,
        threads=threads,
        load=load,
        dataset=dataset,
        labels=dict(labels),
        cases=tuple(sorted(case_name(case.label) for case in cases)),
        baseline=against.name,
        bundles=tuple(sorted(results, key=lambda result: -(result.dice.mean or 0.0))),
        comparisons=tuple(compare([result for result in results if result is not against], against)),
    )


def compare(results: Sequence[BundleResult], baseline: BundleResult) -> list[Comparison]:
    """Test each bundle's case means of Dice against the baseline's."""
    base = {case.case: case.dice for case in baseline.cases if case.dice is not None}
    pairs = [
        [case.dice - base[case.case] for case in result.cases if case.dice is not None and case.case in base]
        for result in results
    ]
    p_values = [signed_rank_p(differences) for differences in pairs if differences]
    corrected = iter(zip(p_values, holm(p_values), strict=True))
    found = []
    for result, differences in zip(results, pairs, strict=True):
        p, p_holm = next(corrected) if differences else (None, None)
        difference = statistics.fmean(differences) if differences else None
        found.append(Comparison(bundle=result.name, cases=len(differences), difference=difference, p=p, p_holm=p_holm))
    return found


def _check_labels(bundle: Described, labels: Mapping[int, str]) -> None:
    missing = sorted(set(labels) - set(bundle.labels))
    if missing:
        raise BundleError(
            bundle.name,
            f"its labels {sorted(bundle.labels)} lack {missing} of the data set",
            "choose bundles made for this data set",
        )


def _result(bundle: Described, evaluation: Evaluation, answers: Mapping[str, Segmented]) -> BundleResult:
    scored = {case.case: case for case in evaluation.cases}
    failed = [FailedCase(case=name, problem=answer.error) for name, answer in answers.items() if answer.error]
    failed += [FailedCase(case=one.case, problem=one.problem) for one in evaluation.failed if one.case not in scored]
    done = [answer for name, answer in answers.items() if name in scored]
    means = {name: _case_dice(case) for name, case in scored.items()}
    summaries = {(row.value, row.metric): row for row in evaluation.summary}
    overall = None if len(evaluation.labels) > 1 else next(iter(evaluation.labels), None)

    def mean(value: int | None, metric: Metric) -> float | None:
        row = summaries.get((value, metric))
        return None if row is None else row.mean

    labels = []
    for place, (value, name) in enumerate(evaluation.labels.items()):
        entries = [(case.case, case.labels[place]) for case in evaluation.cases]
        errors = [one.volume_error_percent for _, one in entries if one.volume_error_percent is not None]
        labels.append(
            LabelResult(
                value=value,
                name=name,
                dice=_spread({case: one.dice for case, one in entries}),
                hd95_mm=mean(value, "hd95_mm"),
                hd95_infinite=summaries[value, "hd95_mm"].infinite if entries else 0,
                nsd=mean(value, "nsd"),
                volume_error_ml=mean(value, "volume_error_ml"),
                volume_error_percent=mean(value, "volume_error_percent"),
                volume_difference_percent=statistics.fmean(abs(error) for error in errors) if errors else None,
            )
        )
    seconds = [answer.seconds for answer in done]
    return BundleResult(
        name=bundle.name,
        sha256=bundle.sha256,
        members=bundle.members,
        training_cases=bundle.training_cases,
        parameters=bundle.parameters,
        gmacs_window=bundle.gmacs_window,
        gmacs_case=statistics.fmean(answer.gmacs for answer in done) if done else None,
        seconds_case=statistics.fmean(seconds) if seconds else None,
        seconds_case_median=statistics.median(seconds) if seconds else None,
        peak_rss_mib=max((answer.peak_rss_mib for answer in answers.values()), default=0.0),
        dice=_spread(means),
        hd95_mm=mean(overall, "hd95_mm"),
        nsd=mean(overall, "nsd"),
        labels=tuple(labels),
        cases=tuple(
            CaseResult(
                case=case.case,
                dice=means[case.case],
                seconds=answers[case.case].seconds,
                windows=answers[case.case].windows,
                gmacs=answers[case.case].gmacs,
                labels=tuple(record["labels"]),
            )
            for case, record in zip(evaluation.cases, evaluation.to_record()["cases"], strict=True)
        ),
        failed=tuple(sorted(failed, key=lambda one: one.case)),
    )


def _spread(values: Mapping[str, float | None]) -> Spread:
    """A score over the cases, those left out to which it does not apply."""
    known = {case: value for case, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        return Spread(count=0)
    worst = min(known, key=lambda case: (known[case], case))
    low, high = bootstrap_interval(list(known.values()))
    return Spread(
        count=len(known),
        mean=statistics.fmean(known.values()),
        median=statistics.median(known.values()),
        low=low,
        high=high,
        worst=known[worst],
        worst_case=worst,
    )


def _case_dice(case: CaseScores) -> float | None:
    """Mean Dice over the labels that one of the two maps holds."""
    values = [label.dice for label in case.labels if label.dice is not None]
    return statistics.fmean(values) if values else None
