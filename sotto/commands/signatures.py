"""Commands whose options are declared elsewhere: typer reads them from a signature, so each command is given one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from typing import Any, get_type_hints


def declare(command: Callable[..., None], parameters: Iterable[inspect.Parameter]) -> None:
    """To typer `command` takes the `parameters`; their annotations are evaluated."""
    signature = inspect.Signature(list(parameters))
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer: its parameter `asked` is a dataclass, and each field of that an option, with a default."""
    parameters = list(inspect.signature(command, eval_str=True).parameters.values())
    index = next(index for index, each in enumerate(parameters) if each.name == "asked")
    kind = parameters[index].annotation
    hints = get_type_hints(kind, include_extras=True)
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(kind)
    ]

    @wraps(command)
    def called(**given: Any) -> None:
        asked = kind(**{option.name: given.pop(option.name) for option in options})
        command(asked=asked, **given)

    declare(called, [*parameters[:index], *options, *parameters[index + 1 :]])
    return called
