"""Strict parsing of JSON request bodies, before FastAPI validates them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from model.wording import json_type
from serve.engine import RequestError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body, if it takes one, is parsed by :func:`parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def parse_and_handle(request: Request) -> Response:
            _check_content_type(request)
            # FastAPI reads these attributes, which starlette's Request uses as caches, through body() and json().
            request._json = parse_json(await request.body())
            return await handle(request)

        return parse_and_handle


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a UTF-8 body, with or without a byte order mark.

    Raises RequestError for anything else, for a repeated field and for an unpaired surrogate in a string. NaN and
    infinite numbers are left to the schemas, which name their fields.
    """
    if not body.strip():
        raise RequestError("the body is empty; send a JSON object")
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_object)
        if isinstance(value, dict) and _SURROGATE.search(body):
            _check_surrogates(value)
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        problem = error.msg.removesuffix(" at")
        raise RequestError(f"the body is not valid JSON: {problem} at character {error.pos}") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError:  # Python limits the digits of an integer
        raise RequestError("the body contains an integer with too many digits") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, found {json_type(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(repeated, times)] = Counter(name for name, _ in pairs).most_common(1)
        raise RequestError(f"{repeated}: the field must occur once, found {times} times", repeated)
    return value


def _check_surrogates(fields: dict[str, Any]) -> None:
    """Raise RequestError if a string anywhere in ``fields`` cannot be encoded as UTF-8."""
    for name, value in fields.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError(f"{name}: contains an unpaired surrogate, which UTF-8 cannot encode", name) from None


def _check_content_type(request: Request) -> None:
    """Raise HTTPException unless the body is declared as JSON.

    A missing header is accepted unless the request comes from a web page: browsers send such bodies to any server
    without asking it first.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not declared and "origin" not in request.headers:
        return
    if not re.fullmatch(r"application/(json|[^\s/]+\+json)", declared):
        found = f"'{declared}'" if declared else "none"
        raise HTTPException(
            415, f"the body must be a JSON object, sent with Content-Type: application/json; found {found}"
        )
