"""Source files: names and kinds of files that a folder may hold."""

import os
import socket
from pathlib import Path

import pytest

from model.errors import ConfigError, DataError
from pipelines.data.source_files import find_files
from pipelines.recipe.loading import recipe_from_dict


def names(*patterns: object) -> list[str]:
    return sorted(file.name for file in find_files(tuple(map(str, patterns)), 0))


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", ".hidden/e.txt", "sub/.f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_patterns_match_files_at_any_depth_except_hidden_ones(folder, monkeypatch):
    def relative(*patterns: str) -> list[str]:
        return [str(Path(name).relative_to(folder)) for name in names(*(folder / pattern for pattern in patterns))]

    assert relative("*.txt") == ["a.txt"]
    assert relative("**/*.txt") == ["a.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert relative("s*/**/*.txt") == ["sub/c.txt", "sub/deep/d.txt"]
    assert relative("**/deep/*.txt", "**/**/d.txt") == ["sub/deep/d.txt"]
    assert relative("sub/**") == ["sub/c.txt", "sub/deep/d.txt"]
    assert relative(".hidden/**/*.txt", "sub/.f.txt") == [".hidden/e.txt", "sub/.f.txt"]
    monkeypatch.chdir(folder)
    assert names("**/*.txt") == ["a.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert names("a.txt", "./a.txt", folder / "a.txt", "*.txt") == ["a.txt"]


def test_an_existing_name_with_brackets_is_literal(tmp_path):
    (tmp_path / "in [v2]").mkdir()
    for name in ("notes[v2].txt", "notesv.txt", "in [v2]/x.txt"):
        (tmp_path / name).touch()
    assert names(tmp_path / "notes[v2].txt") == [f"{tmp_path}/notes[v2].txt"]
    assert names(tmp_path / "notes[vw].txt") == [f"{tmp_path}/notesv.txt"]
    assert names(tmp_path / "in [v2]/*.txt") == names(tmp_path / "in [v2]/**/*.txt") == [f"{tmp_path}/in [v2]/x.txt"]
    (tmp_path / "*.txt").touch()
    assert len(names(tmp_path / "*.txt")) == 3
    with pytest.raises(DataError, match=r"for the files of a folder write .*in \[v2\]/\*\*/\*\.txt"):
        names(tmp_path / "in [v2]")


def test_a_file_with_several_names_is_read_once(folder, monkeypatch):
    (folder / "link.txt").symlink_to("a.txt")
    (folder / "linked").symlink_to("sub")
    spellings = ["a.txt", "sub/../a.txt", "sub/deep/../../a.txt", "link.txt", "linked/../a.txt", "./a.txt"]
    for first in spellings:
        others = [spelling for spelling in spellings if spelling != first]
        assert names(*(f"{folder}/{spelling}" for spelling in [first, *others])) == [str(Path(f"{folder}/{first}"))]
    assert len(names(folder / "sub/c.txt", folder / "linked/c.txt", folder / "linked/*.txt")) == 1


@pytest.mark.timeout(20)
def test_link_cycles_yield_each_file_once(folder):
    (folder / "sub/up").symlink_to(folder)
    (folder / "sub/deep/self").symlink_to(folder / "sub/deep")
    (folder / "again").symlink_to(folder / "sub")
    found = names(folder / "**/*.txt")
    assert sorted(Path(name).name for name in found) == ["a.txt", "c.txt", "d.txt"]
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "linked").symlink_to(folder / "sub/deep")
    assert names(elsewhere / "**/*.txt") == [f"{elsewhere}/linked/d.txt"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xe9.txt", r"caf\xe9.txt"), (b"a\nb.txt", "a\nb.txt"), (b"~x.txt", "~x.txt"), ("ü.txt".encode(), "ü.txt")],
)
def test_file_names_are_found_and_stored_as_utf_8(tmp_path, name, shown):
    path = os.path.join(os.fsencode(tmp_path), name)
    Path(os.fsdecode(path)).write_text("x")
    (file,) = find_files((f"{tmp_path}/*",), 0)
    assert file.name == f"{tmp_path}/{shown}" and file.path.read_text() == "x"
    file.name.encode()


def test_a_name_that_is_not_utf_8_is_found_by_a_glob_with_a_question_mark_per_byte(tmp_path):
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9\xff.txt"))).write_text("x")
    pattern = recipe_from_dict({"data": {"sources": [f"{tmp_path}/caf??.txt"]}}).data.sources
    (file,) = find_files(pattern, 0)
    assert file.name == f"{tmp_path}/caf\\xe9\\xff.txt"
    with pytest.raises(
        ConfigError, match=r"data\.sources\.0: the path is not valid UTF-8; a glob can name it, with \?"
    ):
        recipe_from_dict({"data": {"sources": [f"{tmp_path}/caf\udce9\udcff.txt"]}})


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_pipe, "x.txt: is not a regular file"),
        (_socket, "x.txt: is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "x.txt: is not a regular file"),
        (lambda path: path.symlink_to(path), "x.txt: cannot be read .*symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "x.txt: cannot be read .No such file"),
        (Path.mkdir, "matches no file; for the files of a folder write"),
    ],
)
@pytest.mark.timeout(20)
def test_anything_but_a_regular_file_is_named(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(Path("x.txt"))
    for pattern in ("x.txt", "*.txt", "**/x.*"):
        with pytest.raises(DataError, match=message):
            find_files((pattern,), 0)


def test_files_and_folders_without_permission_are_named(folder, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # permissions do not bind root
        patch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\)"):
            names(folder / "a.txt")
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path).endswith("deep") else scandir(path))
    with pytest.raises(DataError, match=r"deep: cannot be read \(Permission denied\)"):
        names(folder / "**/*.txt")
