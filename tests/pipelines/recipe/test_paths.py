"""Paths in recipes and options: home folders, file URIs, and no other scheme."""

import itertools
import os
from pathlib import Path

import pytest

from model.errors import ConfigError
from pipelines import __main__ as cli
from pipelines.recipe.loading import load_recipe, recipe_from_dict
from pipelines.recipe.paths import check_creatable, parse_path, path_option, without_password


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    return tmp_path / "my home"


def test_home_folders_and_file_uris_are_resolved(home):
    root = Path.home()
    assert parse_path("~") == root
    assert parse_path("~/runs") == root / "runs"
    assert parse_path(Path("~/runs")) == root / "runs"
    assert parse_path("~root/x") == Path("/root/x")
    for uri in ("file:///tmp/a%20b%23c", "file:/tmp/a%20b%23c", "FILE://localhost/tmp/a%20b%23c"):
        assert parse_path(uri) == Path("/tmp/a b#c")
    for literal in ("a/~/b", "./~", "x:y", "./s3:/x", "$HOME/x", "${HOME}", " a ", "100%25", "a\nb"):
        assert str(parse_path(literal)) == str(Path(literal))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://bucket/runs", "only local paths are supported, not s3:"),
        (Path("s3://bucket/runs"), "not s3:"),
        ("GS://bucket", "not GS:"),
        ("hf+x://a/b", "not hf"),
        ("models:/fiftyfold@champion", "not models:"),
        ("file://host/x", "names the host 'host'"),
        ("file://~/x", "names the host '~'"),
        ("file:x", "needs an absolute path"),
        ("file://localhost", "needs an absolute path"),
        ("file:///a?b", "as %3F"),
        ("file:///a%2", "as %25"),
        ("file:///a%ff", "not valid UTF-8"),
        ("file:///a%00", "NUL"),
        ("~nobody-of-that-name/x", r"expected a user of this machine after '~' .*is \./~nobody-of-that-name.$"),
        ("", "expected a path"),
        ("a\0b", "NUL"),
        ("a\udcff", "not valid UTF-8"),
        ("a" * 256, "too long"),
        ("a/" * 5000, "too long"),
        (7, "put it in quotes"),
        (None, "expected a path"),
        (["a"], "expected a path"),
    ],
)
def test_text_that_names_no_local_path_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_path(text)


def test_an_existing_file_with_a_tilde_is_not_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~notes.txt").touch()
    assert parse_path("~notes.txt") == Path("~notes.txt")


PATH_KEYS = (
    "run.folder",
    "data.tokenizer",
    "data.sources",
    "train.init_from",
    "evaluate.checkpoint",
    "demo.baseline",
    "serve.model_uri",
    "serve.api_key_file",
)


