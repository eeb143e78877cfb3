import jax
import jax.numpy as jnp
import pytest

from jaxppo.costs import hlo

# A loop that goes on while `element 1 + OFFSET < LIMIT` (and maybe something else); its counter
# goes from START in steps of STEP.
TEXT = """HloModule toy, is_scheduled=true

%body.1 (p: (f32[4], s32[])) -> (f32[4], s32[]) {
  %p = (f32[4]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %x = f32[4]{0:T(128)} get-tuple-element(%p), index=0
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %one = s32[] constant(STEP)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (f32[4]{0:T(128)}, s32[]{:T(128)}) tuple(%x, %next)
}

%fused.2 (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %below = pred[] compare(%a, %b), direction=LT
}

%condition.3 (q: (f32[4], s32[])) -> pred[] {
  %q = (f32[4]{0:T(128)}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=1
  %shift = s32[] constant(OFFSET)
  %moved = s32[] add(%j, %shift)
  %limit = s32[] constant(LIMIT)
  %running = pred[] custom-call(%q), custom_call_target="Running"
  ROOT_LINE
}

ENTRY %main.4 (y: f32[4]) -> f32[4] {
  %y = f32[4]{0:T(128)} parameter(0)
  %start = s32[] START
  %copied = s32[]{:T(128)} copy(%start)
  %begin = (f32[4]{0:T(128)}, /*index=1*/s32[]{:T(128)}) tuple(%y, %copied)
  %loop = (f32[4]{0:T(128)}, s32[]{:T(128)}) while(%begin), condition=%condition.3, body=%body.1, metadata={op_name="go/while"}
  ROOT %z = f32[4]{0:T(128)} get-tuple-element(%loop), index=0
}
"""
BELOW = "ROOT %lt = pred[] compare(%moved, %limit), direction=LT"


def loop(*, start="constant(0)", step=1, offset=0, limit=8, condition=BELOW) -> hlo.Loop:
    text = (
        TEXT.replace("STEP", str(step)).replace("OFFSET", str(offset)).replace("LIMIT", str(limit))
    )
    text = text.replace("START", start).replace("ROOT_LINE", condition)
    program = hlo.parse(text)
    return hlo.loop_of(program, "main.4", program["main.4"]["loop"], set())


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, 8),
        ({"start": "constant(1)"}, 7),
        ({"offset": 1}, 7),  # i + 1 < 8
        ({"step": 3}, 3),  # 0, 3, 6
        ({"limit": -1}, 0),
        ({"condition": "ROOT %gt = pred[] compare(%limit, %moved), direction=GT"}, 8),
        (
            {
                "condition": "ROOT %fusion = pred[] fusion(%moved, %limit), kind=kLoop, calls=%fused.2"
            },
            8,
        ),
    ],
)
def test_a_counter_tells_how_often(changes, times):
    assert loop(**changes) == ("go", times, True)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        (
            {"condition": f"{BELOW[5:]}\n  ROOT %and = pred[] and(%lt, %running)"},
            8,
        ),  # something else may end it
        ({"start": "custom-call(%y)"}, 8),  # the start cannot be seen
        ({"step": 0}, 8),
        ({"condition": "ROOT %only = pred[] bitcast(%running)"}, None),
        ({"condition": "ROOT %ne = pred[] compare(%moved, %limit), direction=NE"}, None),
    ],
)
def test_at_most_or_unknown(changes, times):
    assert loop(**changes) == ("go", times, False)


def test_what_the_compiler_knows_itself():
    program = hlo.parse(
        TEXT.replace("ROOT_LINE", BELOW).replace(
            "body=%body.1,", 'backend_config={"known_trip_count":{"n":"5"}},'
        )
    )
    assert hlo.loop_of(program, "main.4", program["main.4"]["loop"], set()) == ("go", 5, True)
    assert (
        hlo.loop_of(program, "main.4", program["main.4"]["loop"], {"go"}).name == "loop"
    )  # a nameless one inside "go"


def test_an_instruction_taken_apart():
    text = "ENTRY %main (a: f32[]) -> f32[] {\n  %x = f32[] fusion(%a, f32[2]{0:T(8,128)} %b), kind=kLoop, calls={%f, %g.1}\n}"
    assert hlo.entry(text) == "main"
    x = hlo.parse(text)["main"]["x"]
    assert (
        x.opcode == "fusion"
        and x.operands == ["a", "b"]
        and x.called("calls") == ["f", "g.1"]
        and x.scope == ""
    )


@pytest.mark.parametrize("unroll", [1, 2])
def test_a_real_program(unroll):
    """Three rounds of an outer loop with at most six of an inner one, as XLA writes them for a
    CPU.
    """

    def inner(x):
        with jax.named_scope("inner"):
            return jax.lax.while_loop(
                lambda c: (c[0] < 7) & (c[1].sum() < 1e6), lambda c: (c[0] + 1, c[1] @ c[1]), (1, x)
            )[1]

    def outer(x):
        with jax.named_scope("outer"):
            return jax.lax.scan(lambda x, _: (inner(x), None), x, length=3 * unroll, unroll=unroll)[
                0
            ]

    text = jax.jit(outer).lower(jnp.ones((4, 4))).compile().as_text()
    program = hlo.parse(text)
    whiles = [
        (where, x) for where, body in program.items() for x in body.values() if x.opcode == "while"
    ]
    found = {hlo.loop_of(program, where, x, set()) for where, x in whiles}
    assert found == {("outer", 3, True), ("inner", 6, False)}
