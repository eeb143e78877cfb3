"""Every public function of the maths has an equation, a source, shapes and an example."""

import dataclasses
import doctest
import importlib
import inspect
import re
import types
import typing

import jax
import pytest
from jaxtyping import AbstractArray, Array, Float

from jaxppo import losses

# In losses and advantages each function names its paper. Elsewhere the module's source is enough.
OWN_SOURCE = ("jaxppo.advantages", "jaxppo.losses")
MODULES = ["masked", "advantages", "kl", "aggregate", "sampling", "kernels"]

# An equation is an operator between two operands (a = b, x · y, x / y, x @ y, x − y, x < y, each
# with its spaces), or one in front of an operand (Σ x, √x, −x, but not the numbers −1 and −inf).
# Prose has neither: its hyphens are not minus signs.
EQUATION = re.compile(r"[\w)\]|₊] [=<>≤≥·−@/] [\w(\[|√Σ−]|−(?!inf|\d)[\w(]|Σ[\w{]* ?[\w(]|√[\w(]")


def public_functions():
    for name in MODULES:
        module = importlib.import_module(f"jaxppo.{name}")
        for key, f in vars(module).items():
            if (
                not key.startswith("_")
                and callable(f)
                and not inspect.isclass(f)
                and f.__module__ == module.__name__
            ):
                yield pytest.param(f, id=f"{name}.{key}")
    for key in losses.__all__:
        yield pytest.param(getattr(losses, key), id=f"losses.{key}")


def leaves(annotation):
    """The types that a union, a tuple, a dict or a struct is made of."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, dict):
        return [leaf for part in typing.get_args(annotation) for leaf in leaves(part)]
    if dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"):
        return [
            leaf for part in typing.get_type_hints(annotation).values() for leaf in leaves(part)
        ]
    return [annotation]


def is_shaped(annotation):
    """Whether every part is an array type with dtype and shape, or a plain Python type. (beartype
    checks the values.)
    """
    plain = (int, float, bool, str, type(None), Ellipsis)
    shaped = lambda x: inspect.isclass(x) and issubclass(x, AbstractArray)
    return all(
        shaped(x) or x in plain or typing.get_origin(x) is typing.Literal
        for x in leaves(annotation)
    )


def without_shape(f):
    """Arguments and the result (`return`) without a shape. Random keys and dtypes need none."""
    signature = inspect.signature(f)
    annotations = {
        name: p.annotation
        for name, p in signature.parameters.items()
        if name not in ("key", "dtype")
    }
    return [
        name
        for name, a in (annotations | {"return": signature.return_annotation}).items()
        if not is_shaped(a)
    ]


def lacks(f):
    """What is missing."""
    text = inspect.cleandoc(f.__doc__ or "")
    prose = re.sub(r"https?://\S+", "", re.split(r"^>>> ", text, maxsplit=1, flags=re.MULTILINE)[0])
    module = inspect.getmodule(f)
    source = text if f.__module__.startswith(OWN_SOURCE) else f"{text} {module.__doc__}"
    # Found from the module, as pytest finds it, so that it runs: pyproject has --doctest-modules
    # over the package.
    found = [
        t
        for t in doctest.DocTestFinder().find(module)
        if t.name == f"{module.__name__}.{f.__name__}"
    ]
    checks = {
        "an equation": EQUATION.search(prose),
        "a source (https://)": "https://" in source,
        "an example with its result": any(example.want for t in found for example in t.examples),
        **{f"a shape for {name}": False for name in without_shape(f)},
    }
    return [what for what, there in checks.items() if not there]


@pytest.mark.parametrize("f", list(public_functions()))
def test_a_public_function_is_documented(f):
    assert lacks(f) == []


def test_examples_are_run(pytestconfig):
    assert pytestconfig.getoption("--doctest-modules") and "jaxppo" in pytestconfig.getini(
        "testpaths"
    )


# --- the check itself


def good(
    x: Float[Array, "B"], scale: float | None = None, *, key: Array | None = None
) -> Float[Array, "B"]:
    """Twice: y = 2 x (https://example.org).

    >>> import jax.numpy as jnp
    >>> good(jnp.ones(1)).tolist()
    [2.0]
    """
    return 2 * x


def bare(x: jax.Array, scale):
    """Twice the and/or well-known number (the best, of all): as a rule > https://example.org/a=b"""
    return 2 * x


def silent(x: Float[Array, "B"]) -> Float[Array, "B"]:
    return x


def test_the_check_finds_what_is_missing():
    assert lacks(good) == []
    assert lacks(bare) == [
        "an equation",
        "an example with its result",
        *(f"a shape for {n}" for n in ("x", "scale", "return")),
    ]
    assert lacks(silent) == ["an equation", "a source (https://)", "an example with its result"]


@pytest.mark.parametrize(
    "text", ["−A log π", "Σ mₜ xₜ", "wᵢₜ = mᵢₜ", "x² / 2", "Gₜ − R", "x @ w", "|x| < 1", "√var"]
)
def test_equations(text):
    assert EQUATION.search(f"In words: {text}.")


@pytest.mark.parametrize(
    "text",
    [
        "The well-known sum.",
        "0.5, -1",
        "yes and/or no",
        "Shapes: [B T] -> [B].",
        "In [−20, 20], −inf: x.",
    ],
)
def test_prose_is_not_an_equation(text):
    assert not EQUATION.search(text)
