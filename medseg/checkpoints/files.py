"""Weights files, read without running anything that they contain.

Pickled files go through ``torch.load(weights_only=True)``, an interpreter that knows tensors and plain containers
only. Training programs store more beside the weights: scores as NumPy scalars, settings as objects. For the former
this module has stand-ins, which make plain numbers; the latter become `Inert` objects, which do nothing. A pickle that
calls any other function is refused. No code of the file's choosing runs in any case.
"""

from __future__ import annotations

import pickle
import re
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from medseg.checkpoints.state import CONTAINERS, State, unwrap
from medseg.errors import BundleError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# torch keeps the names that a restricted load accepts in one set for the whole process.
_ACCEPTED_NAMES = threading.Lock()


def read(path: Path | str) -> State:
    """Read the state dict of a weights file.

    The format follows from the first bytes, not from the name: PyTorch's zip and older formats (``.pth``, ``.pt``,
    ``.ckpt``), ``.npz`` and ``.safetensors``. What nnU-Net, Lightning and others wrap around a state dict is removed;
    the keys stay as they are.

    Returns:
        The tensors by key, on the CPU. `State.containers` and `State.ignored` say what was around them.

    Raises:
        BundleError: there is no such file, it is damaged or no weights file, it would run code, or it holds no tensors.
    """
    return unwrap(read_content(Path(path)), source=str(path))


def read_content(path: Path) -> Mapping[Any, Any]:
    """All that a weights file holds: tensors, and the numbers and names beside them.

    Raises:
        BundleError: as `read`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as err:
        raise BundleError(path, "no such file", "check the path") from err
    except OSError as err:
        raise BundleError(path, f"cannot be read ({err.strerror or err})") from err
    if not start:
        raise BundleError(path, "empty file", "download it again")
    if start.startswith(_LFS_POINTER):
        raise BundleError(path, "a Git LFS pointer, not the weights", "run `git lfs pull`")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise BundleError(path, "a web page, not weights", "the download failed; download it again")
    if start.startswith(b"PK"):
        return _read_zip(path, size)
    if start.startswith(b"\x80"):
        return _read_pickle(path, inert_names=[])
    if len(start) > 8 and start[8:9] == b"{":
        return _read_safetensors(path)
    raise BundleError(path, "not a weights file", "known: .pt, .pth, .ckpt of PyTorch, .npz, .safetensors")


def _read_zip(path: Path, size: int) -> Mapping[Any, Any]:
    """Tell PyTorch's zip format from NumPy's, and both from other archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            damaged = archive.testzip() if stored else None  # PyTorch does not look at the checksums
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as err:
        raise BundleError(
            path, f"damaged or cut short: the file has {size} bytes and no complete zip directory", "download it again"
        ) from err
    if damaged is not None:
        raise BundleError(path, f"damaged: {damaged} does not match its checksum", "download it again")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        raise BundleError(path, "a TorchScript archive, which is code; refused, nothing was run", "give a state dict")
    if any(name.endswith("data.pkl") for name in members):
        return _read_pickle(path, inert_names=_unknown_names(path))
    if members and all(name.endswith(".npy") for name in members):
        return _read_npz(path)
    inside = next((name for name in members if name.endswith((".pt", ".pth", ".npz", ".safetensors"))), None)
    remedy = f"unpack it and give {inside}" if inside else ""
    raise BundleError(path, "a zip archive without weights at its top level", remedy)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except ValueError as err:
        if "allow_pickle" in str(err):
            raise BundleError(path, "its arrays are pickled objects; refused, nothing was run") from err
        raise _damaged(path, err) from err
    except Exception as err:  # zlib, struct, zipfile: whatever a damaged member provokes
        raise _damaged(path, err) from err


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        tensors: dict[str, Any] = load_file(path)
    except (SafetensorError, ValueError, OSError, struct.error) as err:
        raise _damaged(path, err) from err
    return tensors


