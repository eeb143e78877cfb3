import jax
import jax.numpy as jnp
import pytest

from jaxppo.costs import hlo

# A loop that runs while its counter, element 1 of its state, is below LIMIT.
TEXT = """HloModule toy, is_scheduled=true

%body.1 (p: (f32[4], s32[])) -> (f32[4], s32[]) {
  %p = (f32[4]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=0
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %one = s32[] constant(STEP)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (f32[4]{0:T(128)}, s32[]{:T(128)}) tuple(%x, %next)
}

%condition.3 (q: (f32[4], s32[])) -> pred[] {
  %q = (f32[4]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=1
  %limit = s32[] constant(LIMIT)
  %running = pred[] custom-call(%q), custom_call_target="Running"
  ROOT_LINE
}

ENTRY %main.4 (y: f32[4]) -> f32[4] {
  %y = f32[4]{0:T(128)} parameter(0)
  %start = s32[] START
  %copied = s32[]{:T(128)} copy(%start)
  %begin = (f32[4]{0:T(128)}, /*index=1*/s32[]{:T(128)}) tuple(%y, %copied)
  %loop = (f32[4]{0:T(128)}, s32[]{:T(128)}) while(%begin), condition=%condition.3, ATTRIBUTES
  ROOT %z = f32[4]{0:T(128)} get-tuple-element(%loop), index=0
}
"""
BELOW = "ROOT %lt = pred[] compare(%j, %limit), direction=LT"
ATTRIBUTES = 'body=%body.1, metadata={op_name="go/while"}'
BOTH = f"{BELOW[5:]}\n  ROOT %and = pred[] and(%lt, %running)"


def loop(
    *,
    start="constant(0)",
    step=1,
    limit=8,
    condition=BELOW,
    attributes=ATTRIBUTES,
    around=(),
    trips=None,
) -> hlo.Loop:
    parts = {"START": start, "STEP": step, "LIMIT": limit, "ROOT_LINE": condition}
    text = TEXT
    for name, value in (parts | {"ATTRIBUTES": attributes}).items():
        text = text.replace(name, str(value))
    program = hlo.parse(text)
    return hlo.loop_of(program, program["main.4"]["loop"], set(around), trips or {})


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 8),
        ({"start": "constant(1)"}, 7),
        ({"step": 3}, 3),  # 0, 3, 6
        ({"limit": -1}, 0),
        ({"trips": {"go": 5}}, 8),  # the program's own numbers come first
    ],
)
def test_a_counter_tells_how_often_a_loop_runs(changes, times):
    assert loop(**changes) == ("go", times, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"condition": BOTH},  # something else may end it
        {"start": "custom-call(%y)"},
        {"step": 0},
        {"condition": "ROOT %only = pred[] bitcast(%running)"},
        {"condition": BELOW.replace("LT", "NE")},
    ],
)
def test_without_a_plain_counter_the_settings_give_an_upper_bound(changes):
    assert loop(**changes, trips={"go": 8, "other": 3}) == ("go", 8, False)
    assert loop(**changes) == ("go", None, False)


def test_a_count_that_xla_knows():
    known = f'{ATTRIBUTES}, backend_config={{"known_trip_count":{{"n":"5"}}}}'
    assert loop(condition=BOTH, attributes=known) == ("go", 5, True)


def test_a_loop_without_a_name_of_its_own():
    """Its scope is that of a loop around it: it does not have that loop's trip count."""
    assert loop(around={"go"}) == ("loop", 8, True)
    assert loop(around={"go"}, condition=BOTH, trips={"go": 8}) == ("loop", None, False)


def test_an_instruction():
    line = "%x = f32[] fusion(%a, f32[2]{0:T(8,128)} %b), kind=kLoop, calls={%f, %g.1}"
    text = f"ENTRY %main (a: f32[]) -> f32[] {{\n  {line}\n}}"
    assert hlo.entry(text) == "main"
    x = hlo.parse(text)["main"]["x"]
    assert x.opcode == "fusion" and x.operands == ["a", "b"]
    assert x.called("calls") == ["f", "g.1"] and x.scope == ""


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_real_program(unroll):
    """Three rounds of an outer loop, with at most six rounds of an inner one."""

    def inner(x):
        with jax.named_scope("inner"):
            return jax.lax.while_loop(
                lambda c: (c[0] < 7) & (c[1].sum() < 1e6), lambda c: (c[0] + 1, c[1] @ c[1]), (1, x)
            )[1]

    def outer(x):
        body = lambda x, _: (inner(x), None)
        with jax.named_scope("outer"):
            return jax.lax.scan(body, x, length=3 * unroll, unroll=unroll)[0]

    text = jax.jit(outer).lower(jnp.ones((4, 4))).compile().as_text()
    program = hlo.parse(text)
    loops = [x for body in program.values() for x in body.values() if x.opcode == "while"]
    found = {hlo.loop_of(program, x, set(), {"inner": 6}) for x in loops}
    assert found == {("outer", 3, True), ("inner", 6, False)}
