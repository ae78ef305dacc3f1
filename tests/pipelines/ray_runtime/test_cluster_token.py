"""The token of a local cluster: random, or of the user's environment."""

import os

import pytest

from model.errors import ConfigError
from pipelines.ray_runtime.cluster_token import PATH_VARIABLE, VARIABLE, ensure_token


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (VARIABLE, PATH_VARIABLE):
        monkeypatch.setenv(name, "")  # restored at the end, whatever the test sets


def test_a_missing_or_blank_token_is_replaced_by_a_random_one(monkeypatch):
    ensure_token()
    first = os.environ[VARIABLE]
    assert len(first) == 64
    ensure_token()
    assert os.environ[VARIABLE] == first
    monkeypatch.setenv(VARIABLE, " \n")
    ensure_token()
    assert len(os.environ[VARIABLE]) == 64 and os.environ[VARIABLE] != first


def test_a_token_of_the_user_is_kept(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("from-the-file\n")
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "token"))
    ensure_token()
    assert os.environ[VARIABLE] == ""
    monkeypatch.setenv(VARIABLE, "from-the-variable")
    ensure_token()
    assert os.environ[VARIABLE] == "from-the-variable"


@pytest.mark.parametrize("token", ["short", "two words", "a" * 8 + "\n" + "b" * 8, "schlüssel", "x" * 513])
def test_a_malformed_token_is_named(monkeypatch, tmp_path, token):
    path = tmp_path / "token"
    path.write_text(token)
    for name, value, source in ((PATH_VARIABLE, str(path), rf"{PATH_VARIABLE}: {path}"), (VARIABLE, token, VARIABLE)):
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=rf"^{source}: the token must be 8 to 512 printable"):
            ensure_token()


def test_a_token_file_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=rf"^{PATH_VARIABLE}: {tmp_path / 'none'}: No such file or directory$"):
        ensure_token()
    (tmp_path / "none").touch()
    with pytest.raises(ConfigError, match=r"the token must be"):
        ensure_token()
    (tmp_path / "none").unlink()
    os.mkfifo(tmp_path / "none")
    with pytest.raises(ConfigError, match=rf"^{PATH_VARIABLE}: {tmp_path / 'none'}: is not a regular file$"):
        ensure_token()
