"""Clearances: which back ends a bundle may be computed by without being asked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from medseg.bundles.clearance import (
    Agreement,
    Clearance,
    Method,
    agreement,
    cleared,
    read_clearances,
    version_family,
    write_clearances,
)
from medseg.bundles.integrity import check_manifest
from medseg.bundles.load import Bundle, load_bundle
from medseg.bundles.locate import shipped_bundles
from medseg.errors import OutputError
from tests.builders import tiny_bundle

FAST, REDUCED = Method("openvino", "fp32"), Method("openvino", "bf16")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_bundle(tmp_path_factory.mktemp("bundles")))


def found(bundle: Bundle, lowest: float, method: Method = FAST) -> Clearance:
    dice = {"Anterior": Agreement(1.0, 1.0), "Posterior": Agreement(lowest, 1.0)}
    return Clearance(method.backend, method.precision, "2026.4", bundle.sha256, 3, dice, 3.2, 0.001)


@pytest.mark.parametrize(
    ("method", "lowest", "passes"),
    [(FAST, 0.999, True), (FAST, 0.9989, False), (REDUCED, 0.998, True), (REDUCED, 0.9979, False)],
)
def test_the_worst_label_of_the_worst_case_decides(
    plain: Bundle, tmp_path: Path, method: Method, lowest: float, passes: bool
) -> None:
    written = load_bundle(write_clearances(plain, [found(plain, lowest, method)], tmp_path))
    assert cleared(written, method, "2026.4.1-12345-abc") == (passes, "")
    other = REDUCED if method == FAST else FAST
    assert cleared(written, other, "2026.4.1") == (False, "")


def test_a_clearance_of_other_weights_or_another_version_is_ignored_with_a_warning(
    plain: Bundle, tmp_path: Path
) -> None:
    stranger = replace(found(plain, 1.0), weights_sha256="0" * 64)
    written = load_bundle(write_clearances(plain, [stranger], tmp_path / "stranger"))
    answer, warning = cleared(written, FAST, "2026.4.1")
    assert not answer
    assert "other weights" in warning
    written = load_bundle(write_clearances(plain, [found(plain, 1.0)], tmp_path / "older"))
    answer, warning = cleared(written, FAST, "2027.0.0")
    assert not answer
    assert "2026.4" in warning
    assert "2027.0" in warning


def test_a_malformed_clearance_clears_nothing_and_says_so(plain: Bundle, tmp_path: Path) -> None:
    root = write_clearances(plain, [found(plain, 1.0)], tmp_path)
    metadata = json.loads((root / "configs" / "metadata.json").read_text())
    for damage in ({"dice": {"Anterior": {"lowest": 7, "mean": 1}}}, {"dice": None}, {"cases": "many"}):
        entry = metadata["medseg"]["validated_backends"][0] | damage
        damaged = replace(plain, metadata={"medseg": {"validated_backends": [entry]}})
        answer, warning = cleared(damaged, FAST, "2026.4.1")
        assert not answer
        assert "is ignored" in warning


def test_writing_keeps_the_manifest_right_and_entries_of_other_methods(plain: Bundle, tmp_path: Path) -> None:
    root = write_clearances(plain, [found(plain, 1.0, FAST), found(plain, 1.0, REDUCED)], tmp_path)
    assert check_manifest(root)
    assert (root / "models" / "model.pt").read_bytes() == (plain.root / "models" / "model.pt").read_bytes()
    again = write_clearances(load_bundle(root), [found(plain, 0.5, FAST)])  # the bundle itself
    assert again == root.resolve()
    assert check_manifest(root)
    assert [(one.method, one.passed) for one in read_clearances(load_bundle(root).metadata)] == [
        (REDUCED, True),
        (FAST, False),
    ]
    assert list(tmp_path.iterdir()) == [root]


def test_a_shipped_bundle_and_an_existing_one_are_not_touched(plain: Bundle, tmp_path: Path) -> None:
    shipped = load_bundle(shipped_bundles() / "swin_unetr_hippocampus")
    before = (shipped.root / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="shipped bundle, which stays as it is; give a folder with -o"):
        write_clearances(shipped, [found(shipped, 1.0)])
    assert (shipped.root / "manifest.json").read_bytes() == before
    write_clearances(plain, [found(plain, 1.0)], tmp_path)
    with pytest.raises(OutputError, match="exists; use --overwrite"):
        write_clearances(plain, [found(plain, 1.0)], tmp_path)


def test_cases_without_a_label_do_not_count_and_no_case_clears_nothing(plain: Bundle) -> None:
    assert agreement([math.nan, 0.9, 1.0]) == Agreement(0.9, 0.95)
    assert agreement([math.nan]) is None
    assert not replace(found(plain, 1.0), dice={}).passed
    assert version_family("2026.4.1-22222-abcdef") == "2026.4"
