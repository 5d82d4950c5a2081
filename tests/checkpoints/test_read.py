"""Weights files: every format's tensors come out, nothing in a file is ever run, and a bad file is one clear line."""

from __future__ import annotations

import argparse
import collections
import functools
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg.checkpoints import read
from medseg.errors import BundleError


class Settings:
    """An object of a training program; unpickling one would import its module."""

    def __init__(self) -> None:
        self.rate = 0.1


class Calls:
    """Pickled as a call, which is how a hostile file runs a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class SetsState:
    """An object whose class would run code when its state is put back."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("code of the file's choosing ran")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


def weights() -> dict[str, Tensor]:
    return {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.steps": torch.tensor(7)}


def assert_are_weights(state: dict[str, Tensor]) -> None:
    assert list(state) == list(weights())
    for key, value in weights().items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict", "network", "net"])
def test_pytorch_files_are_read_bare_and_in_containers(tmp_path: Path, container: str | None, zipped: bool) -> None:
    content = weights() if container is None else {"epoch": 3, container: weights(), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    state = read(tmp_path / "model.pth")
    assert_are_weights(state)
    assert state.containers == (() if container is None else (container,))
    assert state.ignored == (() if container is None else ("epoch", "optimizer"))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_nnunets_wrapper_with_numpy_scores_is_read(tmp_path: Path, zipped: bool) -> None:
    content = {
        "network_weights": weights(),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": np.float64(1)}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epoch_end_timestamps": [1.5]},
        "_best_ema": np.float64(0.75),
        "current_epoch": 4,
        "init_args": {"plans": {"patch_size": np.array([64, 64])}, "fold": 0, "device": torch.device("cuda")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(content, tmp_path / "checkpoint_final.pth", _use_new_zipfile_serialization=zipped)
    assert_are_weights(read(tmp_path / "checkpoint_final.pth"))


def test_lightnings_wrapper_with_objects_is_read_and_no_object_is_made(tmp_path: Path) -> None:
    content = {
        "state_dict": weights(),
        "pytorch-lightning_version": "2.4",
        "hyper_parameters": argparse.Namespace(rate=0.1, settings=Settings(), folder=Path("/data")),
        "callbacks": collections.defaultdict(list, {"best": [SetsState()]}),
        "loops": {"class": Settings},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_are_weights(read(tmp_path / "last.ckpt"))


def test_numpy_arrays_in_a_pytorch_file_become_tensors(tmp_path: Path) -> None:
    fortran, swapped = np.arange(6.0, dtype=np.float32).reshape(2, 3).T, np.array([1, 2], dtype=">i4")
    torch.save({"state_dict": {"a": fortran, "b": swapped, "c": np.float32(3)}}, tmp_path / "model.pth")
    state = read(tmp_path / "model.pth")
    assert torch.equal(state["a"], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert state["b"].tolist() == [1, 2]
    assert list(state) == ["a", "b"]


def test_npz_and_safetensors_are_read_whatever_their_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **{"Transformer/kernel": np.ones((2, 3), np.float32), "scalar": np.float32(2)})
    (tmp_path / "vit.npz").rename(tmp_path / "vit.pth")
    save_file(weights(), tmp_path / "model.bin")
    assert {key: tuple(value.shape) for key, value in read(tmp_path / "vit.pth").items()} == {
        "Transformer/kernel": (2, 3),
        "scalar": (),
    }
    assert set(read(tmp_path / "model.bin")) == set(weights())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("function", [subprocess.call, functools.partial, eval, Settings, getattr])
def test_a_pickle_that_calls_something_is_refused_and_nothing_is_run(
    tmp_path: Path, zipped: bool, function: Any
) -> None:
    proof = tmp_path / "proof"
    arguments = (f"open({str(proof)!r}, 'w')",) if function is eval else (["touch", str(proof)],)
    content = {"state_dict": weights(), "extra": Calls(function, *arguments)}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BundleError, match="refused, nothing was run"):
        read(tmp_path / "model.pth")
    assert not proof.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "m.pth").write_bytes(pickle.dumps(Calls(subprocess.call, ["touch", str(proof)]), protocol))
    with pytest.raises(BundleError, match=r"refused, nothing was run|not a weights file"):
        read(tmp_path / "m.pth")
    assert not proof.exists()


def test_numpys_own_unpickling_is_not_reached(tmp_path: Path) -> None:
    objects = np.array([Calls(subprocess.call, ["true"])], dtype=object)
    np.savez(tmp_path / "objects.npz", x=objects)
    torch.save({"state_dict": weights(), "extra": np.array([None], dtype=object)}, tmp_path / "objects.pth")
    for name in ("objects.npz", "objects.pth"):
        with pytest.raises(BundleError, match="refused, nothing was run"):
            read(tmp_path / name)


def test_a_pickled_network_is_refused_with_its_class(tmp_path: Path) -> None:
    for content in (nn.Linear(2, 2), {"model": nn.Linear(2, 2)}):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(BundleError, match=r"holds a torch\.nn\.modules\.linear\.Linear, not a state dict"):
            read(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "a Git LFS pointer, not the weights"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page, not weights"),
        (b"weights of the model, in words", "not a weights file"),
        (b"\x80\x02}q\x00.", "damaged, or no weights file"),
        (b"PK\x03\x04 and no more", "damaged or cut short"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{no json here at all}", "damaged, or no weights file"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(BundleError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ending", [".pth", ".npz", ".safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_file_cut_short_is_refused(tmp_path: Path, ending: str, kept: float) -> None:
    path = tmp_path / f"model{ending}"
    if ending == ".pth":
        torch.save(weights(), path)
    elif ending == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in weights().items()})
    else:
        save_file(weights(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(BundleError, match=r"damaged|not a weights file"):
        read(path)


def test_one_changed_bit_in_the_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(weights(), path)
    content = bytearray(path.read_bytes())
    content[content.index(weights()["layer.weight"].numpy().tobytes()) + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its checksum"):
        read(path)


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "fold0.zip", "w") as archive:
        archive.writestr("fold0/model.pt", b"inside")
    torch.save({"epoch": 1, "lr": 0.1}, tmp_path / "empty.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    for path, problem in [
        (tmp_path / "fold0.zip", "zip archive without weights at its top level; unpack it and give fold0/model.pt"),
        (tmp_path / "empty.pt", r"no state dict in it: it holds 2 \(epoch, lr\)"),
        (tmp_path / "tensor.pt", "it holds a Tensor, not a state dict"),
        (tmp_path / "missing.pt", "no such file"),
        (tmp_path, "cannot be read"),
    ]:
        with pytest.raises(BundleError, match=problem):
            read(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript, which only this test makes
def test_a_torchscript_archive_is_code(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.ts")
    with pytest.raises(BundleError, match="a TorchScript archive, which is code; refused, nothing was run"):
        read(tmp_path / "model.ts")
