"""`medseg weights import`: checked before anything is written, recorded, found first, all or nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import medseg
from medseg.bundles import locate, weights
from medseg.bundles.integrity import write_manifest
from medseg.bundles.load import load_bundle, weights_of
from medseg.bundles.locate import all_bundles, find_bundle, user_bundles
from medseg.bundles.verify import verify_bundle
from medseg.bundles.weights import import_weights
from medseg.checkpoints.files import read
from medseg.cli.weights import app
from medseg.errors import BundleError, OutputError, UsageError
from tests.builders import blob_scan, save_scan, tiny_bundle, tiny_spec

SOURCE = "the authors publish them at https://example.org/weights"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shipped bundle without weights; its weights lie beside it, in a complete bundle."""
    complete = tiny_bundle(tmp_path / "complete", "paper")
    root = tmp_path / "shipped" / "paper"
    shutil.copytree(complete, root, ignore=shutil.ignore_patterns("models"))
    path = root / "configs" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["medseg"]["weights_source"] = SOURCE
    path.write_text(json.dumps(metadata))
    (root / "docs" / "README.md").write_text("**This bundle ships without weights.** Text.\n")
    write_manifest(root)
    monkeypatch.setattr(locate, "shipped_bundles", lambda: tmp_path / "shipped")
    monkeypatch.setattr(weights, "shipped_bundles", lambda: tmp_path / "shipped")
    monkeypatch.setenv("MEDSEG_HOME", str(tmp_path / "home"))
    return root


def _state(tmp_path: Path) -> dict[str, torch.Tensor]:
    return dict(read(tmp_path / "complete" / "paper" / "models" / "model.pt"))


def _published(tmp_path: Path, **changes: Any) -> Path:
    """The weights as the research scripts store them: container, data-parallel prefix, original names of the MLP."""
    state = {
        "module." + key.replace(".mlp.linear1.", ".mlp.fc1.").replace(".mlp.linear2.", ".mlp.fc2."): value
        for key, value in (_state(tmp_path) | changes).items()
        if value is not None
    }
    path = tmp_path / "published model.pt"
    torch.save({"epoch": 7, "best_acc": np.float64(0.8), "state_dict": state, "optimizer": {"lr": 1.0}}, path)
    return path


def test_a_bundle_without_weights_says_where_they_are_and_which_command_to_run(shipped: Path, tmp_path: Path) -> None:
    scan = save_scan(tmp_path / "scan.nii", blob_scan())
    with pytest.raises(BundleError) as caught:
        medseg.infer(scan, bundle="paper")
    assert caught.value.exit_code == 4
    assert str(caught.value) == f"paper: has no weights; {SOURCE}; then run: medseg weights import paper CHECKPOINT"
    checks = list(verify_bundle("paper"))
    assert all(check.passed for check in checks)
    assert "medseg weights import paper" in next(check.found for check in checks if check.name == "weights")