def _read_pickle(path: Path, *, inert_names: list[str]) -> Mapping[Any, Any]:
    stand_ins: list[Any] = [(make, name) for name, make in _STAND_INS.items()]
    stand_ins += [(_inert(name), name) for name in inert_names]
    try:
        with (
            _ACCEPTED_NAMES,
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(stand_ins),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except _CallRefusedError as err:
        raise _refused(path, f"it calls {err}") from err
    except pickle.UnpicklingError as err:
        name = re.search(r"GLOBAL (\S+)", str(err))
        raise _refused(path, f"it names {name[1]}" if name else "it is no plain state dict") from err
    except Exception as err:  # a damaged or hostile pickle can provoke any error of the interpreter
        raise _damaged(path, err) from err
    held = content
    if isinstance(content, Mapping):
        held = next((value for name in CONTAINERS if isinstance(value := content.get(name), Inert)), content)
    if not isinstance(held, Mapping):
        kind = held.name if isinstance(held, Inert) else type(held).__name__
        raise BundleError(path, f"it holds a {kind}, not a state dict", "save network.state_dict() and give that")
    plain: Mapping[Any, Any] = _without_stand_ins(content)
    return plain


def _unknown_names(path: Path) -> list[str]:
    """Classes and functions that a pickle names and torch does not know, less those that must never be named."""
    try:
        with warnings.catch_warnings(action="ignore"):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except pickle.UnpicklingError:  # the load itself refuses it, and says why
        return []
    except Exception as err:  # as above: the scan walks through a file that may be damaged
        raise _damaged(path, err) from err
    return [name for name in names if name not in _STAND_INS and name.partition(".")[0] not in _NEVER_NAMED]


def _damaged(path: Path, err: Exception) -> BundleError:
    first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    return BundleError(path, f"damaged, or no weights file ({first[:160]})", "download it again")


def _refused(path: Path, why: str) -> BundleError:
    return BundleError(
        path, f"a pickle that could run code ({why}); refused, nothing was run", "ask for a plain state dict"
    )


class _CallRefusedError(Exception):
    """A pickle calls a class or function that nobody vouched for; the text is its name."""


class Inert:
    """What becomes of an object that a pickle holds: no class of that name is imported, no state is kept.

    Making one as a call of its class is refused, which is how a pickle runs a function; copying an object's state into
    an instance is how it stores data, and is ignored.
    """

    name = "object"

    def __new__(cls, *_args: object) -> Inert:
        """Accept and forget the arguments of the class that this stands for."""
        return super().__new__(cls)

    def __init__(self, *_args: object) -> None:
        raise _CallRefusedError(self.name)

    def __setstate__(self, state: object) -> None:
        """Forget the object's state."""


def _inert(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"name": name})


class _NumpyDtype:
    """Stands for ``numpy.dtype`` in a pickle; numbers only."""

    def __init__(self, code: object, *_flags: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code):
            raise _CallRefusedError(f"numpy.dtype({code!r})")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order, the only part of the state that a number has."""
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


class _NumpyArray:
    """Stands for ``numpy.ndarray`` in a pickle; the array is made from its bytes, never by NumPy's own unpickling."""

    def __init__(self, *_args: object) -> None:
        self.array: np.ndarray[Any, Any] = np.empty(0)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _NumpyDtype, bool, bytes]) -> None:
        """Make the array from (version, shape, dtype, Fortran order, bytes)."""
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C").copy()


def _numpy_scalar(dtype: _NumpyDtype, data: bytes) -> Any:
    """Stands for NumPy's scalar constructor: a Python number."""
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _path(*parts: object) -> str:
    return "/".join(str(part) for part in parts)


def _empty_dict(*_factory: object) -> dict[Any, Any]:
    return {}


# The only callables that a pickle reaches beside torch's own list. Each is of this module or makes an empty container.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _NumpyDtype,
    "numpy.ndarray": _NumpyArray,
    "collections.defaultdict": _empty_dict,
    **{
        f"numpy.{core}.multiarray.{name}": make  # NumPy 1 wrote core, NumPy 2 writes _core
        for core in ("core", "_core")
        for name, make in (("scalar", _numpy_scalar), ("_reconstruct", _NumpyArray))
    },
    **{f"pathlib.{kind}Path": _path for kind in ("Posix", "Windows", "PurePosix", "PureWindows")},
    **{  # Lightning's settings: a dict that also has attributes
        f"{module}.AttributeDict": OrderedDict
        for module in (
            "lightning.fabric.utilities.data",
            "lightning_fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "pytorch_lightning.utilities.parsing",
        )
    },
    **{f"builtins.{name}": _inert(name) for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")},
}

# Not even as inert objects: no state dict has a reason to name them.
_NEVER_NAMED = (
    "builtins",
    "__builtin__",
    "importlib",
    "nt",
    "os",
    "posix",
    "runpy",
    "shutil",
    "socket",
    "subprocess",
    "sys",
)


def _without_stand_ins(value: Any) -> Any:
    """Replace array stand-ins by their arrays, in nested dictionaries."""
    if isinstance(value, _NumpyArray):
        return value.array
    if isinstance(value, dict):
        return {key: _without_stand_ins(item) for key, item in value.items()}
    return value
