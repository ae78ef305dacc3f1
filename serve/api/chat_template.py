"""Chat templates: from messages to the token IDs of a prompt.

Templates are Jinja sources beside the tokenizer, rendered as transformers' ``apply_chat_template`` does, in a sandbox.
In the rendered text, spellings of special tokens are read as these tokens, because templates write their markers that
way. Spellings in the messages must stay text. Three steps keep them apart:

1. Before rendering, the first character of every spelling in the request's strings is replaced by a *stand-in*, and so
   are edges of strings that a template's text could complete to a spelling. Stand-ins are unpaired surrogates, which
   neither a request nor a template can hold. A string keeps its length, and templates can strip and split it.
2. After rendering, stand-ins that no spelling covers are restored. Without any left, the text is encoded as a whole.
3. The other stand-ins are encoded as the text of their characters, apart from their neighbors.

Roles are from a fixed list and are not protected: some templates build markers from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import ConfigError
from model.tokenizer import Tokenizer
from model.wording import count
from serve.api.schemas.validation import quote_value
from serve.engine import RequestError

BUILT_IN = "built-in"
DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Template of a checkpoint that has none: one line per message, as ``role: content``."""
_FIRST_STAND_IN, _MAX_STAND_INS = 0xD800, 0x800
_STAND_INS = re.compile("([\ud800-\udfff])")
_OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class ChatTemplate:
    """The chat template of ``tokenizer``, compiled. Raises ConfigError naming a template that is not valid Jinja."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        sources = tokenizer.side_files.chat_templates()
        self.source, default = sources.get("default", (BUILT_IN, DEFAULT_TEMPLATE))
        """File of the template, or ``built-in``."""
        environment = _environment()
        self._default = _compile(environment, self.source, default)
        self._with_tools, tools_source = self._default, default
        if "tool_use" in sources:
            file, tools_source = sources["tool_use"]
            self._with_tools = _compile(environment, file, tools_source)
        self.reads_tools = "tools" in meta.find_undeclared_variables(environment.parse(tools_source))
        self._special_variables = tokenizer.side_files.special_token_map() | {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
        }
        self._stand_ins = _StandIns(tokenizer.special_tokens)

    def encode(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the token IDs of a conversation. No BOS is put in front of what the template writes.

        ``variables`` are further variables of the template. Raises RequestError for values that the template or the
        tokenizer refuses.
        """
        text = self._render(messages, tools or None, add_generation_prompt, variables or {})
        try:
            return self._encode(self._stand_ins.restore_harmless(text))
        except ConfigError as error:
            raise RequestError.about("messages", str(error)) from error

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        if tools and not self.reads_tools:
            found = count(len(tools), "tool")
            problem = f"the chat template ({self.source}) does not use tools, found {found}; omit the field"
            raise RequestError.about("tools", problem)
        for name, value in variables.items():
            if name in self._special_variables or name in _OWN_VARIABLES:
                problem = f"set by the server itself, found {quote_value(value)}; omit it"
                raise RequestError.about(f"chat_template_kwargs.{name}", problem)
        template = self._with_tools if tools else self._default
        protect = self._stand_ins.protect
        try:
            # Roles are from a fixed list, and templates build markers from them.
            protected = [{**protect(message), "role": message["role"]} for message in messages]
            return template.render(
                {
                    **protect(variables),
                    **self._special_variables,
                    "messages": protected,
                    "tools": protect(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except RecursionError:
            raise RequestError.about("messages", "nested too deeply") from None
        except _Refusal as error:
            reason = self._stand_ins.restore(str(error))
            raise RequestError.about("messages", f"the chat template refuses them: {reason}") from None
        except Exception as error:  # whatever the template's expressions raise
            reason = f"{type(error).__name__}: {self._stand_ins.restore(str(error))}"
            raise RequestError.about("messages", f"the chat template cannot render them ({reason})") from None

    def _encode(self, text: str) -> list[int]:
        """Return the token IDs of rendered text with stand-ins."""
        first, *pieces = _STAND_INS.split(text)
        ids = self._tokenizer.encode(first, parse_special=True)
        encoded: dict[str, list[int]] = {"": []}  # a message may repeat a spelling very often
        for piece in pieces:
            if piece not in encoded:
                restored = self._stand_ins.restore(piece)
                encoded[piece] = self._tokenizer.encode_inside(restored, parse_special=restored == piece)
            ids += encoded[piece]
        return ids


class _StandIns:
    """Stand-ins for the characters of ``spellings`` of special tokens, at least one."""

    def __init__(self, spellings: Iterable[str]):
        names = self._names = frozenset(spellings)
        self._lengths = sorted({len(name) for name in names}, reverse=True)
        self._first = re.compile("[" + re.escape("".join({name[0] for name in names})) + "]")
        characters = sorted(set("".join(names)))
        if len(characters) > _MAX_STAND_INS:
            raise ConfigError(f"the spellings of special tokens hold more than {_MAX_STAND_INS} different characters")
        self._stand_in = {c: chr(_FIRST_STAND_IN + i) for i, c in enumerate(characters)}
        self._restore = {ord(stand_in): c for c, stand_in in self._stand_in.items()}
        self._suffixes = tuple({name[i:] for name in names for i in range(1, len(name))})
        self._prefixes = tuple({name[:i] for name in names for i in range(1, len(name))})

    def protect(self, value: Any) -> Any:
        """Return ``value`` with stand-ins in all of its strings."""
        if isinstance(value, str):
            return self._replace(value, self._spellings(value).keys() | self._edges(value))
        if isinstance(value, list):
            return [self.protect(item) for item in value]
        if isinstance(value, dict):
            return {self._replace(key, self._spellings(key)): self.protect(item) for key, item in value.items()}
        return value

    def _spellings(self, text: str) -> dict[int, int]:
        """Return where spellings begin and where the longest one ends. They may overlap."""
        found = {}
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths:
                if text[start : start + length] in self._names:
                    found[start] = start + length
                    break
        return found

    def _edges(self, text: str) -> set[int]:
        """Return the edges that could be part of a spelling together with other text. A template may strip spaces."""
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        edges = {start} if text.startswith(self._suffixes, start) else set()
        return edges | ({end - 1} if text[:end].endswith(self._prefixes) else set())

    def _replace(self, text: str, offsets: Collection[int]) -> str:
        if not offsets:
            return text
        characters = list(text)
        for offset in offsets:
            characters[offset] = self._stand_in[characters[offset]]
        return "".join(characters)

    def restore(self, text: str) -> str:
        """Return ``text`` with the characters that stand-ins replace."""
        return text.translate(self._restore)

    def restore_harmless(self, text: str) -> str:
        """Return ``text`` with stand-ins only where a spelling would otherwise be read."""
        if not _STAND_INS.search(text):
            return text
        restored = self.restore(text)
        ends = self._spellings(restored)
        characters: list[str] = []
        end = 0  # end of the spellings begun so far
        for offset, character in enumerate(text):
            end = max(end, ends.get(offset, 0))
            characters.append(character if offset < end else restored[offset])
        return "".join(characters)


class _Refusal(jinja2.TemplateError):
    """A template called ``raise_exception``."""


class _Generation(Extension):
    """The ``generation`` block, which marks an assistant's text for training. Its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares an instance variable)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, file: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template {file}: line {error.lineno}: {error.message}") from None
    except (RecursionError, SyntaxError, MemoryError, ValueError) as error:  # Python cannot compile Jinja's translation
        raise ConfigError(f"chat template {file}: cannot be compiled ({type(error).__name__})") from None


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON in which HTML characters are not escaped, unlike that of Jinja's own filter."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    return "".join(c if c.isascii() or _STAND_INS.fullmatch(c) else json.dumps(c)[1:-1] for c in text)
