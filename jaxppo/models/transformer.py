"""One decoder-only transformer; GPT-2, Llama, SmolLM, Qwen and Mistral are settings of
it (`config.ModelConfig`).

The residual stream, norms and softmax are float32; `dtype` is that of the inputs of
matrix products. Positions come from the attention mask, so padding on the left changes
nothing. Layers are unrolled (XLA:CPU runs them 10 % faster than a scan), or with `scan`
one compiled layer in a loop: its parameters are then one array for all layers, under
"layers" (`stacked.py`).
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxppo import kernels
from jaxppo.errors import UserError
from jaxppo.models.attention import attend, remember, rotate, rotations, visibility
from jaxppo.models.layers import Linear, Norm, Value, dropped
from jaxppo.models.layout import constrain
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model

OTHERS = "use --model-kind gru, lstm, convolution or window"

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}


class Cache(struct.PyTreeNode):
    """Keys and values of the tokens so far, in slots; every row fills the same slots,
    padding included.
    """

    keys: (
        tuple[Float[Array, "B H S D"], ...] | Float[Array, "N B H S D"]
    )  # one array a layer; scanned: one for all
    values: tuple[Float[Array, "B H S D"], ...] | Float[Array, "N B H S D"]
    attend: Bool[Array, "B S"]
    filled: Int[Array, ""]  # slots in use


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    rank: int
    alpha: float

    @nn.compact
    def __call__(self, x, rotation, visible, slot, past):
        c = self.config
        rows, length, _ = x.shape
        linear = lambda name, heads, rank, bias: Linear(
            heads * c.head_dim, bias, self.dtype, rank, self.alpha, name=name
        )(x)
        q = linear("q", c.num_heads, self.rank, c.qkv_bias).reshape(
            rows, length, c.num_heads, c.head_dim
        )
        k = linear("k", c.num_kv_heads, 0, c.qkv_bias).reshape(
            rows, length, c.num_kv_heads, c.head_dim
        )
        v = linear("v", c.num_kv_heads, self.rank, c.qkv_bias).reshape(
            rows, length, c.num_kv_heads, c.head_dim
        )
        if c.qk_norm:
            q, k = (
                Norm("rms", c.norm_eps, name="q_norm")(q),
                Norm("rms", c.norm_eps, name="k_norm")(k),
            )
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # heads before time: every head's keys are one block of memory
        q = q.transpose(0, 2, 1, 3).astype(self.dtype)
        k, v = (
            k.transpose(0, 2, 1, 3).astype(self.dtype),
            v.transpose(0, 2, 1, 3).astype(self.dtype),
        )
        q, k, v = (constrain(x, "rows", "heads", None, None) for x in (q, k, v))
        if past is not None:
            past, k, v = remember(past, k, v, slot)
        out = attend(q, k.astype(self.dtype), v.astype(self.dtype), visible)
        out = out.transpose(0, 2, 1, 3).reshape(rows, length, c.num_heads * c.head_dim)
        return Linear(c.width, c.out_bias, self.dtype, name="o")(out), past


class Block(nn.Module):
    config: ModelConfig
    dtype: Any
    rank: int
    alpha: float

    @nn.compact
    def __call__(self, x, rotation, visible, slot, past):
        c = self.config
        normed = Norm(c.norm, c.norm_eps, name="attention_norm")(x)
        out, past = Attention(c, self.dtype, self.rank, self.alpha, name="attention")(
            normed, rotation, visible, slot, past
        )
        x = x + out
        x = x + MLP(c, self.dtype, name="mlp")(Norm(c.norm, c.norm_eps, name="mlp_norm")(x))
        return constrain(x, "rows", None, None), past


class ScannedBlock(Block):
    """A block as the body of a loop: what is carried is x and the keys and values of
    all layers, or None.
    """

    def __call__(self, carry, layer, rotation, visible, slot):
        x, stored = carry
        x, past = super().__call__(
            x, rotation, visible, slot, None if stored is None else (*stored, layer)
        )
        return (x, None if past is None else past[:2]), None


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        act = ACTIVATIONS[c.activation]
        up = Linear(c.mlp_width, c.mlp_bias, self.dtype, name="up")(x)
        h = (
            act(Linear(c.mlp_width, c.mlp_bias, self.dtype, name="gate")(x)) * up
            if c.gated
            else act(up)
        )
        return Linear(c.width, c.mlp_bias, self.dtype, name="down")(
            constrain(h, "rows", None, "mlp")
        )


class Transformer(nn.Module):
    config: ModelConfig
    dtype: Any = jnp.float32
    rank: int = 0
    alpha: float = 16.0
    remat: bool = False
    scan: bool = False

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02))
        if c.positions == "learned":
            self.positions = nn.Embed(
                c.max_length, c.width, embedding_init=nn.initializers.normal(0.02)
            )
        settings = (c, self.dtype, self.rank, self.alpha)
        if self.scan:
            body: Any = nn.remat(ScannedBlock, prevent_cse=False) if self.remat else ScannedBlock
            options: dict[str, Any] = {
                "in_axes": (0, nn.broadcast, nn.broadcast, nn.broadcast),
                "length": c.num_layers,
            }
            looped: Any = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True}, **options
            )
            self.layers: Any = looped(*settings)
        else:
            block = nn.remat(Block) if self.remat else Block
            self.layers = [block(*settings) for _ in range(c.num_layers)]
        self.final_norm = Norm(c.norm, c.norm_eps)
        if not c.tied:
            self.head = Linear(c.vocab_size, False, self.dtype)
        self.value = Value()

    def __call__(self, tokens, attend_mask, cache=None, dropout_key=None):
        c = self.config
        length = tokens.shape[1]
        if cache is None:
            attend_all, slot, before = attend_mask, 0, jnp.zeros((tokens.shape[0], 1), jnp.int32)
        else:
            slot = cache.filled
            before = cache.attend.sum(1, dtype=jnp.int32)[:, None]
            attend_all = jax.lax.dynamic_update_slice(cache.attend, attend_mask, (0, slot))
        position = jnp.maximum(before + jnp.cumsum(attend_mask, 1, dtype=jnp.int32) - 1, 0)
        # rounded like any operand, so that the sampler (weights cast once) and the
        # scorer see the same numbers
        x = self.embed.embedding[tokens].astype(self.dtype).astype(jnp.float32)
        if c.positions == "learned":
            x = x + self.positions.embedding[position].astype(self.dtype).astype(jnp.float32)
        x = dropped(x, c.dropout, dropout_key, 0)
        rotation = rotations(position, c) if c.positions == "rope" else None
        visible = visibility(attend_all, slot, length, c.window)
        x, stored = self.through(constrain(x, "rows", None, None), cache, rotation, visible, slot)
        if cache is not None:
            keys, values = stored
            cache = Cache(keys, values, attend_all, slot + length)
        hidden = dropped(self.final_norm(x), c.dropout, dropout_key, 1)
        if self.is_initializing():
            _ = self.logits(hidden), self.value(hidden)
        return hidden, cache

    def through(self, x, cache, rotation, visible, slot) -> tuple[Any, Any]:
        """x behind all layers, and the keys and values of all, or None without a
        cache.
        """
        if self.scan:
            stored = None if cache is None else (cache.keys, cache.values)
            number = jnp.arange(self.config.num_layers, dtype=jnp.int32)
            with jax.named_scope("layers"):
                return self.layers((x, stored), number, rotation, visible, slot)[0]
        if cache is None:
            for layer in self.layers:
                x, _ = layer(x, rotation, visible, slot, None)
            return x, None
        new = []
        for layer, past in zip(
            self.layers, zip(cache.keys, cache.values, strict=True), strict=True
        ):
            x, past = layer(x, rotation, visible, slot, past)
            new.append(past)
        return x, tuple(zip(*new, strict=True))

    def logits(self, hidden):
        if not self.config.tied:
            return self.head(hidden)
        return kernels.matmul(hidden, self.embed.embedding, self.dtype, rows=True)

    def values(self, hidden):
        return self.value(hidden)


def make(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    lora: int = 0,
    lora_alpha: float = 16.0,
    remat: str = "none",
    scan: bool = False,
) -> Model:
    """The transformer of `config` as pure functions (`types.Model`).

    Parameters are one nested dict of float32 arrays, kernels [in out]; `dtype` is that
    of the inputs of matrix products; `lora` > 0 adds adapters of that rank to the q and
    v projections. `remat` (none, block, full) trades time in the backward pass for
    memory: only the inputs of each block, or nothing at all, is kept from the forward
    pass. With `scan` the layers' parameters are stacked (`stacked.py`), and the program
    holds one layer. Raises UserError for a shape, or a call, with context.
    """
    if config.context_width:
        raise UserError(f"a transformer policy reads no context: {OTHERS}")
    compute = jnp.dtype(dtype)
    module = Transformer(config, compute, lora, lora_alpha, remat == "block", scan)

    def init(key):
        ones = jnp.ones((1, 2), jnp.int32)
        return module.init(key, ones, ones == 1)["params"]

    def init_cache(batch, length, dtype=compute):
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        place = lambda: constrain(jnp.zeros(shape, dtype), "rows", "heads", None, None)
        every = lambda: constrain(
            jnp.zeros((config.num_layers, *shape), dtype), None, "rows", "heads", None, None
        )
        zeros = every if scan else lambda: tuple(place() for _ in range(config.num_layers))
        return Cache(zeros(), zeros(), jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    def apply(params, tokens, attend, *, cache=None, context=None, dropout_key=None):
        if context is not None:
            raise UserError(f"a transformer policy reads no context: {OTHERS}")
        run = lambda params, tokens, attend: module.apply(
            {"params": params}, tokens, attend, cache, dropout_key
        )
        if remat == "full" and cache is None:
            run = jax.checkpoint(run)
        return cast(tuple[Array, Cache | None], run(params, tokens, attend))

    def call(method) -> Callable[..., Array]:
        return lambda params, hidden: cast(
            Array, module.apply({"params": params}, hidden, method=method)
        )

    head = lambda params: (
        params["embed"]["embedding"] if config.tied else params["head"]["kernel"].T
    )
    return Model(
        init, init_cache, apply, call(Transformer.logits), call(Transformer.values), head, compute
    )
