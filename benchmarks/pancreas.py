"""The figures of docs/pancreas.md: a bundle that diagnoses, on a phantom, under every condition that it may meet.

    python benchmarks/pancreas.py --bundle RUN --data PHANTOM --part test -o DIR
    python benchmarks/pancreas.py --bundle RUN --baseline SEGMENTING_RUN --data PHANTOM --part test --workers 2 -o DIR

Each patient goes through `medseg.infer` once for each condition: all phases, each phase missing, the venous phase
alone, noise twice as strong. The answer without age and sex comes with every one of them. DIR/patients.jsonl holds
every answer, so that a run that was stopped goes on with the same phantom; DIR/pancreas.md and pancreas.json hold the
tables, confusion.png the confusion matrix with everything known. Synthetic data, not for clinical use.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BASELINE = "baseline"
ALL = "all"
# Name of a condition, the words of the phases that are left out, and what the table calls it.
CONDITIONS: dict[str, tuple[tuple[str, ...], str]] = {
    ALL: ((), "all phases, age, sex"),
    "without_nc": (("NC",), "without NC"),
    "without_a": (("A",), "without A"),
    "without_v": (("V",), "without V"),
    "only_v": (("NC", "A"), "V only"),
    "noise": ((), "noise twice as strong"),
}
TARGETS = (
    ("accuracy", ALL, ("accuracy", "value"), 0.68),
    ("Dice of the lesion", ALL, ("dice", "lesion"), 0.75),
    ("Dice of the pancreas", ALL, ("dice", "organ"), 0.90),
    ("patients with a lesion found", ALL, ("lesion", "sensitivity"), 0.95),
    ("patients without a lesion left alone", ALL, ("lesion", "specificity"), 0.90),
    ("patients with a lesion named ill", ALL, ("lesion", "sensitivity_of_the_class"), 0.95),
    ("patients without a lesion named healthy", ALL, ("lesion", "specificity_of_the_class"), 0.90),
    ("accuracy, V only", "only_v", ("accuracy", "value"), 0.55),
)


@dataclass(frozen=True)
class Task:
    """What a process works through.

    Attributes:
        data: folder of the phantom.
        bundle: that diagnoses.
        baseline: that segments the types only, or None.
        conditions: keys of `CONDITIONS`.
    """

    data: Path
    bundle: str
    baseline: str | None
    conditions: tuple[str, ...]


_LOADED: dict[str, Any] = {}


def prepare(task: Task) -> None:
    """Load the bundles once in a process."""
    import torch

    from medseg.bundles.load import ResidentBundle, load_bundle
    from medseg.io.patients import PATIENTS, read_classes, read_patients

    torch.set_num_threads(1)
    for kind, name in (("bundle", task.bundle), (BASELINE, task.baseline)):
        if name is not None:
            _LOADED[kind] = ResidentBundle.of(load_bundle(name))
    _LOADED["patients"] = read_patients(task.data / PATIENTS, classes=True)
    _LOADED["codes"] = list(read_classes(task.data))


def answers(task: Task, case: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """A patient's line for each wanted condition."""
    import medseg
    from medseg.evaluation.cohort import judge
    from medseg.inference.phases import read_phases
    from medseg.io.read import read_labels

    image, label = (task.data / folder / f"{case}.nii.gz" for folder in ("imagesTr", "labelsTr"))
    facts, codes, truth = _LOADED["patients"][case], _LOADED["codes"], read_labels(label)
    target = codes.index(facts.code)
    lines = []
    for condition in wanted:
        begin = time.perf_counter()
        if condition == BASELINE:
            result = medseg.infer(image, bundle=_LOADED[BASELINE])
        else:
            volume = read_phases(image, _LOADED["bundle"].spec)
            if condition == "noise":
                volume = noisy(volume, task.data, case)
            volume = shown(volume, CONDITIONS[condition][0])
            result = medseg.infer(image, bundle=_LOADED["bundle"], volume=volume, patient=facts)
        record = result.record.model_dump(mode="json")
        judged = judge(case, target, codes, record, result.label_map, result.affine, truth)
        sha256 = result.record.bundle.weights_sha256
        seconds = round(time.perf_counter() - begin, 2)
        lines.append({"condition": condition, "sha256": sha256, "seconds": seconds, **to_json(judged)})
    return lines


