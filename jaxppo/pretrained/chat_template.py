"""Render chat templates as transformers' `apply_chat_template` does. A template comes
with the checkpoint, so a sandbox runs it, with limits of time and size.
"""

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxppo.errors import PretrainedError, first_line

SECONDS = 10.0
CHARACTERS = 2**24  # of the text, and of each value in the template
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field

_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Return the text of messages {"role": ..., "content": ...}.

    special_tokens: names such as "bos_token", and the tokens.

    Raises PretrainedError for a template that is not Jinja's, fails, does not take the
    messages, or needs more than 10 seconds or 16 million characters.
    """
    token = _deadline.set(time.monotonic() + SECONDS)
    try:
        chunks, size = [], 0
        for chunk in _compile(template).generate(
            messages=[_message(x) for x in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        ):
            chunks.append(chunk)
            size += len(chunk)
            if size > CHARACTERS:
                raise TemplateError(f"its text has more than {CHARACTERS} characters")
        return "".join(chunks)
    # what a stranger's template makes Python raise is not documented
    except Exception as error:
        raise PretrainedError(
            f"the checkpoint's chat template does not take these messages ({first_line(error)})"
        ) from error
    finally:
        _deadline.reset(token)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {"tojson": _to_json, "_timed": _timed, "_bounded": _bounded}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(_Limits().visit(environment.parse(template)))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call(__self, __context, __obj, *args, **kwargs):  # names that no template uses
        _check_time()
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        sized = lambda x, y: isinstance(x, int) and hasattr(y, "__len__") and x * len(y)
        if operator == "*":
            large = max(sized(left, right), sized(right, left)) > CHARACTERS
        else:
            large = isinstance(left, int) and max(abs(left), abs(right)) > 64
        if large:
            raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


class _Limits(NodeTransformer):
    """Checks time in each round of a loop, and the size of each value that is set."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_timed")
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _filtered(node.node, "_bounded")
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "_bounded")
        return node


def _filtered(node: Any, name: str) -> Any:
    found = nodes.Filter(node, name, [], [], None, None)
    return found if node is None else found.set_lineno(node.lineno)


def _timed(values: Iterable) -> Iterator:
    for value in values:
        _check_time()
        yield value


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateError(f"it takes more than {SECONDS:.0f} seconds")


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > CHARACTERS:
        raise TemplateError(f"a value has more than {CHARACTERS} characters")
    return value


class _Generation(Extension):
    """{% generation %} marks what the assistant wrote; the text is the same."""

    tags: ClassVar = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict` without a class's attributes."""

    def __call__(self, *args, **named):
        return dict(*args, **named)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args, **named):  # so that `self` may be a name
        for name in dict(*args[1:], **named):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **named)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without fields that are None; its reasoning has all names in use."""
    own = {str(name): _plain(x) for name, x in message.items() if x is not None}
    reasoning = next((own[name] for name in REASONING if name in own), None)
    if reasoning is not None:
        own = {"thinking": reasoning, **own, "reasoning_content": reasoning}
    return own


def _plain(x: Any) -> Any:
    """Plain data: other objects have methods that the sandbox does not know."""
    if isinstance(x, Mapping):
        return {_plain(name): _plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    for kind in (str, bool, int, float):
        if isinstance(x, kind):
            return kind(x)
    return x if x is None else f"<{type(x).__name__}>"
