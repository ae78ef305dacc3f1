"""The token without which a local Ray cluster refuses calls."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from model.errors import ConfigError
from model.regular_files import check_regular

VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
_TOKEN = re.compile(r"[\x21-\x7e]{8,512}")
"""Tokens that fit a header of HTTP and gRPC."""


def ensure_token() -> None:
    """Set a random token in the environment, which the processes of a cluster inherit, unless there is one.

    The token is in no file, log or command line. One that the environment already holds is kept: in RAY_AUTH_TOKEN, or
    in the file RAY_AUTH_TOKEN_PATH. Ray's commands need it in other shells. Ray demands tokens from a cluster that
    ``ray.init`` starts, unless RAY_AUTH_MODE is ``disabled``.

    Raises ConfigError for a token that is malformed or cannot be read; Ray would write one to the user's home.
    """
    if (token := os.environ.get(VARIABLE, "").strip()) or not os.environ.get(PATH_VARIABLE):
        source = VARIABLE
        os.environ[VARIABLE] = token = token or secrets.token_hex(32)
    else:
        source = f"{PATH_VARIABLE}: {os.environ[PATH_VARIABLE]}"
        try:
            check_regular(Path(os.environ[PATH_VARIABLE]))
            token = Path(os.environ[PATH_VARIABLE]).read_text(encoding="ascii").strip()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            token = ""
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"{source}: the token must be 8 to 512 printable ASCII characters without spaces")
