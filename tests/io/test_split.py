"""The split file, which training and evaluation read alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.errors import InputError, UsageError
from medseg.io.split import read_part, read_split


def test_a_split_names_the_cases_of_each_part_with_or_without_their_suffix(tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text('{"train": ["a.v2", "b.nii.gz"], "val": ["c.MHA"], "test": []}')
    assert read_split(split) == {"train": ["a.v2", "b"], "val": ["c"], "test": []}
    assert read_part(split, "val") == ["c"]
    with pytest.raises(UsageError, match="no part 'fold_0'; it has train, val, test"):
        read_part(split, "fold_0")
    with pytest.raises(InputError, match="'test' names no case"):
        read_part(split, "test")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "not JSON"),
        ('["a"]', "object of parts"),
        ('{"train": "a"}', "'train' is not a list of case names"),
        ('{"train": ["a", 3]}', "'train' is not a list of case names"),
        ('{"train": [""]}', "'train' is not a list of case names"),
        ('{"train": ["a"], "val": ["a.nii.gz"]}', "case a stands in two parts, 'train' and 'val'"),
        ('{"train": ["a", "a"]}', "case a stands twice in part 'train'"),
    ],
)
def test_what_is_no_split_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    split = tmp_path / "split.json"
    split.write_text(text)
    with pytest.raises(InputError, match=problem):
        read_split(split)
    with pytest.raises(InputError, match="no such file"):
        read_split(tmp_path / "none.json")
