"""Local paths in a recipe or on the command line.

``~`` is the home folder, ``file://`` URIs are understood, and other schemes are refused: a path with ``s3://`` would
otherwise become a folder named ``s3:`` in the working directory.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator

from model.errors import ConfigError
from model.tokenizer import BYTE
from model.wording import quote

MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+))")
SQLITE = "sqlite:///"
SERVER_SCHEMES = ("http", "https", "databricks")
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
"""Schemes of tracking URIs."""
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 2048, 255
_START = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")
_SECRET = re.compile(r"([?&](?:[^=&]*(?:password|passwd|pwd|token|secret|api_?key)|odbc_connect)=)[^&]*", re.IGNORECASE)
"""A parameter of a database's driver that holds a password or key."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")


def parse_path(value: Any) -> Path:
    """Return the local path that ``value``, a path or text, names. Raises ValueError with the reason alone."""
    return Path(_resolve(value))


def path_option(name: str) -> Callable[[str], Path]:
    """Return a parser of the command-line option ``name``, a local path. It raises ConfigError."""

    def parse(text: str) -> Path:
        try:
            return parse_path(text)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}, found {quote(text)}") from None

    return parse


def sqlite_uri(path: str | Path) -> str:
    """Return the tracking URI of an SQLite database.

    MLflow creates the parent folder of the path as it is written in the URI. From the first part with a character that
    needs an escape on, slashes are escaped too, so that this parent exists and no folder such as ``a%23b`` appears.
    """
    text = str(path)
    special = re.search("[%?#]", text)
    start = len(text) if special is None else text.rfind("/", 0, special.start()) + 1
    rest = text[start:]
    for character in "%?#/":
        rest = rest.replace(character, f"%{ord(character):02X}")
    return f"{SQLITE}{text[:start]}{rest}"


def sqlite_path(uri: str) -> Path:
    """Return the path of the database of an SQLite URI."""
    return Path(unquote(re.split("[?#]", uri.removeprefix(SQLITE), maxsplit=1)[0]))


def check_creatable(path: Path, key: str) -> None:
    """Raise ConfigError, naming ``key``, unless ``path`` can be created: in a writable folder, or in new ones there."""
    for folder in path.absolute().parents:
        if os.path.lexists(folder):
            if not folder.is_dir():
                raise ConfigError(f"{key}: {path} cannot be created, because {folder} is not a folder")
            try:  # permissions alone do not tell: /proc and full disks have them
                tempfile.TemporaryDirectory(dir=folder).cleanup()
            except OSError as error:
                reason = f"{folder} cannot be written to ({error.strerror})"
                raise ConfigError(f"{key}: {path} cannot be created, because {reason}") from None
            return


def _parse_source(value: Any) -> str:
    try:
        return _resolve(value)
    except ValueError as error:
        hint = "; a glob can name it, with ? for each byte that is not" if "not valid UTF-8" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None


def _parse_tokenizer(value: Any) -> str:
    return BYTE if value == BYTE else str(parse_path(value).absolute())


