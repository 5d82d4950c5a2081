"""`medseg data prepare`: miniature archives in the layouts of the sites, whole and damaged."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.datasets import registry
from medseg.datasets.check import check_dataset
from medseg.datasets.prepare import Prepared, prepare
from medseg.errors import InputError, OutputError, PartialError, UsageError
from medseg.io.read import read_labels, read_volume
from medseg.io.split import read_split
from medseg.training.dataset import read_dataset

Files = Mapping[str, bytes]
SHAPE = (8, 9, 6)
AFFINE = np.array([[-0.8, 0, 0, 30], [0, 0.8, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]], dtype=float)


def nifti(data: np.ndarray, affine: np.ndarray = AFFINE) -> bytes:
    return gzip.compress(nib.Nifti1Image(data, affine).to_bytes(), mtime=0)


def scan(seed: int = 0, channels: int = 1) -> bytes:
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    return nifti(np.random.default_rng(seed).normal(50, 20, shape).astype(np.float32))


def labels(*values: int) -> bytes:
    """A label map with one voxel of each value."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    array.reshape(-1)[: len(values)] = values
    return nifti(array)


def decathlon(cases: int = 3, channels: int = 2) -> Files:
    names = [f"prostate_{number:02d}" for number in range(cases)]
    described = {
        "name": "PROSTATE",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "numTraining": cases,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/prostate_90.nii.gz"],
    }
    root = "Task05_Prostate"
    files = {f"{root}/dataset.json": json.dumps(described).encode(), f"{root}/imagesTs/prostate_90.nii.gz": b"x"}
    for number, name in enumerate(names):
        files[f"{root}/imagesTr/{name}.nii.gz"] = scan(number, channels)
        files[f"{root}/imagesTr/._{name}.nii.gz"] = b"macOS"
        files[f"{root}/labelsTr/{name}.nii.gz"] = labels(1, 2, 2)
    return files


def beyond_the_vault(cases: tuple[int, ...] = (1, 5, 36)) -> Files:
    files = {"RawData/Testing/img/img0061.nii.gz": scan()}
    for number in cases:
        files[f"RawData/Training/img/img{number:04d}.nii.gz"] = scan(number)
        files[f"RawData/Training/label/label{number:04d}.nii.gz"] = labels(*range(14))
    return files


def hearts() -> Files:
    files: dict[str, bytes] = {"ACDC/database/MANDATORY_CITATION.md": b"cite"}
    for patient, part in (("001", "training"), ("101", "testing")):
        for frame in ("01", "12"):
            stem = f"ACDC/database/{part}/patient{patient}/patient{patient}_frame{frame}"
            files |= {f"{stem}.nii.gz": scan(), f"{stem}_gt.nii.gz": labels(1, 2, 3)}
        files[f"ACDC/database/{part}/patient{patient}/patient{patient}_4d.nii.gz"] = scan(channels=3)
        files[f"ACDC/database/{part}/patient{patient}/Info.cfg"] = b"ED: 1"
    return files


def gliomas() -> Files:
    files: dict[str, bytes] = {}
    for number in (0, 2):
        stem = f"./BraTS2021_{number:05d}/BraTS2021_{number:05d}"
        for channel, sequence in enumerate(("flair", "t1ce", "t1", "t2")):
            files[f"{stem}_{sequence}.nii.gz"] = scan(10 * number + channel)
        files[f"{stem}_seg.nii.gz"] = labels(1, 2, 4, 4)
    return files


def abdomens() -> Files:
    files = {"amos22/dataset.json": b"{}", "amos22/imagesTs/amos_0550.nii.gz": scan()}
    for number, part in ((1, "Tr"), (507, "Tr"), (583, "Va")):
        files[f"amos22/images{part}/amos_{number:04d}.nii.gz"] = scan(number)
        files[f"amos22/labels{part}/amos_{number:04d}.nii.gz"] = labels(*range(16))
    return files


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def values_of(path: Path, count: int) -> list[int]:
    """The first values of a label map."""
    found: list[int] = read_labels(path)[0].reshape(-1)[:count].tolist()
    return found


