"""One decoder-only transformer: GPT-2, Llama, SmolLM, Qwen, Mistral and Gemma are
settings.

The residual stream, norms and softmax are float32; `dtype` is that of the inputs of
matrix products. Positions come from the attention mask, so padding on the left has no
effect. Layers are unrolled (XLA:CPU runs them 10 % faster), or with `scan` one compiled
layer runs in a loop over stacked parameters (`scan.py`).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxppo.errors import UserError
from jaxppo.models import cache as caches
from jaxppo.models import lora as adapters
from jaxppo.models.attention import (
    apply_rotary,
    attend,
    attend_cached,
    attention_mask,
    packed_mask,
    rotary_embedding,
)
from jaxppo.models.cache import Cache
from jaxppo.models.language_model import LanguageModel, as_model
from jaxppo.models.layers import Adapters, Norm, dropout
from jaxppo.models.layout import constrain
from jaxppo.models.scan import unstack_layers
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model

NO_CONTEXT = (
    "a transformer policy reads no context: use --model-kind gru, lstm, convolution or window"
)

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
}


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    adapters: Adapters

    @nn.compact
    def __call__(self, x, rotation, visible, slot, past):
        c = self.config
        rows, length, _ = x.shape

        def project(name, heads):
            linear = self.adapters.linear(name, heads * c.head_dim, c.qkv_bias, self.dtype)
            return linear(x).reshape(rows, length, heads, c.head_dim)

        q, k = project("q", c.num_heads), project("k", c.num_kv_heads)
        v = project("v", c.num_kv_heads)
        if c.qk_norm:
            kind = "rms" if c.norm == "layer" else c.norm
            q = Norm(kind, c.norm_eps, name="q_norm")(q)
            k = Norm(kind, c.norm_eps, name="k_norm")(k)
        if rotation is not None:
            q, k = apply_rotary(q, rotation), apply_rotary(k, rotation)
        if c.query_size is not None:
            q = q * (c.head_dim / c.query_size) ** 0.5
        # heads before time: the keys of a head are contiguous in memory
        q, k, v = (y.transpose(0, 2, 1, 3).astype(self.dtype) for y in (q, k, v))
        q, k, v = (constrain(y, "rows", "heads", None, None) for y in (q, k, v))
        prompt = None
        if past is not None:
            keys, values, prompt = past
            k, v = caches.write(keys, k, slot), caches.write(values, v, slot)
            past = k, v
        k, v = k.astype(self.dtype), v.astype(self.dtype)
        if prompt is None:
            out = attend(q, k, v, visible, c.score_cap, causal=past is None)
        else:
            filled = slot + length
            out = attend_cached(q, k, v, visible[0], filled, prompt, visible[1], c.score_cap)
        out = out.transpose(0, 2, 1, 3).reshape(rows, length, c.num_heads * c.head_dim)
        return self.adapters.linear("o", c.width, c.out_bias, self.dtype)(out), past


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any
    adapters: Adapters

    @nn.compact
    def __call__(self, x):
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        linear = lambda name, size: self.adapters.linear(name, size, c.mlp_bias, self.dtype)
        wide = lambda name: linear(name, c.mlp_width)(x)
        up = wide("up")
        h = activation(wide("gate")) * up if c.gated else activation(up)
        h = constrain(h, "rows", None, "mlp")
        return linear("down", c.width)(h)


class Block(nn.Module):
    config: ModelConfig
    dtype: Any
    adapters: Adapters

    @nn.compact
    def __call__(self, x, rotation, visible, slot, past):
        c = self.config
        norm = lambda name, x: Norm(c.norm, c.norm_eps, name=name)(x)
        behind = norm if c.post_norms else lambda name, x: x
        attention = Attention(c, self.dtype, self.adapters, name="attention")
        out, past = attention(norm("attention_norm", x), rotation, visible, slot, past)
        x = x + behind("attention_post_norm", out)
        out = MLP(c, self.dtype, self.adapters, name="mlp")(norm("mlp_norm", x))
        x = x + behind("mlp_post_norm", out)
        return constrain(x, "rows", None, None), past


class ScannedBlock(Block):
    """A block as the body of a scan, without a cache. `kind`: whether this layer is in
    `no_rope` and in `no_window`.
    """

    def __call__(self, x, kind, views):
        rotation, visible = views[0]
        if kind is not None:
            unrotated, wide = kind
            (cos, sin), visible = jax.tree.map(partial(jnp.where, wide), views[-1], views[0])
            rotation = jnp.where(unrotated, 1.0, cos), jnp.where(unrotated, 0.0, sin)
        return super().__call__(x, rotation, visible, 0, None)[0], None


class Transformer(LanguageModel):
    adapters: Adapters = Adapters()
    remat: bool = False
    scan: bool = False

    def setup(self):
        super().setup()
        c = self.config
        if c.positions == "learned":
            init = nn.initializers.normal(0.02)
            self.positions = nn.Embed(c.max_length, c.width, embedding_init=init)
        settings = (c, self.dtype, self.adapters)
        if self.scan:
            body: Any = nn.remat(ScannedBlock, prevent_cse=False) if self.remat else ScannedBlock
            axes: Any = {"variable_axes": {"params": 0}, "in_axes": (0, nn.broadcast)}
            looped: Any = nn.scan(body, split_rngs={"params": True}, length=c.num_layers, **axes)
            self.layers: Any = looped(*settings)
        else:
            block = nn.remat(Block) if self.remat else Block
            self.layers = [block(*settings) for _ in range(c.num_layers)]

    def __call__(
        self, tokens, attend_mask, cache=None, dropout_key=None, positions=None, segments=None
    ):
        c = self.config
        rows, length = tokens.shape
        prompt = None if cache is None else cache.prompt
        read = before = jnp.zeros((rows, 1), jnp.int32)  # tokens of the prompt, and of all
        attend_all, slot = attend_mask, 0
        if prompt is not None:
            read = prompt.attend.sum(1, dtype=jnp.int32, keepdims=True)
            read = jnp.repeat(read, rows // len(read), 0)
        if cache is not None:
            slot = cache.filled
            before = read + cache.attend.sum(1, dtype=jnp.int32, keepdims=True)
            attend_all = jax.lax.dynamic_update_slice(cache.attend, attend_mask, (0, slot))
        position = jnp.maximum(before + jnp.cumsum(attend_mask, 1, dtype=jnp.int32) - 1, 0)
        position = position if positions is None else positions
        x = self.rounded(self.embed.embedding[tokens])
        if c.scaled_embedding:
            x = x * c.width**0.5
        if c.positions == "learned":
            x = x + self.rounded(self.positions.embedding[position])
        x = constrain(dropout(x, c.dropout, dropout_key, 0), "rows", None, None)

        def see(window: int | None) -> Any:
            if segments is not None:
                return packed_mask(attend_mask, segments, position, window)
            own = attention_mask(attend_all, slot, length, window)
            if prompt is None:
                return own
            after = prompt.attend.shape[1] + slot
            before = attention_mask(prompt.attend, after, length, window, position)
            return own, before if window is not None else before[:, :1]

        def view(window: int | None) -> Any:
            rope = c.positions == "rope"
            return rotary_embedding(position, c, window) if rope else None, see(window)

        views = (view(c.window), *([view(None)] if c.no_window else []))
        x, stored = self.run_layers(x, cache, views, slot)
        if cache is not None:
            keys, values = stored
            cache = Cache(keys, values, attend_all, slot + length, prompt)
        return self.hidden(x, dropout_key), cache

    def run_layers(self, x, cache, views, slot) -> tuple[Any, Any]:
        """(the output of the last layer, keys and values of all layers or None).

        views: the rotation, and what tokens see, in layers with the window; then in
            those without it, if there are any.
        """
        c, numbers = self.config, range(self.config.num_layers)
        if self.scan:
            kind = None
            if c.no_rope or c.no_window:
                kind = tuple(
                    jnp.array([i in own for i in numbers]) for own in (c.no_rope, c.no_window)
                )
            with jax.named_scope("layers"):
                return self.layers(x, kind, views)
        kinds = []
        for i in numbers:
            rotation, visible = views[i in c.no_window]
            kinds.append((None if i in c.no_rope else rotation, visible))
        if cache is None:
            for layer, kind in zip(self.layers, kinds, strict=True):
                x, _ = layer(x, *kind, slot, None)
            return x, None
        prompt = cache.prompt
        shared = [None] * len(self.layers)
        if prompt is not None:
            shared = list(zip(prompt.keys, prompt.values, strict=True))
        new = []
        pasts = zip(cache.keys, cache.values, shared, strict=True)
        for layer, kind, past in zip(self.layers, kinds, pasts, strict=True):
            x, past = layer(x, *kind, slot, past)
            new.append(past)
        return x, tuple(zip(*new, strict=True))


def make(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    lora: int = 0,
    lora_alpha: float = 16.0,
    lora_on: str = "q,v",
    remat: str = "none",
    scan: bool = False,
) -> Model:
    """The transformer of `config`, with float32 parameters and kernels [in out]. `lora`
    > 0 adds adapters of that rank, scaled by lora_alpha / lora, to the linear layers
    `lora_on` (`lora.layers`). `remat` keeps the inputs of each block (block) or nothing
    (full) for the backward pass. Raises UserError if a context is given.
    """
    if config.context_width:
        raise UserError(NO_CONTEXT)
    compute = jnp.dtype(dtype)
    own = Adapters(lora, lora_alpha, adapters.layers(lora_on, gated=config.gated))
    module = Transformer(config, compute, own, remat == "block", scan)
    # A loop over stacked layers would copy each layer's weights at every token.
    unrolled = Transformer(config, compute, own._replace(gather_late=True))

    def init(key):
        ones = jnp.ones((1, 2), jnp.int32)
        return module.init(key, ones, ones == 1)["params"]

    def init_cache(batch, length, dtype=compute, *, prompt=None):
        shape = (batch, config.num_kv_heads, length, config.head_dim)
        return caches.empty(config.num_layers, shape, dtype, prompt)

    def apply(
        params,
        tokens,
        attend,
        *,
        cache=None,
        context=None,
        dropout_key=None,
        positions=None,
        segments=None,
    ):
        if context is not None:
            raise UserError(NO_CONTEXT)
        if cache is not None:
            params = unstack_layers(params)
            return unrolled.apply({"params": params}, tokens, attend, cache)

        def run(params, tokens, attend) -> Any:
            return module.apply(
                {"params": params}, tokens, attend, None, dropout_key, positions, segments
            )

        return (jax.checkpoint(run) if remat == "full" else run)(params, tokens, attend)

    return as_model(module, init, init_cache, apply)._replace(packs=True)
