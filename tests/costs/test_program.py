import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxppo.costs import program
from jaxppo.costs.hlo import Loop
from jaxppo.costs.program import Collective
from jaxppo.parallel import sharding

TEXT = """HloModule toy

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (in: f32[8,4]) -> f32[2,4] {
  %in = f32[8,4]{1,0:T(8,128)} parameter(0)
  %r = f32[8,4]{1,0:T(8,128)} all-reduce(%in), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%sum
  %at = s32[] constant(0)
  ROOT %own = f32[2,4]{1,0:T(2,128)} dynamic-slice(%r, %at, %at), dynamic_slice_sizes={2,4}
}

%overlapped (c: f32[4]) -> f32[16] {
  %c = f32[4] parameter(0)
  ROOT %g = f32[16]{0} all-gather(%c), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[4] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %more = f32[16]{0} fusion(%v), kind=kCustom, calls=%overlapped
  %s = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%v), channel_id=1, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
  %d = bf16[4,8]{1,0} all-gather-done(%s), channel_id=1
  %part = f32[2,4] fusion(%v), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], f32[4]) tuple(%next, %v)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(6)
  %run = u32[] all-reduce(%j), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum
  %go = pred[] convert(%run)
  %lt = pred[] compare(%j, %limit), direction=LT
  ROOT %both = pred[] and(%lt, %go)
}

ENTRY %main (y: f32[4]) -> f32[4] {
  %y = f32[4] parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[4]) tuple(%zero, %y)
  %loop = (s32[], f32[4]) while(%begin), condition=%condition, body=%body, metadata={op_name="jit(f)/generate/decode/while"}
  %whole = f32[16]{0} fusion(%y), kind=kCustom, calls=%overlapped
  %m = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(f)/update/x"}
  %n = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{1,0},{0,1}}, metadata={op_name="jit(f)/update/x"}
  ROOT %z = f32[4] get-tuple-element(%loop), index=1
}
"""  # noqa: E501
DECODE = (Loop("decode", 6, False),)


def test_every_collective_once_with_its_loops():
    assert program.collectives(TEXT, 4, {"decode": 6}) == {
        Collective(
            "all-reduce", (("u32", ()),), 4, DECODE, "generate"
        ): 1,  # the stop test in the condition
        Collective(
            "all-gather", (("bf16", (4, 8)),), 2, DECODE, "generate"
        ): 1,  # the result of the pair that its start gives
        Collective(
            "reduce-scatter", (("f32", (2, 4)),), 4, DECODE, "generate"
        ): 1,  # an all-reduce of which each takes a part
        # overlapped with the loop, so that it is written inside and outside: one channel is
        # one collective, which runs once
        Collective("all-gather", (("f32", (16,)),), 4, (), ""): 1,
        Collective("collective-permute", (("f32", (4,)),), 4, (), "update"): 2,
    }


def test_bytes_by_hand():
    """Of n devices and a result of S bytes; a loop of unknown length counts once."""
    one = Collective(
        "all-gather",
        (("bf16", (10, 8)), ("f32", ())),
        4,
        (Loop("decode", 127, False), Loop("layers", 30, True)),
        "",
    )
    assert one.size == 164 and one.times == 3810 and one.decoding  # 10 · 8 · 2 + 4
    assert one.sent == 123  # all but a device's own quarter pass through it
    assert one._replace(kind="all-to-all").sent == 123
    assert (
        one._replace(kind="all-reduce").sent == 246
    )  # sums on the way there, results on the way back
    assert (
        one._replace(kind="reduce-scatter").sent == 492
    )  # the parts of the three others, each as large as the result
    assert one._replace(kind="collective-permute").sent == 164
    unknown = one._replace(loops=(Loop("loop", None, False), Loop("layers", 30, True)))
    assert unknown.times == 30 and not unknown.decoding


def test_phases_in_a_program():
    assert program.phases_in(TEXT) == ("generate", "update")


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_real_program(axis):
    """A sum over eight devices in each of five rounds, as XLA writes it for a CPU."""
    mesh = sharding.make_mesh(f"{axis}=8")

    def total(x):
        with jax.named_scope("update"), jax.named_scope("rounds"):
            return jax.lax.scan(lambda c, _: (c * jnp.tanh(c).sum(), None), x, length=5)[0]

    x = jax.ShapeDtypeStruct(
        (16, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(axis))
    )
    found = program.collectives(jax.jit(total).lower(x).compile().as_text(), 8)
    assert found == {
        Collective("all-reduce", (("f32", ()),), 8, (Loop("rounds", 5, True),), "update"): 1
    }