@pytest.mark.parametrize(
    ("name", "files", "write", "cases", "channels", "parts"),
    [
        ("msd", decathlon, (write_tar, "Task05_Prostate.tar"), "prostate_00 prostate_01 prostate_02", 2, None),
        ("btcv", beyond_the_vault, (write_zip, "RawData.zip"), "case0001 case0005 case0036", 1, {"train": 2, "val": 1}),
        ("synapse", beyond_the_vault, (write_folder, "raw"), "case0001 case0005 case0036", 1, {"train": 1, "test": 2}),
        (
            "acdc",
            hearts,
            (write_zip, "ACDC.zip"),
            "patient001_frame01 patient001_frame12 patient101_frame01 patient101_frame12",
            1,
            {"train": 2, "test": 2},
        ),
        ("brats21", gliomas, (write_tar, "BraTS2021.tar"), "BraTS2021_00000 BraTS2021_00002", 4, None),
        ("abdomenmri", abdomens, (write_tar, "amos22.tar.gz"), "amos_0507 amos_0583", 1, {"train": 2}),
    ],
)
def test_what_a_site_hands_out_becomes_a_folder_to_train_on(
    name: str,
    files: Callable[[], Files],
    write: tuple[Callable[[Path, Files], Path], str],
    cases: str,
    channels: int,
    parts: dict[str, int] | None,
    tmp_path: Path,
) -> None:
    source = write[0](tmp_path / write[1], files())
    done = prepare(name, source, tmp_path / "data")
    dataset = read_dataset(tmp_path / "data")
    assert [case.name for case in dataset.cases] == cases.split()
    assert (done.made, done.kept, len(dataset.channels)) == (len(dataset.cases), 0, channels)
    found = check_dataset(tmp_path / "data", split=tmp_path / "data" / "split.json" if parts else None)
    assert found.problems == []
    assert set(found.cases_with.values()) == {len(dataset.cases)}
    assert (tmp_path / "data" / "split.json").exists() == (parts is not None)
    assert done.parts == (parts or {})
    # Complete, and nothing besides: no leftovers of the work, no lock.
    assert {path.name for path in (tmp_path / "data").iterdir()} <= {
        *("dataset.json", "split.json", "imagesTr", "labelsTr", "prepare.json")
    }
    image = read_volume(dataset.cases[0].images if channels == 4 else dataset.cases[0].images[0])
    np.testing.assert_allclose(image.affine, AFFINE)


def test_every_data_set_of_the_list_is_tried_and_says_what_it_is() -> None:
    assert registry.names() == ["abdomenmri", "acdc", "brats21", "btcv", "msd", "msd_pancreas", "synapse"]
    for name in registry.names():
        about = registry.about(name)
        assert about.name == name
        assert all((about.cases, about.site, about.licence, about.size, about.split))
        assert (Path(__file__).parents[2] / "data" / name / "README.md").is_file()
    with pytest.raises(UsageError, match="known: abdomenmri, acdc"):
        registry.planner("imagenet")


def test_organs_get_the_numbers_of_the_paper(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "raw", beyond_the_vault((1, 5)))
    prepare("synapse", source, tmp_path / "synapse")
    # BTCV: spleen, kidneys, gallbladder, (esophagus), liver, stomach, aorta, (veins), pancreas, (adrenal glands)
    wanted = [0, 7, 4, 3, 2, 0, 5, 8, 1, 0, 0, 6, 0, 0]
    assert values_of(tmp_path / "synapse" / "labelsTr" / "case0001.nii.gz", 14) == wanted
    prepare("abdomenmri", write_folder(tmp_path / "amos", abdomens()), tmp_path / "mr")
    wanted = [0, 3, 2, 13, 9, 10, 1, 11, 5, 6, 4, 7, 8, 12, 0, 0]
    assert values_of(tmp_path / "mr" / "labelsTr" / "amos_0507.nii.gz", 16) == wanted
    prepare("brats21", write_folder(tmp_path / "brats", gliomas()), tmp_path / "gliomas")
    assert values_of(tmp_path / "gliomas" / "labelsTr" / "BraTS2021_00000.nii.gz", 4) == [1, 2, 4, 4]


