"""Renders a conversation with a base's chat template, to the same text as transformers' `apply_chat_template`.

Templates come with a base, so they are code of somebody else: they run in jinja's sandbox and see plain JSON values
only. Knows no tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = dict[str, Any]
"""A message as templates read it; values are JSON."""

# Stands behind the last message while it is rendered, to find where it ends.
_CONTINUE: Final = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateProblem(ValueError):  # noqa: N818  Says what is wrong with a conversation, or with the template.
    """The template refused the conversation, or is broken; the sentence is the template's own where it has one."""


def render(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Returns the text of a conversation.

    Args:
        template: a jinja chat template.
        messages: the conversation, at least one message; keys whose value is None are left out.
        special_tokens: what the template may call by name: `bos_token`, `eos_token` and so on.
        options: further variables of the template, such as `enable_thinking`; they win over special tokens.
        add_generation_prompt: end with the beginning of the assistant's answer.
        continue_final_message: end in the middle of the last message, so that the answer goes on with it.

    Raises:
        TemplateProblem: the template raises, or cannot be compiled.
    """
    seen = [
        _with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages
    ]
    if continue_final_message:
        seen[-1]["content"] = str(seen[-1].get("content", "")) + _CONTINUE
    variables = {**special_tokens, **(options or {}), "tools": None, "documents": None}
    try:
        text = _compile(template).render(messages=seen, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.exceptions.TemplateError as error:
        raise TemplateProblem(f"the chat template refuses this conversation: {error.message or error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise TemplateProblem(f"the chat template cannot render this conversation: {error}") from error
    return _cut_at_mark(text) if continue_final_message else text


def _with_reasoning(message: Message) -> Message:
    """Returns the message with its reasoning under the older name for it too, as transformers gives it."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _cut_at_mark(text: str) -> str:
    place = text.rfind(_CONTINUE.strip())
    if place < 0:
        raise TemplateProblem("the chat template drops the end of the last message, so it cannot be continued")
    # A template that trims messages has trimmed the mark's space, and would have trimmed the message's too.
    kept = text[place:].startswith(_CONTINUE)
    return text[:place] if kept else text[:place].rstrip()


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are rendered as they are."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns the block's body behind a call that passes it on."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict(...)` in a template, without the class behind it."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:  # Any: values of the template.
        """Makes a dict."""
        return dict(*items, **named)


class _Namespace(Namespace):
    """`namespace(...)` in a template, without names that reach into Python."""

    def __init__(*args: Any, **named: Any) -> None:  # As jinja's own: `self` may be one of the names.
        self, *rest = args
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}; choose a name without a leading '_'")


# Any: values of the template.
def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
