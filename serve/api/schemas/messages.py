"""Parsing of chat messages and tools into the values that a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve.api.schemas.validation import field_error, missing, quote_value, unknown_field, wrong, wrong_item

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 10_000
MAX_TOOLS = 128
EXPECTED_MESSAGES = "a list of at least one message"
_EXPECTED_ROLE = f"one of {', '.join(ROLES)}"
_EXPECTED_CONTENT = "a string or a list of text parts"
_EXPECTED_ARGUMENTS = "a JSON object in a string"
_STRINGS = ("name", "tool_call_id", "reasoning_content")
"""Fields of a message that are passed to the template if they are strings."""
_FIELDS = ("role", "content", "tool_calls", *_STRINGS)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """Return messages whose content is one string each. Text parts are joined by newlines.

    Raises an error that names the first invalid field.
    """
    if not isinstance(value, list) or not value:
        raise wrong(EXPECTED_MESSAGES, value)
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"expected at most {MAX_MESSAGES} messages, found {len(value)}")
    return [_parse_message(str(i), message) for i, message in enumerate(value)]


def _parse_message(path: str, value: Any) -> dict[str, Any]:
    fields = _object(path, value)
    role = fields.pop("role", None)
    if role is None:
        raise missing(f"{path}.role", _EXPECTED_ROLE)
    if role not in ROLES:
        raise wrong_item(f"{path}.role", _EXPECTED_ROLE, role)
    message: dict[str, Any] = {"role": role}
    content, calls = fields.pop("content", None), fields.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise field_error(
                f"{path}.tool_calls", f"allowed in messages of the assistant only, found role {quote_value(role)}"
            )
        message["tool_calls"] = _parse_calls(f"{path}.tool_calls", calls)
    if content is None and not calls:
        raise missing(f"{path}.content", _EXPECTED_CONTENT)
    message["content"] = "" if content is None else _parse_content(f"{path}.content", content)
    for name, item in fields.items():
        if name not in _STRINGS:
            raise unknown_field(f"{path}.{name}", name, _FIELDS)
        message[name] = _string(f"{path}.{name}", item)
    return message


def _parse_content(path: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_item(path, _EXPECTED_CONTENT, content)
    return "\n".join(_parse_part(f"{path}.{i}", part) for i, part in enumerate(content))


def _parse_part(path: str, value: Any) -> str:
    part = _object(path, value)
    kind = part.pop("type", None)
    if kind != "text":
        raise missing(f"{path}.type", '"text"') if kind is None else wrong_item(f"{path}.type", '"text"', kind)
    text = _string(f"{path}.text", part.pop("text", None))
    for name in part:
        raise unknown_field(f"{path}.{name}", name, ("type", "text"))
    return text


def _parse_calls(path: str, value: Any) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, as templates expect them."""
    if not isinstance(value, list):
        raise wrong_item(path, "a list of tool calls", value)
    calls = []
    for i, item in enumerate(value):
        call = _object(f"{path}.{i}", item)
        function = _function(f"{path}.{i}", call)
        arguments = function.get("arguments")
        if arguments is None:
            raise missing(f"{path}.{i}.function.arguments", _EXPECTED_ARGUMENTS)
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else None
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise wrong_item(f"{path}.{i}.function.arguments", _EXPECTED_ARGUMENTS, arguments)
        calls.append({**call, "function": {**function, "arguments": parsed}})
    return calls


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Return descriptions of functions, as they are passed to the template."""
    if not isinstance(value, list):
        raise wrong("a list of tools", value)
    if len(value) > MAX_TOOLS:
        raise ValueError(f"expected at most {MAX_TOOLS} tools, found {len(value)}")
    for i, tool in enumerate(value):
        _function(str(i), _object(str(i), tool))
    return value


def _function(path: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the function of a tool or a tool call."""
    if item.get("type", "function") != "function":
        raise wrong_item(f"{path}.type", '"function"', item["type"])
    if item.get("function") is None:
        raise missing(f"{path}.function", "an object")
    function = _object(f"{path}.function", item["function"])
    _string(f"{path}.function.name", function.get("name"))
    return function


def _object(path: str, value: Any) -> dict[str, Any]:
    """Return the fields that are not null."""
    if not isinstance(value, dict):
        raise wrong_item(path, "an object", value)
    return {name: item for name, item in value.items() if item is not None}


def _string(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise missing(path, "a string") if value is None else wrong_item(path, "a string", value)
    return value
