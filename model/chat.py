"""Turning a conversation into a prompt by the template that comes with the model.

A template is a program by a stranger, so it runs in Jinja's sandbox, which it can neither leave nor
change anything from.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tilewise.model.tokenizer import Tokenizer

__all__ = ["render_chat"]


def render_chat(template: str, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """The text of a conversation, up to where the model's answer begins.

    The environment is the one that Hugging Face's templates are written for.

    Args:
        template: Jinja source.
        messages: {"role": ..., "content": ...}, oldest first.
        tokenizer: spells the special tokens that templates ask for.

    Raises:
        ValueError: if the template is damaged, or rejects the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    def reject(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = reject
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=tokenizer.token(tokenizer.bos_id),
            eos_token=tokenizer.token(next(iter(tokenizer.eos_ids), None)),
        )
    except (TemplateError, SecurityError, TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"messages: the chat template failed: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
