"""Files that Hugging Face tools keep beside ``tokenizer.json``.

They declare special tokens and hold chat templates and generation settings. They travel with a tokenizer into data
folders, checkpoints and exports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from model.errors import ConfigError
from model.regular_files import check_regular
from model.wording import json_type, quote_json

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
GENERATION_CONFIG, CONFIG = "generation_config.json", "config.json"
TEMPLATES, MORE_TEMPLATES = ("chat_template.jinja", "chat_template.json"), "additional_chat_templates/*.jinja"
Role = Literal["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
IdKey = Literal["bos_token_id", "eos_token_id", "pad_token_id"]
_TOKEN_KEYS: tuple[Role, ...] = get_args(Role)
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
ID_KEYS: tuple[IdKey, ...] = get_args(IdKey)


@dataclass(frozen=True)
class SideFiles:
    """Content of the files beside a ``tokenizer.json``. Absent files are empty."""

    folder: Path = Path()
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    special_tokens_map: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    """Content of ``generation_config.json``; token IDs that it lacks come from ``config.json``."""
    templates: dict[str, str] = field(default_factory=dict)
    """Chat templates by path within the folder."""

    @classmethod
    def read(cls, folder: Path) -> SideFiles:
        """Read the files of a folder. Raises ConfigError naming a file that is not readable."""
        generation, model = read_object(folder / GENERATION_CONFIG), read_object(folder / CONFIG)
        for key in ID_KEYS:
            if generation.get(key) is None and model.get(key) is not None:
                generation[key] = model[key]
        files = cls(
            folder=folder,
            tokenizer_config=read_object(folder / TOKENIZER_CONFIG),
            special_tokens_map=read_object(folder / SPECIAL_TOKENS_MAP),
            generation_config=generation,
            templates={
                path.relative_to(folder).as_posix(): _read_text(path)
                for path in (*map(folder.joinpath, TEMPLATES), *sorted(folder.glob(MORE_TEMPLATES)))
                if os.path.lexists(path)  # a link to nowhere is an error, not an absent template
            },
        )
        for key in ID_KEYS:
            files.ids(key)  # names a malformed value
        return files

    def names(self, role: Role) -> list[str]:
        """Return the declared tokens of a role, the most important one first."""
        for file, content in self._declarations():
            if content.get(role) is not None:
                return list(_token_names(file, role, content[role]))
        return []

    def ids(self, key: IdKey) -> list[int]:
        """Return the declared token IDs of a key, in order. Negative IDs stand for none."""
        value = self.generation_config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for item in values:
            if type(item) is not int:
                raise ConfigError(
                    f"{self.folder}: {key} of {GENERATION_CONFIG} or {CONFIG}: expected a token ID or a list of token "
                    f"IDs, found {quote_json(item)}"
                )
        return [item for item in values if item >= 0]

    def special_names(self) -> set[str]:
        """Return the spellings of all tokens that are declared to be special."""
        found: set[str] = set()
        for file, content in self._declarations():
            for key in (*_TOKEN_KEYS, *_TOKEN_LISTS):
                value = content.get(key)
                if key in _TOKEN_LISTS and isinstance(value, dict) and "content" not in value:
                    value = list(value.values())  # tokens by attribute name
                found.update(_token_names(file, key, value))
        return found | {token["content"] for token in self.added_tokens() if token.get("special")}

    def special_token_map(self) -> dict[str, str]:
        """Return the declared tokens by role."""
        return {role: names[0] for role in _TOKEN_KEYS if (names := self.names(role))}

    def chat_templates(self) -> dict[str, tuple[str, str]]:
        """Return the Jinja source of each named chat template and the file that holds it.

        ``chat_template.jinja`` and ``additional_chat_templates/`` come before ``chat_template.json``, and this before
        ``tokenizer_config.json``. A template without a name is called ``default``. Raises ConfigError for a malformed
        declaration.
        """
        found: dict[str, tuple[str, str]] = {}
        in_json = {file: text for file, text in self.templates.items() if file.endswith(".json")}
        declared = [(TOKENIZER_CONFIG, self.tokenizer_config.get("chat_template"))]
        declared += [
            (file, _parse_object(self.folder / file, text).get("chat_template")) for file, text in in_json.items()
        ]
        for file, value in declared:
            for item in value if isinstance(value, list) else [{"name": "default", "template": value or ""}]:
                named = isinstance(item, dict) and isinstance(item.get("name"), str)
                if not (named and isinstance(item.get("template"), str)):
                    raise ConfigError(f"{self.folder / file}: chat_template: expected a template or named templates")
                if item["template"]:
                    found[item["name"]] = (file, item["template"])
        for file, text in self.templates.items():
            if file not in in_json:
                found["default" if "/" not in file else Path(file).stem] = (file, text)
        return found

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return the entries of ``added_tokens_decoder`` in the form of ``tokenizer.json``."""
        decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
        tokens = []
        if not isinstance(decoder, dict):
            raise self._wrong_token("added_tokens_decoder", "an object of tokens by ID", decoder)
        for key, token in decoder.items():
            place = f"added_tokens_decoder[{quote_json(key)}]"
            if not (key.isdecimal() and len(key) < 20):
                raise self._wrong_token("added_tokens_decoder", "token IDs as keys", key)
            if not isinstance(token, dict):
                raise self._wrong_token(place, "an object", token)
            if not isinstance(token.get("content"), str):
                raise self._wrong_token(f"{place}.content", "a string", token.get("content"))
            flags = {name: token.get(name) is True for name in ("single_word", "lstrip", "rstrip", "special")}
            normalized = token.get("normalized", not flags["special"]) is True
            tokens.append({"id": int(key), "content": token["content"], **flags, "normalized": normalized})
        return tokens

    def _wrong_token(self, key: str, expected: str, found: Any) -> ConfigError:
        return ConfigError(f"{self.folder / TOKENIZER_CONFIG}: {key}: expected {expected}, found {quote_json(found)}")

    def with_tokens(self, bos_token: str, eos_token: str) -> SideFiles:
        """Return files that declare these tokens."""
        config = dict(self.tokenizer_config)
        for role, name in (("bos_token", bos_token), ("eos_token", eos_token)):
            value = config.get(role)
            if isinstance(value, list) or list(_token_names(self.folder / TOKENIZER_CONFIG, role, value)) != [name]:
                config[role] = name
        return replace(self, tokenizer_config=config)

    def with_stop_ids(self, ids: Iterable[int]) -> SideFiles:
        """Return files whose ``eos_token_id`` holds these IDs besides the declared ones."""
        declared = self.ids("eos_token_id")
        missing = [item for item in ids if item not in declared]
        return replace(self, generation_config={**self.generation_config, "eos_token_id": [*missing, *declared]})

    def write(self, folder: str | Path) -> None:
        """Write the files that are not empty into ``folder``."""
        folder = Path(folder)
        for file, content in (
            (TOKENIZER_CONFIG, self.tokenizer_config),
            (SPECIAL_TOKENS_MAP, self.special_tokens_map),
            (GENERATION_CONFIG, self.generation_config),
        ):
            if content:
                write_object(folder / file, content)
        for name, text in self.templates.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="")

    def _declarations(self) -> tuple[tuple[Path, dict[str, Any]], ...]:
        """Return the files that declare tokens, in order of precedence."""
        return (
            (self.folder / TOKENIZER_CONFIG, self.tokenizer_config),
            (self.folder / SPECIAL_TOKENS_MAP, self.special_tokens_map),
        )


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no such file. A byte order mark is skipped. Raises ConfigError."""
    return _parse_object(path, _read_text(path)) if os.path.lexists(path) else {}


def _parse_object(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {json_type(content)}")
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        check_regular(path)
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from error


def _token_names(file: Path, key: str, value: Any) -> Iterator[str]:
    """Yield the spellings in a declaration: a string, an AddedToken's fields, or a list of these."""
    if isinstance(value, dict):
        value = value.get("content", value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _token_names(file, key, item)
    elif value is not None:
        raise ConfigError(f"{file}: {key}: expected a token or a list of tokens, found {quote_json(value)}")