def at(recipe, key: str) -> str:
    section, name = key.split(".")
    found = getattr(getattr(recipe, section), name)
    return str(found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("key", PATH_KEYS)
def test_every_path_setting_is_resolved_and_refuses_other_schemes(key, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert at(load_recipe([], [f"{key}=~/x"]), key) == str(home / "x")
    assert at(load_recipe([], [f"{key}=file://{tmp_path}/a%20b"]), key) == f"{tmp_path}/a b"
    with pytest.raises(ConfigError, match=rf"^{key}(\.0)?: only local paths are supported, not s3:"):
        load_recipe([], [f"{key}=s3://bucket/x"])
    with pytest.raises(ConfigError, match=rf"^{key}(\.0)?: expected a path"):
        load_recipe([], [f"{key}="])
    assert os.listdir(tmp_path) == []


def test_every_path_setting_of_the_schema_is_tested():
    """A new path setting must use a type of pipelines.recipe.paths, or it would take s3:// for a folder."""
    from pipelines.recipe.key_types import fields_of, is_path

    def paths(section, prefix):
        for name, annotation in fields_of(section).items():
            if fields_of(annotation):
                yield from paths(annotation, f"{prefix}{name}.")
            elif is_path(annotation) or "pathlib" in str(annotation) or name.endswith(("_file", "_folder", "_path")):
                yield prefix + name

    from pipelines.recipe.schema import Recipe

    assert set(paths(Recipe, "")) <= set(PATH_KEYS)


def test_relative_paths_become_absolute_also_in_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = {"overrides": {"train.init_from": "runs/a/final"}, "space": {"train.init_from": ["x", "~/y"]}}
    recipe = recipe_from_dict({"sweep": sweep, "train": {"init_from": "b"}})
    assert recipe.train.init_from == tmp_path / "b"
    assert recipe.sweep.overrides == {"train.init_from": str(tmp_path / "runs/a/final")}
    assert recipe.sweep.space == {"train.init_from": [str(tmp_path / "x"), str(Path.home() / "y")]}
    with pytest.raises(ConfigError, match=r"sweep\.overrides\.train\.init_from: only local paths"):
        recipe_from_dict({"sweep": {"overrides": {"train.init_from": "s3://b"}}})


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "s3://bucket/x.yaml"],
        ["export", "--from", "s3://bucket/x", "--to", "y"],
        ["export", "--to", "gs://bucket/x"],
        ["export", "--to", "y", "--tokenizer", "hf://x"],
        ["budget", "--model", "s3://bucket/x"],
        ["budget", "--figure", "s3://bucket/x.png"],
    ],
)
def test_options_refuse_other_schemes(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == cli.USER_ERROR
    option = next(name for name, value in itertools.pairwise(arguments) if "://" in value)
    assert capsys.readouterr().err.startswith(f"error: {option}: only local paths are supported, not ")
    assert os.listdir(tmp_path) == []


def test_options_expand_the_home_folder(home, capsys):
    home.mkdir()
    (home / "r.yaml").write_text("run: {name: mine}\n")
    assert cli.main(["train", "--config", "~/r.yaml", "--print-config"]) == 0
    assert "name: mine" in capsys.readouterr().out
    assert path_option("--to")("~/x") == home / "x"


def test_tracking_uris_are_checked_when_the_recipe_is_read(home):
    assert load_recipe([], ["tracking.uri=sqlite:///~/m.db"]).tracking.uri == f"sqlite:///{home}/m.db"
    assert load_recipe([], ["tracking.uri=null"]).tracking.uri is None
    for uri in ("http://host:99999", "http://[::1", "http://", "https:///x", "http://a b", "http://a\nb"):
        with pytest.raises(ConfigError, match=r"^tracking\.uri: "):
            load_recipe([], [f"tracking.uri={uri}"])


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("ftp://user:secret@x", "begins with one of http://, .*, mssql://, found 'ftp://x'"),
        ("/some/folder", "begins with one of .*, found '/some/folder'"),
        ("sqlite://", "names a file, such as sqlite:///path/of/mlflow.db, found 'sqlite://'"),
        ("sqlite:///:memory:", "names a file, .*, found 'sqlite:///:memory:'"),
        ("http://", "names a host, found 'http://'"),
    ],
)
def test_a_tracking_uri_of_no_store_is_refused_when_the_recipe_is_read(uri, expected):
    with pytest.raises(ConfigError, match=rf"^tracking\.uri: expected a URI that {expected}$"):
        load_recipe([], [f"tracking.uri={uri}"])


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://u:secret@h:5000/x", "http://h:5000/x"),
        ("http://:secret@[::1]:5000", "http://[::1]:5000"),
        ("http://u@h", "http://h"),
        ("postgresql://u:secret/secret@h/db", "postgresql://h/db"),
        ("postgresql://u:12/secret@h/db", "postgresql://h/db"),
        ("postgresql://u:secret@secret@h/db", "postgresql://h/db"),
        ("postgresql://u:secret@secret/secret@h/db", "postgresql://h/db"),
        ("mysql+pymysql://u:secret?secret#secret@h/db", "mysql+pymysql://h/db"),
        ("http:///u:secret@h", "http:///h"),
        ("u:secret/secret@h/db", "h/db"),
        ("postgresql:u:secret@h", "h"),
        ("postgresql:///db?user=u&password=secret@x/y&a=b", "postgresql:///db?user=u&password=***&a=b"),
        ("mysql://h/db?api_key=secret&client_secret=secret&a=b", "mysql://h/db?api_key=***&client_secret=***&a=b"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Du%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        ("sqlite:////a:b/c@d/mlflow.db", "sqlite:////a:b/c@d/mlflow.db"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("http://h/team@x", "http://h/team@x"),
        ("http://h:5000", "http://h:5000"),
        ("", ""),
    ],
)
def test_messages_show_a_uri_without_its_password(uri, shown):
    assert without_password(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://u:sec/ret@h/db",
        "mysql://u:sec@ret@h/db",
        "http://u:sec?ret@h",
        "http://u:sec#ret@h",
        "http://u:@ret@h",
    ],
)
def test_a_password_with_unescaped_characters_is_refused_and_not_shown(uri):
    message = r"^tracking\.uri: expected a URI with / \? # @ escaped as %2F .*, found '\w+://h(/db)?'$"
    with pytest.raises(ConfigError, match=message):
        load_recipe([], [f"tracking.uri={uri}"])
    with pytest.raises(ConfigError, match="valid host and port, found 'http://h:x'"):
        load_recipe([], ["tracking.uri=http://u:secret@h:x"])


@pytest.mark.parametrize("uri", ["models:/", "models:/x", "models:/x@", "models:/x/y", "models:x@y", "models:/x@y/z"])
def test_a_malformed_model_uri_is_refused_when_the_recipe_is_read(uri):
    with pytest.raises(ConfigError, match=r"serve\.model_uri: expected models:/<name>@<alias>"):
        load_recipe([], [f"serve.model_uri={uri}"])


def test_check_creatable_names_the_obstacle(tmp_path):
    (tmp_path / "file").touch()
    check_creatable(tmp_path / "a/b/c", "--to")
    with pytest.raises(ConfigError, match=r"--to: .*file/x/y cannot be created, because .*file is not a folder"):
        check_creatable(tmp_path / "file/x/y", "--to")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="has no /proc")
def test_check_creatable_tries_instead_of_asking_for_permissions():
    with pytest.raises(ConfigError, match=r"--to: /proc/a/b cannot be created, because /proc cannot be written to \("):
        check_creatable(Path("/proc/a/b"), "--to")