def shown(volume: Any, absent: Sequence[str]) -> Any:
    """The scan without some of its phases."""
    phases = [
        None if name.split()[-1] in absent else phase for name, phase in zip(volume.names, volume.phases, strict=True)
    ]
    there = [number for number, phase in enumerate(phases) if phase is not None]
    preferred = [number for word in ("A", "V", "NC") for number in there if volume.names[number].split()[-1] == word]
    return replace(volume, phases=tuple(phases), reference=(preferred or there)[0])


def noisy(volume: Any, data: Path, case: str) -> Any:
    """The same patient drawn with twice the noise."""
    from medseg.phantom.pancreas import Options, make_case

    made = json.loads((data / "phantom.json").read_text())
    truth = json.loads((data / "truth" / f"{case}.json").read_text())
    options = Options(**made["options"])
    drawn = make_case(made["seed"], truth["number"], replace(options, noise_scale=2 * options.noise_scale))
    return replace(volume, data=drawn.phases.astype("float32"))


def to_json(judged: Any) -> dict[str, Any]:
    """One patient as JSON."""
    found = judged.detections
    return {
        "case": judged.case,
        "target": judged.target,
        "probabilities": [round(float(value), 6) for value in judged.probabilities],
        "without": None if judged.without is None else [round(float(value), 6) for value in judged.without],
        "lesion_ml": judged.lesion_ml,
        "lesion_there": judged.lesion_there,
        "organ_dice": judged.organ_dice,
        "lesion_dice": judged.lesion_dice,
        "scores": found.scores.tolist(),
        "hits": found.hits.tolist(),
        "lesions": found.lesions,
        "flags": list(judged.flags),
        "missing": list(judged.missing),
    }


def from_json(line: Mapping[str, Any]) -> Any:
    """The way back."""
    import numpy as np

    from medseg.evaluation.cohort import Judged
    from medseg.evaluation.detection import Detections

    without = line["without"]
    return Judged(
        line["case"],
        line["target"],
        np.array(line["probabilities"]),
        None if without is None else np.array(without),
        line["lesion_ml"],
        line["lesion_there"],
        line["organ_dice"],
        line["lesion_dice"],
        Detections(np.array(line["scores"], dtype=float), np.array(line["hits"], dtype=bool), line["lesions"]),
        tuple(line["flags"]),
        tuple(line["missing"]),
    )


def compute(task: Task, todo: Mapping[str, Sequence[str]], workers: int) -> Iterator[list[dict[str, Any]]]:
    """The lines of each patient, as they are done."""
    if workers == 1:
        prepare(task)
        for case, wanted in todo.items():
            yield answers(task, case, wanted)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare, initargs=(task,)) as pool:
        for future in as_completed([pool.submit(answers, task, case, wanted) for case, wanted in todo.items()]):
            yield future.result()


