"""What ``medseg label serve`` refuses before it starts anything."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medseg.errors import BundleError, DeviceError, InputError, MedsegError, UsageError
from medseg.label.serve import Service, serve, server_environment
from tests.builders import tiny_bundle

_EVERYWHERE = "0.0.0.0"  # noqa: S104 - refused
_LOGIN = {"MONAI_LABEL_AUTH_ENABLE": "true", "MONAI_LABEL_AUTH_REALM_URI": "https://login.example/realms/x"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if MONAI Label was there, which none of these tests starts."""
    monkeypatch.setattr("medseg.label.serve.check_installed", lambda: None)


def refusal(folder: Path, environment: dict[str, str] | None = None, **changes: Any) -> MedsegError:
    (folder / "studies").mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "studies": folder / "studies",
        "bundles": [tiny_bundle(folder) if not (folder / "tiny").exists() else folder / "tiny"],
        "trained": folder / "trained",
    }
    with pytest.raises(MedsegError) as refused:
        serve(Service(**(settings | changes)), environment or {}, ready=pytest.fail)
    return refused.value


@pytest.mark.usefixtures("installed")
def test_an_address_that_others_reach_needs_authentication(tmp_path: Path) -> None:
    for host in (_EVERYWHERE, "192.0.2.7", "::"):
        error = refusal(tmp_path, host=host)
        assert isinstance(error, UsageError)
        assert str(error).startswith(f"--host: others can reach {host}, and no authentication is configured")
    half = {"MONAI_LABEL_AUTH_ENABLE": "true"}  # MONAI Label would ask a realm on its own machine
    assert "no authentication" in str(refusal(tmp_path, half, host=_EVERYWHERE))
    assert "no address" in str(refusal(tmp_path, _LOGIN, host="monai label"))
    # With a login the next thing that is wrong is said: this machine does not have the address.
    assert str(refusal(tmp_path, _LOGIN, host="192.0.2.7")).startswith("--port: 192.0.2.7:8000 cannot be used")


@pytest.mark.usefixtures("installed")
def test_folders_bundles_port_and_pages_are_checked_first(tmp_path: Path) -> None:
    error = refusal(tmp_path, studies=tmp_path / "nowhere")
    assert (type(error), str(error)) == (
        InputError,
        f"{tmp_path}/nowhere: is no folder; give the folder that holds the images",
    )
    assert "no origin of a web page" in str(refusal(tmp_path, origins=["localhost:3000/viewer"]))
    assert isinstance(refusal(tmp_path, bundles=["no_such_bundle"]), BundleError)
    assert "has no weights" in str(refusal(tmp_path, bundles=["dformer_synapse"]))
    assert "the name of two" in str(refusal(tmp_path, bundles=[tmp_path / "tiny", tiny_bundle(tmp_path / "b")]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(refusal(tmp_path, port=port)).startswith(f"--port: 127.0.0.1:{port} cannot be used")


def test_without_monai_label_the_line_names_the_command_and_the_code_is_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.metadata.version

    def absent(name: str) -> str:
        return there("no-such-package" if name == "monailabel" else name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    error = refusal(tmp_path)
    assert (type(error), str(error)) == (DeviceError, "MONAI Label: is not installed; run medseg label install")


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("monailabel", reason="MONAI Label is not installed: medseg label install")
    command = [sys.executable, "-m", "medseg", "label", "serve", "--studies", str(tmp_path), "--host", _EVERYWHERE]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"error: --host: others can reach {_EVERYWHERE}")


def test_modules_that_only_the_server_needs_stand_on_its_path_alone(tmp_path: Path) -> None:
    environment = server_environment({"PYTHONPATH": "mine", "MONAI_LABEL_CORS_ORIGINS": '["http://x"]'}, tmp_path)
    path = environment["PYTHONPATH"].split(":")
    assert path[-1] == "mine"
    assert any(one.endswith("_compat/pydicom_seg") for one in path)
    assert environment["TMPDIR"] == str(tmp_path / "tmp")
    assert "MONAI_LABEL_CORS_ORIGINS" not in environment
    for folder in path[:-1]:
        assert folder not in sys.path
