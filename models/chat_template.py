"""Chats as prompts: the checkpoint's own template, rendered as transformers renders it.

A template is a Jinja program that came with the weights, from whoever made them. It runs in Jinja's immutable sandbox,
sees plain data only (messages, special tokens, a date), and gives text: it reaches no file, no object of ours and no
network. It can waste time and memory, as the weights can. A checkpoint without a template, such as a base model, gets
TRANSCRIPT. No tokens here; models/tokenizer.py makes them of the text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from models.errors import CheckpointError, ModelError

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
FILE_BYTES_MAX = 8 << 20  # some tokenizer_config.json list a vocabulary's worth of added tokens
TEXT_CHARS_MAX = 16 << 20  # of a rendered chat: more than any context holds
# Jinja makes Python of a template: what is nested too deep, or too long a number, fails there or at Python's compiler.
_NOT_COMPILED = (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError, ValueError)
_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, RecursionError)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

TRANSCRIPT = """\
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] }}

{% else %}
{{- 'User:' if message['role'] == 'user' else 'Assistant:' }}
{{- '' if message['content'][:1].isspace() else ' ' }}{{ message['content'] }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
"""For checkpoints without a template: a transcript with names, as base models continue it."""
TRANSCRIPT_STOP = "\nUser:"  # where such a model begins to speak for the user


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """`role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template. `own`: it came with the checkpoint, and its text holds all special tokens; otherwise it is
    TRANSCRIPT, and the tokenizer adds them. `tokens`: the special tokens by their names in Hugging Face's layout."""

    own: bool
    tokens: dict[str, str]
    _template: jinja2.Template

    @classmethod
    def open(cls, checkpoint: Path, now: datetime) -> ChatTemplate:
        """The template of a checkpoint's folder. `now` is what it is told when it asks for the date: one time for a
        whole chat, so that its beginning stays as it was. Raises CheckpointError."""
        config = _read_config(checkpoint / CONFIG_FILE)
        source = _read(checkpoint / TEMPLATE_FILE) or _source(config.get("chat_template"))
        tokens = {name: token for name in SPECIAL_TOKENS if (token := _token(config.get(name)))}
        try:
            template = _environment(now).from_string(TRANSCRIPT if source is None else source)
        except _NOT_COMPILED as error:
            reason = f"{type(error).__name__}: {error!s:.200}"
            raise CheckpointError(f"{checkpoint}: its chat template is not valid ({reason})") from error
        return cls(source is not None, tokens, template)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer, beside the model's end-of-text tokens."""
        return () if self.own else (TRANSCRIPT_STOP,)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the next answer to `messages`. Raises ModelError with what the template objects to."""
        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._template.render(
                messages=plain, tools=None, documents=None, add_generation_prompt=True, **self.tokens
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template refuses this chat: {error!s:.200}") from error
        except _FAILURES as error:
            raise ModelError(f"the model's chat template fails: {type(error).__name__}: {error!s:.200}") from error
        if len(text) > TEXT_CHARS_MAX:
            raise ModelError(f"the model's chat template makes {len(text)} characters of this chat: do not trust it")
        return text


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks answers for training: here the block is what it holds."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Without the attributes by which a template could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may well name an attribute "self"
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the name {name!r:.40} is not a template's")


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=partial(_strftime, now), namespace=_Namespace, dict=_dict
    )
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime(now: datetime, form: str) -> str:
    return now.strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    known = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)


def _read(file: Path) -> str | None:
    """None when there is no such file. Raises CheckpointError."""
    try:
        if file.stat().st_size > FILE_BYTES_MAX:
            raise CheckpointError(f"{file}: larger than {FILE_BYTES_MAX >> 20} MiB; do not trust it")
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def _read_config(file: Path) -> dict[str, Any]:
    text = _read(file)
    try:
        config = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object; download it again")
    return config


def _source(template: Any) -> str | None:
    """The template, of several the one named "default"."""
    if isinstance(template, list):
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token(value: Any) -> str:
    """A special token, written as text or as an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""