def test_the_published_splits_are_complete(tmp_path: Path) -> None:
    from medseg.datasets import btcv

    files = beyond_the_vault(btcv.NUMBERS)
    for name, sizes in (("synapse", {"train": 18, "test": 12}), ("btcv", {"train": 24, "val": 6})):
        done = prepare(name, write_folder(tmp_path / "raw", files), tmp_path / name)
        assert done.parts == sizes
        assert done.warnings == []
        split = read_split(tmp_path / name / "split.json")
        assert len({case for names in split.values() for case in names}) == 30
    # TransUNet's lists in its repository: lists_Synapse/test_vol.txt
    assert split["val"] == [f"case{number:04d}" for number in range(35, 41)]
    assert read_split(tmp_path / "synapse" / "split.json")["test"] == [
        f"case{number:04d}" for number in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
    ]


def test_a_run_killed_at_any_case_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "RawData.zip", beyond_the_vault((1, 5, 9, 36)))
    prepare("synapse", source, tmp_path / "whole")
    program = """
import os, signal, sys
from pathlib import Path
from medseg.datasets import prepare
real, left = prepare._label_map, int(sys.argv[3])
def stop(*arguments):
    global left
    left -= 1
    made = real(*arguments)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return made
prepare._label_map = stop
prepare.prepare("synapse", Path(sys.argv[1]), Path(sys.argv[2]))
"""
    root = tmp_path / "killed"
    for made in (0, 2):
        command = [sys.executable, "-c", program, str(source), str(root), "0" if not made else "2"]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(list((root / "labelsTr").iterdir())) == made
        assert not (root / "dataset.json").exists()
    done = prepare("synapse", source, root)
    assert (done.made, done.kept) == (2, 2)
    assert _contents(root) == _contents(tmp_path / "whole")
    again = prepare("synapse", source, root)
    assert (again.made, again.kept) == (0, 4)


def _contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _tar_with(path: Path, member: tarfile.TarInfo) -> Path:
    files = decathlon()
    with tarfile.open(write_tar(path, files), "a") as archive:
        archive.addfile(member)
    return path


def _link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def _without(files: Files, part: str) -> Files:
    return {name: content for name, content in files.items() if part not in name}


def _bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("RawData/Training/img/img0001.nii.gz", bytes(80 << 20))
    return path


BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "not there": ("msd", lambda p: p / "none.tar", "no such file"),
    "empty": ("msd", lambda p: write_folder(p / "raw", {"a.txt": b""}), "no dataset.json in it"),
    "text": ("msd", lambda p: write_folder(p, {"a.tar": b"hello"}) / "a.tar", "a text file, no archive"),
    "climbs out": ("msd", lambda p: write_tar(p / "a.tar", {"../../evil": b"x"}), "leads out of"),
    "absolute": ("synapse", lambda p: write_zip(p / "a.zip", {"/etc/evil": b"x"}), "leads out of"),
    "backslashes": ("synapse", lambda p: write_zip(p / "a.zip", {"..\\evil": b"x"}), "leads out of"),
    "link": ("msd", lambda p: _tar_with(p / "a.tar", _link("Task05_Prostate/x", "/etc/passwd")), "is a link"),
    "bomb": ("synapse", lambda p: _bomb(p / "a.zip"), "times its size"),
    "truncated": ("msd", lambda p: _cut(write_tar(p / "a.tar.gz", decathlon())), "damaged"),
    "label missing": (
        "btcv",
        lambda p: write_zip(p / "a.zip", _without(beyond_the_vault(), "label0005")),
        r"case0005 lacks label0005.nii.gz; complete",
    ),
    "sequence missing": (
        "brats21",
        lambda p: write_folder(p / "raw", _without(gliomas(), "00002_t1ce")),
        r"BraTS2021_00002 lacks BraTS2021_00002_t1ce",
    ),
    "listed and missing": (
        "msd",
        lambda p: write_tar(p / "a.tar", _without(decathlon(), "labelsTr/prostate_01")),
        "prostate_01 lacks Task05_Prostate/labelsTr/prostate_01",
    ),
    "another data set": ("acdc", lambda p: write_zip(p / "a.zip", beyond_the_vault()), "holds no labelled case"),
    "another task": ("msd_pancreas", lambda p: write_tar(p / "a.tar", decathlon()), "not Task07_Pancreas"),
    "twice": (
        "btcv",
        lambda p: write_zip(p / "a.zip", {**beyond_the_vault(), "copy/img/img0001.nii.gz": scan()}),
        "are the same case",
    ),
}


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_used_is_refused_in_one_line_and_nothing_is_written_elsewhere(what: str, tmp_path: Path) -> None:
    name, build, problem = BAD[what]
    inside = tmp_path / "deep" / "down"
    inside.mkdir(parents=True)
    source = build(inside)
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=problem) as caught:
        prepare(name, source, inside / "data")
    assert "\n" not in str(caught.value)
    extra = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.is_relative_to(inside / "data") for path in extra)
    assert not (inside / "data" / "dataset.json").exists()
    assert not list((inside / "data").glob(".*"))