def _parse_model_uri(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith("models:"):
        return str(parse_path(value).absolute())
    if not MODEL_URI.fullmatch(value):
        raise ValueError("expected models:/<name>@<alias>, models:/<name>/<version> or a checkpoint folder")
    return value


def _parse_tracking_uri(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a URI")
    if not value.isprintable() or " " in value:
        raise ValueError(f"expected a URI without spaces, found {quote(without_password(value))}")
    check_tracking_uri(value)
    home = re.fullmatch(r"sqlite:///(~[^/]*)(/.*)", value)
    if home:
        return sqlite_uri(_resolve(home[1]) + unquote(home[2]))
    return value


def check_tracking_uri(uri: str) -> None:
    """Raise ValueError for a URI that cannot be one of an MLflow store. The message quotes it without a password."""
    problem = _tracking_problem(uri)
    if problem is not None:
        raise ValueError(f"{problem}, found {quote(without_password(uri))}")


def _tracking_problem(uri: str) -> str | None:
    """Return what is expected of a tracking URI, or None if ``uri`` is one."""
    if re.search("[/?#@]", _split_user(uri)[1]):
        return "expected a URI with / ? # @ escaped as %2F %3F %23 %40 in the user name and password, and no other @"
    try:
        parts = urlsplit(uri)
        _ = parts.port  # raises ValueError for an invalid port
    except ValueError:  # its message may quote the password
        return "expected a URI with a valid host and port"
    scheme = parts.scheme.partition("+")[0]  # postgresql+psycopg names a driver
    if scheme not in SERVER_SCHEMES + DATABASE_SCHEMES:
        known = ", ".join(f"{name}://" for name in SERVER_SCHEMES + DATABASE_SCHEMES)
        return f"expected a URI that begins with one of {known}"
    if scheme in ("http", "https") and not parts.hostname:
        return "expected a URI that names a host"
    if scheme == "sqlite" and (not uri.startswith(SQLITE) or sqlite_path(uri).name in ("", ":memory:")):
        return f"expected a URI that names a file, such as {SQLITE}path/of/mlflow.db"
    return None


def without_password(uri: str) -> str:
    """Return a URI without user name and password, for messages. If the end of the password is ambiguous, as with an
    unescaped /, removes everything up to the last @."""
    start, _, rest = _split_user(uri)
    return start + _SECRET.sub(r"\1***", rest)


def _split_user(uri: str) -> tuple[str, str, str]:
    """Return the start of a URI with its slashes, the user name and password, if any, and what follows them."""
    found = _START.match(uri)
    start = "" if found is None else found[0]
    names_file = ":///" in start and not start.startswith("http")
    user, _, rest = uri[len(start) :].rpartition("@")
    authority = re.split("[/?#]", user, maxsplit=1)[0]
    if names_file or (":" not in authority and authority != user):
        return start, "", uri[len(start) :]
    return start, user, rest


def _resolve(value: Any) -> str:
    """Return the text of a local path. Raises ValueError with the reason alone."""
    if not isinstance(value, str | Path):
        raise ValueError(
            "expected a path; put it in quotes" if isinstance(value, bool | int | float) else "expected a path"
        )
    text = str(value)
    if not text or "\0" in text:
        raise ValueError("expected a path" if not text else "a path cannot hold a NUL character")
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise ValueError("the path is not valid UTF-8") from None
    if len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > _MAX_NAME_BYTES:
        raise ValueError("the path is too long")
    if text[:5].lower() == "file:":
        return _from_file_uri(text)
    scheme = _SCHEME.match(text)
    if scheme:
        raise ValueError(
            f"only local paths are supported, not {scheme[1]}:// (a folder of that name is ./{scheme[1]}:)"
        )
    return _expand_home(text)


def _expand_home(text: str) -> str:
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(text):
        user = text.partition("/")[0]
        raise ValueError(f"expected a user of this machine after '~' (a file or folder of that name is ./{user})")
    return expanded


def _from_file_uri(text: str) -> str:
    """Return the path of a ``file:`` URI (RFC 8089)."""
    path = text[5:]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ValueError(f"the URI names the host '{host}', but only files of this machine are supported")
        path = slash + rest
    if not path.startswith("/"):
        raise ValueError("a file: URI needs an absolute path, as in file:///data")
    if "?" in path or "#" in path:
        raise ValueError("write ? and # in a file: URI as %3F and %23")
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise ValueError("write % in a file: URI as %25")
    try:
        decoded = unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("the path is not valid UTF-8") from None
    if "\0" in decoded:
        raise ValueError("a path cannot hold a NUL character")
    return "/" + decoded.lstrip("/")


LocalPath = Annotated[Path, BeforeValidator(parse_path)]
SourcePattern = Annotated[str, BeforeValidator(_parse_source)]
"""A path, or a glob of paths."""
TokenizerSource = Annotated[str, BeforeValidator(_parse_tokenizer)]
"""``byte``, or an absolute path."""
PathText = Annotated[str, BeforeValidator(lambda value: str(parse_path(value)))]
"""A local path as text, for settings of packages that know nothing of recipes."""
ModelUri = Annotated[str, BeforeValidator(_parse_model_uri)]
"""A model in the registry, or the absolute path of a checkpoint folder."""
TrackingUri = Annotated[str, BeforeValidator(_parse_tracking_uri)]
