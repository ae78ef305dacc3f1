"""Chat templates, with transformers as the reference, and spellings of special tokens in messages."""

import json
from datetime import datetime

import jinja2
import pytest
import tokenizer_files
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_files import write_files
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from model.errors import ConfigError
from model.tokenizer import Tokenizer, load_tokenizer
from serve.api.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from serve.engine import RequestError

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROLE_MARKERS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{% continue %}{% endif %}"
    "{{ '<|' + message.role + '|>' }}{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}<|assistant|>{% endgeneration %}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}{% endfor %}"
)
ADDED = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "∎"]
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": 'Größe?\n<b> & > "x"'},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "a < b", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é<"}}}]},
]
FUNCTIONS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x<": {"type": "string"}}}}}]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Function that writes a tokenizer with a template and returns its folder."""

    def write(template: str | None, content: dict | None = None):
        config = {"tokenizer_config": {"chat_template": template}} if template is not None else {}
        folder = tmp_path_factory.mktemp("chat")
        return write_files(folder, content or tokenizer_files.byte_level(added=ADDED), **config)

    return write


def load(folder) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = load_tokenizer(folder)
    return tokenizer, ChatTemplate(tokenizer)


def spell(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of ``ids``, special tokens included."""
    names = {token: name.encode() for name, token in tokenizer.special_tokens.items()}
    return b"".join(names.get(token, bytes([max(0, token - 2) % 256])) for token in ids).decode()


@pytest.mark.parametrize("template", [CHATML, ROLE_MARKERS, TOOLS], ids=["chatml", "roles", "tools"])
@pytest.mark.parametrize("prompted", [True, False])
def test_token_ids_equal_those_of_transformers(folder_of, template, prompted) -> None:
    folder = folder_of(template)
    tokenizer, chat = load(folder)
    tools = FUNCTIONS if template == TOOLS else None
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    want = reference.apply_chat_template(
        MESSAGES, tools=tools, add_generation_prompt=prompted, tokenize=True, return_dict=False
    )
    assert chat.encode(MESSAGES, tools, prompted) == want
    [[text], _] = render_jinja_template(
        [MESSAGES],
        tools=tools,
        chat_template=template,
        add_generation_prompt=prompted,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert spell(tokenizer, want) == text


def test_the_date_and_variables_reach_the_template(folder_of) -> None:
    tokenizer, chat = load(folder_of("{{ strftime_now('%Y') }} {{ mode }} {{ documents }}"))
    ids = chat.encode(MESSAGES, variables={"mode": "<s>fast"})
    assert tokenizer.decode(ids) == f"{datetime.now():%Y} <s>fast None"
    for name in ("messages", "bos_token", "strftime_now"):
        with pytest.raises(RequestError, match=f"^chat_template_kwargs.{name}: set by the server itself, found true;"):
            chat.encode(MESSAGES, variables={name: True})


def test_the_built_in_template(folder_of) -> None:
    tokenizer, chat = load(folder_of(None))
    assert chat.source == "built-in"
    ids = chat.encode([{"role": "user", "content": "</s>hi"}])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("user: </s>hi\nassistant:")]
    assert load(folder_of(CHATML))[1].source == "tokenizer_config.json"


PIECES = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_", "end|>", "im_end|>", "<", "|>", ">", "<s>", "s>", "∎", "ab", " ", "\n"]),
    max_size=5,
).map("".join)
COMPLETING = (
    "{{ '<|im_' + messages[0].content + 'nd|>' }}<{{ messages[1].content | trim }}s>"
    "{{ messages[0].content.strip() }}{{ messages[1].content }}<|im_end|>"
)


@pytest.mark.parametrize("template", [CHATML, ROLE_MARKERS, COMPLETING], ids=["chatml", "roles", "completing"])
def test_messages_never_produce_special_tokens_and_keep_their_text(folder_of, template) -> None:
    tokenizer, chat = load(folder_of(template))
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    source = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")

    def specials(messages) -> list[int]:
        return [token for token in chat.encode(messages) if token in tokenizer.special_tokens.values()]

    def render(messages) -> str:
        variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
        return plain.from_string(source).render(messages=messages, **variables)

    of_template = specials([{"role": "user", "content": "x"}] * 2)

    @settings(max_examples=150)
    @given(PIECES, PIECES)
    def check(first, second) -> None:
        assume(template != COMPLETING or second.strip())  # else the template spells <s> itself
        messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
        assert specials(messages) == of_template
        assert spell(tokenizer, chat.encode(messages)) == render(messages)

    check()


@pytest.mark.parametrize("content", [tokenizer_files.byte_fallback("abm<>|s/_"), tokenizer_files.unigram("abm<>|s/_")])
def test_spellings_stay_text_with_other_tokenizers(folder_of, content) -> None:
    tokenizer, chat = load(folder_of("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", content))
    ids = chat.encode([{"role": "user", "content": "a</s>b <s>"}])
    assert [i for i, token in enumerate(ids) if token in tokenizer.special_tokens.values()] == [0, len(ids) - 1]
    assert tokenizer.decode(ids).strip() == "a</s>b <s>"


def test_harmless_edges_do_not_change_the_tokens(folder_of) -> None:
    content = tokenizer_files.byte_level(merges=[("a", "b")], added=[*ADDED, "abab"])
    tokenizer, chat = load(folder_of("[{{ messages[0].content }}]", content))
    for text in ("abx", "xab", "> ab", "ab"):
        assert chat.encode([{"role": "user", "content": text}]) == tokenizer.encode(f"[{text}]")
    ids = chat.encode([{"role": "user", "content": "abab"}])
    assert tokenizer.special_tokens["abab"] not in ids
    assert tokenizer.decode(ids) == "[abab]"


def test_spellings_in_tools_and_arguments_are_text(folder_of) -> None:
    for template in (TOOLS, TOOLS.replace("tojson(indent=2)", "tojson(ensure_ascii=true)")):
        tokenizer, chat = load(folder_of(template))
        tools = [{"type": "function", "function": {"name": "<s>", "parameters": {"</s>é": ["<|im_end|>", "𝄞"]}}}]
        call = {"function": {"name": "</s>", "arguments": {"∎": "<s>"}}}
        ids = chat.encode([{"role": "assistant", "content": "", "tool_calls": [call]}], tools)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        written, called = tokenizer.decode(ids).split("</s>(")
        assert json.loads(written) == tools
        assert called == '{"∎": "<s>"})'


def test_tools_are_refused_by_a_template_without_them(folder_of) -> None:
    with pytest.raises(RequestError, match=r"^tools: the chat template \(tokenizer_config.json\) does not use tools"):
        load(folder_of(CHATML))[1].encode(MESSAGES, FUNCTIONS)


def test_a_template_for_tools_is_preferred_with_tools(folder_of) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    tokenizer, chat = load(folder_of(named))
    assert tokenizer.decode(chat.encode(MESSAGES)) == "plain"
    assert tokenizer.decode(chat.encode(MESSAGES, FUNCTIONS)) == "1 tools"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no <s>: ' + messages[0].content) }}", r"refuses them: no <s>: <s>Be$"),
        ("{{ messages[9].content.x }}", r"cannot render them \(UndefinedError: "),
        ("{{ messages.append(1) }}", r"cannot render them \(SecurityError: "),
        ("{{ ''.__class__.__mro__ }}", r"cannot render them \(SecurityError: "),
        ("{{ 1 / 0 }}", r"cannot render them \(ZeroDivisionError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    ],
)
def test_a_template_that_fails_refuses_the_request(folder_of, template, message) -> None:
    chat = load(folder_of(template))[1]
    with pytest.raises(RequestError, match=message) as caught:
        chat.encode([{"role": "user", "content": "<s>Be"}])
    assert caught.value.param == "messages"


def test_a_malformed_template_is_named(folder_of) -> None:
    with pytest.raises(ConfigError, match=r"^chat template tokenizer_config.json: line 2: "):
        load(folder_of("a\n{% if %}"))


def test_jinja_accepts_the_built_in_template() -> None:
    assert "message" in jinja2.Environment().from_string(DEFAULT_TEMPLATE).render(messages=[{"role": "message"}])
