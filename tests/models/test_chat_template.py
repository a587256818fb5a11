"""Chat templates: what transformers makes of them, and nothing that a template should not be able to do."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerFast

from models.chat_template import ChatMessage, ChatTemplate
from models.errors import CheckpointError, ModelError
from tests.helpers.tiny_models import tokenizer_json

NOW = datetime(2026, 2, 3, 4, 5)
CHAT = [
    ChatMessage("system", 'Be <short> & "kind".'),
    ChatMessage("user", "  Hello, 世界 "),
    ChatMessage("assistant", "<think>\nhm\n</think>\n\nHi.\n"),
    ChatMessage("user", "More {{ 1 + 1 }} <|im_end|>"),
]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "names": "{{ bos_token }}"
    "{% for m in messages %}[{{ m.role | upper }}]{{ m.content | trim }}{% endfor %}{{ eos_token }}",
    "namespace": """{%- set ns = namespace(last=-1, count=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.last %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
{{- ns.count }}""",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "training marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "what is not there": "{% if tools %}T{% endif %}{% if documents is not none %}D{% endif %}{{ x is defined }}",
    "slices": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns') }}{% endif %}{{ '[INST] ' ~ m['content'].strip() ~ ' [/INST]' }}{% endfor %}",
    "dict": "{% set d = dict(a=1, b='x') %}{{ d.a }}{{ d['b'] }}{{ d | tojson(sort_keys=true) }}",
}


def folder_with(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", **config}))
    return tmp_path


def opened(folder: Path) -> ChatTemplate:
    return ChatTemplate.open(folder, NOW)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_the_one_that_transformers_makes(name: str, tmp_path: Path) -> None:
    source = TEMPLATES[name]
    library = PreTrainedTokenizerFast(
        tokenizer_object=Inner.from_str(tokenizer_json()), bos_token="<s>", eos_token="</s>", chat_template=source
    )
    messages = [{"role": message.role, "content": message.content} for message in CHAT]
    expected = library.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = opened(folder_with(tmp_path, chat_template=source))
    assert template.own
    assert template.stops == ()
    assert template.render(CHAT) == expected


def test_where_templates_stand(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "several"}]
    assert opened(folder_with(tmp_path, chat_template=several)).render(CHAT) == "several"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert opened(tmp_path).render(CHAT) == "file"


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, bos_token={"content": "<B>", "lstrip": False}, chat_template="{{ bos_token }}")
    assert opened(folder).render(CHAT) == "<B>"


def test_a_base_model_continues_a_transcript(tmp_path: Path) -> None:
    template = opened(tmp_path)
    assert not template.own
    said = [ChatMessage("system", "Be kind."), ChatMessage("user", "Hi"), ChatMessage("assistant", " Hello\n")]
    assert template.render([*said, ChatMessage("user", "So")]) == (
        "Be kind.\n\nUser: Hi\nAssistant: Hello\n\nUser: So\nAssistant:"
    )
    assert template.stops == ("\nUser:",)


def test_a_chat_keeps_its_date(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, chat_template="{{ strftime_now('%d %b %Y') }}")
    assert opened(folder).render(CHAT) == "03 Feb 2026"


ESCAPES = (
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.func.__globals__ }}",
    "{{ ''.format.__self__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ dict.__base__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('true') }}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_of_ours(source: str, tmp_path: Path) -> None:
    template = opened(folder_with(tmp_path, chat_template=source))
    try:
        text = template.render(CHAT)
    except ModelError:
        return
    assert text == "", "jinja gives nothing for what a template may not see"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[99].content.x }}", "undefined|no element"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ range(999999999) | list }}", "OverflowError|Range"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].content * 1000000000000000 }}", "MemoryError"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "do not trust it"),
    ],
)
def test_what_a_template_objects_to_is_said(source: str, says: str, tmp_path: Path) -> None:
    template = opened(folder_with(tmp_path, chat_template=source))
    with pytest.raises(ModelError, match=says):
        template.render(CHAT)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{" + "(" * 150 + "1" + ")" * 150 + "}}", "RecursionError"),
        ("{% for x in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError: too many statically nested blocks"),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "IndentationError: too many levels"),
        ("{{ " + "9" * 5000 + " }}", "ValueError"),
        ("{% break %}", "SyntaxError"),
    ],
    ids=["parentheses", "loops", "conditions", "number", "break"],
)
def test_what_python_cannot_compile_is_no_valid_template(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"its chat template is not valid \({says}"):
        opened(folder_with(tmp_path, chat_template=source))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not valid"):
        opened(folder_with(tmp_path, chat_template="{% if %}"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        opened(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        opened(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        opened(tmp_path)