def tables(lines: Sequence[Mapping[str, Any]], data: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """All figures, over the patients for whom every condition is there."""
    from medseg.evaluation.classification import accuracy_gain
    from medseg.evaluation.cohort import summarise
    from medseg.io.patients import read_classes
    from medseg.phantom.patients import ceilings

    codes = list(read_classes(data))
    by_condition: dict[str, dict[str, Any]] = {}
    for line in lines:
        by_condition.setdefault(line["condition"], {})[line["case"]] = from_json(line)
    common = sorted(set.intersection(*(set(cases) for cases in by_condition.values())))
    order = [*(name for name in CONDITIONS if name in by_condition), *([BASELINE] if BASELINE in by_condition else [])]
    judged = {name: [by_condition[name][case] for case in common] for name in order}
    made = json.loads((data / "phantom.json").read_text())
    best = ceilings(lookalikes=made["options"]["lookalikes"])
    found: dict[str, Any] = {
        "remark": "synthetic data, not for clinical use",
        **names,
        "phantom": made,
        "patients": len(common),
        "ceilings": {"look": best.look, "look_age_sex": best.look_age_sex, "age_sex": best.age_sex},
        "conditions": {name: summarise(judged[name], codes) for name in order},
    }
    if BASELINE in judged and ALL in judged:
        import numpy as np

        target = np.array([one.target for one in judged[ALL]])
        after, before = (np.stack([one.probabilities for one in judged[name]]) for name in (ALL, BASELINE))
        without = np.stack([one.without for one in judged[ALL]])
        found["gain_over_baseline"] = vars_of(accuracy_gain(target, before, after))
        found["gain_over_baseline_without_metadata"] = vars_of(accuracy_gain(target, before, without))
    return found


def vars_of(estimate: Any) -> dict[str, float]:
    """An estimate as JSON."""
    return {key: round(getattr(estimate, key), 4) for key in ("value", "low", "high")}


def markdown(found: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    conditions = found["conditions"]
    lines = [
        f"{found['patients']} synthetic patients, seed {found['phantom']['seed']}; 95 % bootstrap intervals. Synthetic "
        "data, not for clinical use.",
        "",
        "| condition | accuracy | balanced accuracy | mean AUC | Dice pancreas | Dice lesion | lesion found "
        "| none there, none found | ill named ill | healthy named healthy | contradictions |",
        f"| {' | '.join(['---'] * 11)} |",
    ]
    for name, figures in conditions.items():
        title = "baseline: largest lesion of the S-path alone" if name == BASELINE else CONDITIONS[name][1]
        lesion = figures["lesion"]
        cells = [
            *(interval(figures[key]) for key in ("accuracy", "balanced_accuracy", "mean_auc")),
            *(number(figures["dice"][key]) for key in ("organ", "lesion")),
            *(number(lesion[key + of]) for of in ("", "_of_the_class") for key in ("sensitivity", "specificity")),
            "-" if name == BASELINE else str(figures["flags"]["disagreement"]),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        blind = figures["without_metadata"]
        if blind is not None:
            cells = [interval(blind[key]) for key in ("accuracy", "balanced_accuracy", "mean_auc")]
            title = "the same, age and sex unknown" if name == ALL else f"{title}, age and sex unknown"
            lines.append(f"| {title} | {' | '.join(cells)} {'| ' * 8}")
    best = found["ceilings"]
    lines += ["", "| what age and sex are worth | accuracy |", "| --- | --- |"]
    for name, figures in conditions.items():
        if figures["gain_from_metadata"] is not None:
            title = CONDITIONS[name][1].replace(", age, sex", "")
            lines.append(f"| gain, {title} | {interval(figures['gain_from_metadata'], sign=True)} |")
    lines += [
        f"| ceiling of any reader: look known without error | {best['look']:.3f} |",
        f"| ceiling: look, age and sex | {best['look_age_sex']:.3f} |",
        f"| ceiling: age and sex alone | {best['age_sex']:.3f} |",
    ]
    if "gain_over_baseline" in found:
        lines += [
            f"| gain over the baseline | {interval(found['gain_over_baseline'], sign=True)} |",
            "| gain over the baseline, age and sex unknown | "
            f"{interval(found['gain_over_baseline_without_metadata'], sign=True)} |",
        ]
    if ALL in conditions:
        lines += per_class(conditions[ALL])
    lines += ["", "| target | wanted | reached |", "| --- | --- | --- |"]
    for title, condition, keys, wanted in TARGETS:
        if condition in conditions:
            value: Any = conditions[condition]
            for key in keys:
                value = value[key]
            verdict = "" if value is None else " (reached)" if value >= wanted else " (missed)"
            lines.append(f"| {title} | >= {wanted:.2f} | {number(value)}{verdict} |")
    return "\n".join(lines) + "\n"


def per_class(figures: Mapping[str, Any]) -> list[str]:
    """Recall and AUC of each class, and the lesions one by one."""
    codes = list(figures["auc"])
    rates = figures["lesion"]["sensitivity_at_false_positives"]
    return [
        "",
        f"| all phases, age, sex | {' | '.join(codes)} |",
        f"| --- {'| --- ' * len(codes)}|",
        f"| named rightly | {' | '.join(number(figures['recall'][code], 2) for code in codes)} |",
        f"| AUC against the rest | {' | '.join(number(figures['auc'][code]['value'], 2) for code in codes)} |",
        "",
        f"| false lesions a patient, up to | {' | '.join(rates)} |",
        f"| --- {'| --- ' * len(rates)}|",
        f"| lesions found (IoU >= {figures['lesion']['min_iou']}) | {' | '.join(number(v) for v in rates.values())} |",
    ]


def interval(estimate: Mapping[str, float | None], *, sign: bool = False) -> str:
    """A figure with its interval."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    form = "+.3f" if sign else ".3f"
    return "-" if value is None or low is None or high is None else f"{value:{form}} ({low:{form}} to {high:{form}})"


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    """Compute what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, help="bundle that diagnoses: a name, or a run's folder")
    parser.add_argument("--data", required=True, type=Path, help="folder of medseg phantom pancreas")
    parser.add_argument("--part", default="", help="part of the phantom's split.json; default: all patients")
    parser.add_argument("--cases", type=int, default=0, help="only the first so many; the classes take turns")
    parser.add_argument("--baseline", help="bundle of the S-path alone, whose labels are the types of lesions")
    parser.add_argument("--conditions", default=",".join(CONDITIONS), help=f"of {', '.join(CONDITIONS)}")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder of the results")
    asked = parser.parse_args()
    conditions = tuple(asked.conditions.split(","))
    if unknown := [name for name in conditions if name not in CONDITIONS]:
        parser.error(f"unknown condition {', '.join(unknown)}")

    from medseg.bundles.load import load_bundle
    from medseg.io.patients import PATIENTS, read_patients
    from medseg.io.split import read_part

    task = Task(asked.data, asked.bundle, asked.baseline, conditions)
    cases = list(read_patients(asked.data / PATIENTS, classes=True))
    if asked.part:
        part = set(read_part(asked.data / "split.json", asked.part))
        cases = [case for case in cases if case in part]
    cases = cases[: asked.cases] if asked.cases else cases
    names = {"bundle": asked.bundle, "sha256": load_bundle(asked.bundle).sha256}
    if asked.baseline:
        names |= {BASELINE: asked.baseline, f"{BASELINE}_sha256": load_bundle(asked.baseline).sha256}
    wanted = [*conditions, *([BASELINE] if asked.baseline else [])]
    asked.output.mkdir(parents=True, exist_ok=True)
    journal = asked.output / "patients.jsonl"
    known = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    weights = {name: names[f"{BASELINE}_sha256" if name == BASELINE else "sha256"] for name in wanted}
    kept = {(case, name, weights[name]) for case in cases for name in wanted}
    lines = [line for line in known if (line["case"], line["condition"], line["sha256"]) in kept]
    done = {(line["case"], line["condition"]) for line in lines}
    todo = {case: [name for name in wanted if (case, name) not in done] for case in cases}
    todo = {case: missing for case, missing in todo.items() if missing}
    begin = time.perf_counter()
    with journal.open("a", encoding="utf-8") as stream:
        for count, found in enumerate(compute(task, todo, asked.workers), start=1):
            lines += found
            stream.writelines(json.dumps(line) + "\n" for line in found)
            stream.flush()
            print(f"\r{count}/{len(todo)} patients, {time.perf_counter() - begin:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    report = tables(lines, asked.data, names)
    write(asked.output, report)


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The tables and the picture."""
    import numpy as np

    from medseg.report.confusion import render_confusion

    (folder / "pancreas.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (folder / "pancreas.md").write_text(text)
    for name, figures in report["conditions"].items():
        if name in (ALL, BASELINE):
            confusion = figures["confusion"]
            picture = render_confusion(
                np.array(confusion["rows_truth_columns_named"]),
                confusion["classes"],
                title="baseline" if name == BASELINE else CONDITIONS[ALL][1],
                lines=[f"{report['patients']} patients, {report['remark']}"],
            )
            (folder / ("confusion.png" if name == ALL else f"confusion_{name}.png")).write_bytes(picture)
    print(text)


if __name__ == "__main__":
    main()
