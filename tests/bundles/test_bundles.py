"""Bundles: found, checked, packed; nothing of their code runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.bundles import locate
from medseg.bundles.integrity import MANIFEST, write_manifest
from medseg.bundles.load import load_bundle
from medseg.bundles.locate import all_bundles, find_bundle, shipped_bundles
from medseg.bundles.spec import read_spec
from medseg.bundles.verify import check_metadata, verify_bundle
from medseg.errors import BundleError
from tests.builders import tiny_bundle, tiny_spec


def _edit(root: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "configs" / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    write_manifest(root)


def test_a_specification_survives_the_way_through_the_bundles_files(tmp_path: Path) -> None:
    assert read_spec(tiny_bundle(tmp_path)) == tiny_spec()
    assert read_spec(tiny_bundle(tmp_path, "cubic", interpolation="cubic")) == tiny_spec(interpolation="cubic")


def test_every_shipped_bundle_passes_its_checks() -> None:
    roots = [root for root in all_bundles() if root.parent == shipped_bundles()]
    assert roots, "no shipped bundles"
    for root in roots:
        for check in verify_bundle(root):
            assert check.passed, f"{root.name}: {check.name}: {check.found}"


def test_shipped_weights_stay_small() -> None:
    roots = shipped_bundles().iterdir()
    sizes = {root.name: sum(p.stat().st_size for p in (root / "models").glob("*")) for root in roots}
    assert max(sizes.values()) < 12_000_000
    assert sum(sizes.values()) < 80_000_000


BROKEN: list[tuple[str, str, Callable[[dict[str, Any]], Any], str]] = [
    (
        "expression",
        "inference.json",
        lambda c: c["network_def"].update(feature_size="$__import__('os').getpid()"),
        r"\$",
    ),
    ("macro", "inference.json", lambda c: c["inferer"].update(mode="%/etc/passwd"), "expression"),
    ("foreign target", "inference.json", lambda c: c["network_def"].update(_target_="os.system"), "os.system"),
    ("computed target", "inference.json", lambda c: c["network_def"].update(_target_="$print"), "expression"),
    (
        "monai target",
        "inference.json",
        lambda c: c["network_def"].update(_target_="monai.apps.download_url"),
        "download",
    ),
    (
        "foreign transform",
        "inference.json",
        lambda c: c["preprocessing"]["transforms"].append({"_target_": "Lambdad", "func": "$print"}),
        "expression",
    ),
    (
        "unknown transform",
        "inference.json",
        lambda c: c["preprocessing"]["transforms"].append({"_target_": "RandFlipd"}),
        "RandFlipd",
    ),
    ("debugger", "inference.json", lambda c: c["inferer"].update(_mode_="debug"), "_mode_"),
    ("overlap", "inference.json", lambda c: c["inferer"].update(overlap=1.5), "overlap"),
    ("roi", "inference.json", lambda c: c["inferer"].update(roi_size=[32, 64]), "malformed"),
    ("padding", "inference.json", lambda c: c["inferer"].update(padding_mode="wild"), "padding_mode"),
    ("channels", "inference.json", lambda c: c["network_def"].update(in_channels=2), "in_channels"),
    ("argument", "inference.json", lambda c: c["network_def"].update(depth=5), "depth"),
    ("no inferer", "inference.json", lambda c: c.pop("inferer"), "inferer"),
    (
        "labels",
        "metadata.json",
        lambda c: c["network_data_format"]["outputs"]["pred"]["channel_def"].update({"7": "x"}),
        "labels",
    ),
    ("no formats", "metadata.json", lambda c: c.pop("network_data_format"), "network_data_format"),
]


@pytest.mark.parametrize(("name", "file", "change", "word"), BROKEN, ids=[row[0] for row in BROKEN])
def test_what_medseg_does_not_run_is_refused_by_name(
    tmp_path: Path, name: str, file: str, change: Callable[[dict[str, Any]], Any], word: str
) -> None:
    root = tiny_bundle(tmp_path)
    _edit(root, file, change)
    with pytest.raises(BundleError, match=word) as caught:
        load_bundle(root).network()
    assert "\n" not in str(caught.value)


def test_code_outside_the_sections_that_inference_reads_never_runs(tmp_path: Path) -> None:
    root, marker = tiny_bundle(tmp_path), tmp_path / "ran"
    _edit(
        root,
        "inference.json",
        lambda c: c.update(run=[f"$open({str(marker)!r}, 'w')"], imports=["$import antigravity"]),
    )
    (root / "scripts").mkdir()
    (root / "scripts" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')")
    write_manifest(root)
    load_bundle(root).network()
    assert not marker.exists()


def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path: Path) -> None:
    root, marker = tiny_bundle(tmp_path), tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"model": Evil()}, root / "models" / "model.pt")
    write_manifest(root)
    with pytest.raises(BundleError):
        load_bundle(root).network()
    assert not marker.exists()


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path)
    weights = root / "models" / "model.pt"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.pt: damaged or changed: its SHA-256"):
        load_bundle(root)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BundleError, match="Git LFS pointer"):
        load_bundle(root)
    weights.unlink()
    assert load_bundle(root).weights is None
    with pytest.raises(BundleError, match="has no weights"):
        load_bundle(root).network()
    assert [check.name for check in verify_bundle(root) if not check.passed] == ["manifest"]


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path)
    path = root / "models" / "model.pt"
    state = torch.load(path, weights_only=True)["model"]  # noqa: TID251 - the test's own file
    key = next(iter(state))
    for broken, word in (
        ({k: v for k, v in state.items() if k != key}, key),
        ({**state, "extra": torch.ones(1)}, "extra"),
        ({**state, key: torch.ones(1)}, key),
        ({**state, key: state[key] * float("nan")}, "NaN"),
    ):
        torch.save({"model": broken}, path)
        write_manifest(root)
        with pytest.raises(BundleError, match=word):
            load_bundle(root).network()


def test_a_link_that_leads_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path)
    (root / "docs" / "more.txt").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="leads out"):
        load_bundle(root)


def test_a_bundle_is_found_by_folder_by_name_and_in_the_users_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEDSEG_BUNDLES", str(tmp_path / "more"))
    own, other = tiny_bundle(tmp_path / "home" / "bundles", "own"), tiny_bundle(tmp_path / "more", "other")
    assert find_bundle(own) == find_bundle("own") == own
    assert find_bundle("other") == other
    assert {own, other} <= set(all_bundles())
    for wrong in ("nothing", "../home/bundles/own", "..", ""):
        with pytest.raises(BundleError, match=r"not found|without"):
            find_bundle(wrong)
    with pytest.raises(BundleError, match="is a file"):
        find_bundle(own / "LICENSE")
    monkeypatch.setattr(locate, "shipped_bundles", lambda: tmp_path / "none")
    with pytest.raises(BundleError, match="known: own, other"):
        find_bundle("nothing")


def test_configuration_files_have_limits(tmp_path: Path) -> None:
    root = tiny_bundle(tmp_path)
    (root / MANIFEST).unlink()
    path = root / "configs" / "inference.json"
    good = path.read_text()
    for text, word in (
        (good[:-10], "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": ' * 40 + "1" + "}" * 40, "deeper than"),
        ("[" * 100_000, "not valid JSON"),
        (" " * 1_000_001, "larger than 1 MB"),
    ):
        path.write_text(text)
        with pytest.raises(BundleError, match=word):
            load_bundle(root)
    path.unlink()
    with pytest.raises(BundleError, match="no such file"):
        load_bundle(root)


def test_metadata_is_held_against_monais_schema(tmp_path: Path) -> None:
    good = json.loads((tiny_bundle(tmp_path) / "configs" / "metadata.json").read_text())
    check_metadata(good)
    with pytest.raises(BundleError, match=r"version is missing.*eval_metrics is not a dict"):
        check_metadata({**{k: v for k, v in good.items() if k != "version"}, "eval_metrics": []})