def test_cases_that_cannot_be_used_are_named_and_alone_tried_again(tmp_path: Path) -> None:
    files = dict(beyond_the_vault((1, 5, 9, 36)))
    good = dict(files)
    files["RawData/Training/label/label0005.nii.gz"] = nifti(np.zeros((3, 3, 3), dtype=np.uint8))
    files["RawData/Training/label/label0009.nii.gz"] = labels(14)
    files["RawData/Training/img/img0036.nii.gz"] = files["RawData/Training/img/img0036.nii.gz"][:-9]
    with pytest.raises(PartialError, match=r"3 of 4 cases cannot be used: case case0005: grid \(3, 3, 3\)") as caught:
        prepare("btcv", write_zip(tmp_path / "bad.zip", files), tmp_path / "data")
    assert "case case0009: label values [14] mean nothing" in str(caught.value)
    assert [path.name for path in (tmp_path / "data" / "labelsTr").iterdir()] == ["case0001.nii.gz"]
    done = prepare("btcv", write_zip(tmp_path / "good.zip", good), tmp_path / "data")
    assert (done.made, done.kept) == (3, 1)


def test_a_label_map_a_little_off_its_image_gets_the_image_s_header(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[0, 3] += 0.12
    files = dict(hearts())
    name = "ACDC/database/training/patient001/patient001_frame01_gt.nii.gz"
    files[name] = nifti(np.ones(SHAPE, dtype=np.uint8), shifted)
    done = prepare("acdc", write_zip(tmp_path / "a.zip", files), tmp_path / "data")
    assert any("patient001_frame01: its label map lay 0.15 voxels off" in line for line in done.warnings)
    np.testing.assert_allclose(read_labels(tmp_path / "data" / "labelsTr" / "patient001_frame01.nii.gz")[1], AFFINE)
    shifted[0, 3] += 2
    files[name] = nifti(np.ones(SHAPE, dtype=np.uint8), shifted)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(PartialError, match=r"lies 2\.65 voxels off its image"):
        prepare("acdc", write_zip(tmp_path / "b.zip", files), tmp_path / "data")


def test_a_folder_holds_one_data_set_and_no_other_files_are_touched(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "a.zip", beyond_the_vault())
    prepare("btcv", source, tmp_path / "data")
    with pytest.raises(OutputError, match="holds the data set btcv"):
        prepare("synapse", source, tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(OutputError, match="is not empty"):
        prepare("btcv", source, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]  # noqa: PTH208


def test_a_disk_that_is_too_small_is_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 100})())
    source = write_folder(tmp_path / "raw", beyond_the_vault())
    with pytest.raises(OutputError, match="GB needed"):
        _ = prepare("btcv", source, tmp_path / "data")
    assert isinstance(Prepared(tmp_path, "x").parts, dict)