def test_an_import_gives_the_published_numbers_a_record_and_a_bundle_that_is_found_first(
    shipped: Path, tmp_path: Path
) -> None:
    checkpoint = _published(tmp_path)
    root = import_weights("paper", checkpoint)
    assert root == user_bundles() / "paper" == find_bundle("paper")
    assert shipped not in all_bundles()
    assert root in all_bundles()
    ready = load_bundle("paper")
    noted = ready.metadata["medseg"]["weights"]
    assert noted["source"] == "published model.pt"
    assert noted["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert str(tmp_path) not in (root / "configs" / "metadata.json").read_text()
    assert "without weights" not in (root / "docs" / "README.md").read_text()
    assert all(check.passed for check in verify_bundle("paper"))
    scan = save_scan(tmp_path / "scan.nii", blob_scan())
    expected = medseg.infer(scan, bundle=tmp_path / "complete" / "paper", overlap=0.0)
    assert (medseg.infer(scan, bundle="paper", overlap=0.0).label_map == expected.label_map).all()
    assert weights_of(shipped) is None


def test_what_does_not_fit_is_named_and_nothing_is_written(shipped: Path, tmp_path: Path) -> None:
    key = "out.conv.conv.weight"
    for changes, words in (
        ({key: torch.zeros(5, 12, 1, 1, 1)}, [key, "(5, 12, 1, 1, 1), not (3, 12, 1, 1, 1)", "out_channels 5, not 3"]),
        ({key: None, "decoder1.extra": torch.zeros(1)}, [f"missing: 1 ({key})", "unexpected: 1 (decoder1.extra)"]),
        ({key: torch.full((3, 12, 1, 1, 1), float("nan"))}, [key, "NaN"]),
    ):
        with pytest.raises(BundleError) as caught:
            import_weights("paper", _published(tmp_path, **changes))
        assert all(word in str(caught.value) for word in words), caught.value
    encoder = {k: v for k, v in _state(tmp_path).items() if k.startswith("swinViT.")}
    torch.save(encoder, tmp_path / "encoder.pt")
    with pytest.raises(BundleError, match="encoder without a decoder"):
        import_weights("paper", tmp_path / "encoder.pt")
    with pytest.raises(BundleError, match="no such file"):
        import_weights("paper", tmp_path / "absent.pt")
    with pytest.raises(BundleError, match="not allowed: feature_size"):
        import_weights("paper", _published(tmp_path), network={"feature_size": 13})
    assert not user_bundles().exists()


def test_code_in_a_checkpoint_does_not_run(shipped: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({"state_dict": _state(tmp_path), "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BundleError):
        import_weights("paper", tmp_path / "evil.pt")
    assert not marker.exists()


def test_an_earlier_import_is_kept_until_a_new_one_is_whole(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _published(tmp_path)
    root = import_weights("paper", checkpoint)
    with pytest.raises(OutputError, match="--overwrite"):
        import_weights("paper", checkpoint)
    before = (root / "manifest.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_state", full)
        with pytest.raises(OutputError, match="No space left"):
            import_weights("paper", checkpoint, overwrite=True)
    assert (root / "manifest.json").read_text() == before
    other = _published(tmp_path, **{"out.conv.conv.bias": torch.ones(3)})
    import_weights("paper", other, overwrite=True)
    assert (read(root / "models" / "model.pt")["out.conv.conv.bias"] == 1).all()
    assert [path.name for path in user_bundles().iterdir()] == ["paper"]


def test_another_size_of_the_network_is_imported_with_its_arguments(shipped: Path, tmp_path: Path) -> None:
    spec = tiny_spec()
    network = medseg.networks.create("swin_unetr", **{**spec.network_args, "feature_size": 24, "merging": "legacy"})
    torch.save(network.state_dict(), tmp_path / "small.pt")
    root = import_weights("paper", tmp_path / "small.pt", network={"feature_size": 24, "merging": "legacy"})
    loaded = load_bundle(root).network()
    assert loaded.merging == "legacy"
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in network.parameters())


def test_the_command_says_what_to_do_next_and_refuses_arguments_that_are_no_json(shipped: Path, tmp_path: Path) -> None:
    run, checkpoint = CliRunner(), str(_published(tmp_path))
    done = run.invoke(app, ["import", "paper", checkpoint])
    assert done.exit_code == 0, done.output
    assert "ready" in done.output
    assert "medseg infer SCAN --bundle paper" in done.output
    other = run.invoke(app, ["import", "paper", checkpoint, "-o", str(tmp_path / "elsewhere"), "--json"])
    told = json.loads(other.output)
    assert told["folder"] == str(tmp_path / "elsewhere" / "paper")
    assert len(told["weights"]["sha256"]) == 64
    assert isinstance(run.invoke(app, ["import", "paper", checkpoint, "--network", "{"]).exception, UsageError)


def test_a_users_bundle_never_takes_the_place_of_a_shipped_one_with_weights(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_weights("paper", _published(tmp_path))
    monkeypatch.setattr(locate, "shipped_bundles", lambda: tmp_path / "complete")
    assert find_bundle("paper") == tmp_path / "complete" / "paper"
