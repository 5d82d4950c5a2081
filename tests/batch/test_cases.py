"""What is a case: folders, patterns, files, manifests, links, names that collide."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.batch.cases import find_cases, label_map_of
from medseg.errors import InputError, MedsegError, UsageError


def _files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def _names(*inputs: str | Path, **options: object) -> list[str]:
    return [case.name for case in find_cases(inputs, **options).cases]  # type: ignore[arg-type]


def test_a_folder_gives_its_scans_and_neither_results_nor_hidden_files_nor_subfolders(tmp_path: Path) -> None:
    _files(tmp_path, "b.nii.gz", "a.NII", "c.mha", "d.hdr", "d.img", "note.txt", ".hidden.nii.gz", "sub/e.nii.gz")
    _files(tmp_path, "a_seg.nii.gz", "a_seg_probabilities.nii.gz", "a_seg.json", "a_seg.png")
    found = find_cases([tmp_path])
    assert [case.name for case in found.cases] == ["a", "b", "c", "d"]
    assert found.notes == ("2 files named *_seg or *_label left out: results, not scans",)
    assert _names(tmp_path, recursive=True) == ["a", "b", "c", "d", "sub/e"]


def test_a_recursive_search_leaves_out_the_output_folder_and_ends_in_link_loops(tmp_path: Path) -> None:
    _files(tmp_path, "s1/ct.nii.gz", "s2/ct.nii.gz", "out/ct.nii.gz", ".cache/ct.nii.gz")
    (tmp_path / "s2" / "up").symlink_to(tmp_path)
    assert _names(tmp_path, recursive=True, output=tmp_path / "out") == ["s1/ct", "s2/ct"]


def test_a_pattern_keeps_the_folders_that_tell_its_matches_apart(tmp_path: Path) -> None:
    _files(tmp_path, "s1/ct.nii.gz", "s2/ct.nii.gz", "s2/mask.nii.gz", "s2/ct_seg.nii.gz")
    assert _names(f"{tmp_path}/*/ct*.nii.gz") == ["s1/ct", "s2/ct"]
    assert _names(tmp_path / "s[12]" / "m*") == ["s2/mask"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    assert _names(_files(tmp_path, "scan [1].nii.gz") / "scan [1].nii.gz") == ["scan [1]"]


def test_of_files_that_a_shell_expanded_a_result_is_left_out_when_its_scan_is_there(tmp_path: Path) -> None:
    _files(tmp_path, "a.nii.gz", "a_seg.nii.gz", "b_seg.nii.gz")
    assert _names(tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", tmp_path / "b_seg.nii.gz") == ["a", "b_seg"]


def test_a_label_map_beside_its_scan_is_no_case_and_is_found_for_it(tmp_path: Path) -> None:
    _files(tmp_path, "a.nii.gz", "a_label.nii.gz", "a_seg_evidence.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    _files(tmp_path, "b_label.nii", "c.nrrd", "c_label.nrrd", "own_label.nii.gz", "warning_label.nii.gz")
    assert _names(tmp_path) == ["a", "b_0000", "b_0001", "c", "own_label", "warning_label"]
    assert _names(tmp_path, channels=2) == ["a", "b", "c", "own_label", "warning_label"]
    assert _names(f"{tmp_path}/*_label.nii.gz") == ["a_label", "own_label", "warning_label"]
    found = {case.name: label_map_of(case.scans[0]) for case in find_cases([tmp_path], channels=2).cases}
    assert {name: path and path.name for name, path in found.items()} == {
        "a": "a_label.nii.gz",
        "b": "b_label.nii",
        "c": "c_label.nrrd",
        "own_label": None,
        "warning_label": None,
    }


def test_one_scan_by_many_names_is_one_case_named_after_the_file_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _files(tmp_path, "scan.nii.gz")
    (tmp_path / "alias.nii.gz").symlink_to("scan.nii.gz")
    (tmp_path / "hard.nii.gz").hardlink_to(tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    found = find_cases(["alias.nii.gz", "./scan.nii.gz", "../" + tmp_path.name + "/scan.nii.gz", "hard.nii.gz", "."])
    assert [case.name for case in found.cases] == ["scan"]
    assert "alias is the same scan as scan; computed once" in found.notes


def test_two_scans_with_one_name_are_refused_with_both_paths(tmp_path: Path) -> None:
    _files(tmp_path, "s1/ct.nii.gz", "s2/ct.nii.gz")
    with pytest.raises(UsageError, match=r"ct_seg.nii.gz: would be made of .*s1/ct.nii.gz and of .*s2/ct.nii.gz"):
        find_cases([tmp_path / "s1", tmp_path / "s2"])
    _files(tmp_path, "both/x.nii.gz", "both/x.mha")
    with pytest.raises(UsageError, match=r"x_seg\.nii\.gz"):
        find_cases([tmp_path / "both"])


def test_numbered_files_are_the_channels_of_one_case_for_a_bundle_of_several(tmp_path: Path) -> None:
    _files(tmp_path, "p_1_0000.nii.gz", "p_1_0001.nii.gz", "p_2_0001.nii.gz", "four_d.nii.gz")
    _files(tmp_path, "p_3_0000.nii.gz", "p_3_0001.nii.gz", "p_3_0002.nii.gz")
    cases = {case.name: case for case in find_cases([tmp_path], channels=2).cases}
    assert [path.name for path in cases["p_1"].scans] == ["p_1_0000.nii.gz", "p_1_0001.nii.gz"]
    assert {name: case.problem for name, case in cases.items()} == {
        "p_1": "",
        "p_2": "channel _0000 is missing",
        "p_3": "3 files; the bundle takes 2",
        "four_d": "",
    }
    assert "p_1_0000" in _names(tmp_path, channels=1)


def test_a_manifest_names_cases_and_takes_paths_from_its_own_folder(tmp_path: Path) -> None:
    _files(tmp_path, "x/a.nii.gz", "x/b.nii.gz", "y/a.nii.gz")
    table = tmp_path / "cases.csv"
    table.write_text(f"\ufeffCase,age,image\nfirst,61,x/a.nii.gz\n\nsecond,70,{tmp_path}/y/a.nii.gz\nthird,5,no.nii\n")
    cases = find_cases([table]).cases
    assert [(case.name, case.scans) for case in cases] == [
        ("first", (tmp_path / "x/a.nii.gz",)),
        ("second", (tmp_path / "y/a.nii.gz",)),
        ("third", (tmp_path / "no.nii",)),
    ]
    table.write_text("image_1,case,image_0\nx/b.nii.gz,p,x/a.nii.gz\n")
    (pair,) = find_cases([table], channels=2).cases
    assert [path.name for path in pair.scans] == ["a.nii.gz", "b.nii.gz"]
    assert find_cases([table], channels=3).cases[0].problem == "2 files; the bundle takes 3"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "header"),
        ("case;image\na;b.nii\n", "semicolons"),
        ("case,scan\na,b.nii\n", "columns are case, image"),
        ("case,image\n", "no case"),
        ("case,image\na\n", "line 2: 1 cells"),
        ("case,image\na,\n", "image is missing"),
        ("case,image\n../a,b.nii\n", "cannot be a file's name"),
        ("case,image\n,b.nii\n", "cannot be a file's name"),
    ],
)
def test_a_table_that_is_no_manifest_is_refused_with_its_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(UsageError, match=word):
        find_cases([tmp_path / "cases.csv"])


def test_nothing_to_do_is_an_input_error(tmp_path: Path) -> None:
    for given, word in ((tmp_path / "no.nii.gz", "no such file"), (tmp_path, "no scan"), ("*.nii", "no scan")):
        with pytest.raises(InputError, match=word):
            find_cases([given])
    _files(tmp_path, "a_seg.nii.gz")
    with pytest.raises(MedsegError, match="results, not scans"):
        find_cases([tmp_path])
