"""Folders that replace their target at once."""

import pytest

from model.atomic_files import atomic_folder


def test_a_folder_that_fails_leaves_no_parents_behind(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a" / "b" / "c") as scratch:
        (scratch / "file").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_parents_that_were_there_or_hold_other_files_stay(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "b" / "other").touch()
        raise KeyError
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["other"]
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a" / "d"):
        raise KeyError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_written_folder_stays_with_its_parents(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as scratch:
        (scratch / "file").write_text("new")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
