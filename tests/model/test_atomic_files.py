"""Folders that replace their target at once."""

import errno

import pytest

from model.atomic_files import atomic_folder, made_parents


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


@pytest.mark.parametrize("name", ["x" * 300, "y" * 300 + "/b"])
def test_names_that_are_too_long_leave_no_parents_behind(tmp_path, name):
    target = tmp_path / "a" / "b" / name
    with pytest.raises(OSError) as caught, atomic_folder(target):
        pass
    assert caught.value.errno == errno.ENAMETOOLONG
    assert list(tmp_path.iterdir()) == []


def test_parents_that_cannot_all_be_made_are_removed(tmp_path, monkeypatch):
    target, mkdir = tmp_path / "a" / "b" / "c", type(tmp_path).mkdir

    def fail_at_the_last(path, *arguments, **options):
        if path == target.parent and path.parent.exists():
            raise PermissionError
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(type(tmp_path), "mkdir", fail_at_the_last)
    (tmp_path / "kept").touch()
    with pytest.raises(PermissionError), made_parents(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
