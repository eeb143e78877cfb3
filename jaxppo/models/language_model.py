"""What all architectures but the transformer share: embedding, head, value, dropout,
and the interface `types.Model` around them.

With `context_width` the policy also hears a recording (`listening.py`), between body
and norm.

A body is a Flax module `body(x [B L D], attend [B L], memory) -> (x [B L D], memory)`:
its memory is whatever it needs to go on token by token, a tuple of arrays with rows
first. Where `attend` is False a state stays as it was, and a window sees zeros.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kernels
from jaxppo.errors import UserError
from jaxppo.models.audio import Encoder, Listening, check
from jaxppo.models.layers import Linear, Norm, Value, dropped
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model


class Language(nn.Module):
    """Embedding -> body -> perhaps attention to a recording -> norm; logits by the
    embedding's transpose or a head of its own.
    """

    config: ModelConfig
    body: nn.Module
    dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02))
        self.final_norm = Norm(c.norm, c.norm_eps)
        if not c.tied:
            self.head = Linear(c.vocab_size, False, self.dtype)
        self.value = Value()
        if c.context_width:
            self.encoder = Encoder(c, self.dtype)
            self.listening = Listening(c, self.dtype)

    def __call__(self, tokens, attend, memory, heard=None, context=None, dropout_key=None):
        body: Any = self.body
        if context is not None:
            features, lengths = context
            heard = self.encoder(features, lengths, dropout_key)
        x = self.embed.embedding[tokens].astype(self.dtype).astype(jnp.float32)
        x = dropped(x, self.config.dropout, dropout_key, 0)
        x, memory = body(x, attend, memory)
        if heard is not None:
            x = self.listening(x, heard)
        hidden = dropped(self.final_norm(x), self.config.dropout, dropout_key, 1)
        if self.is_initializing():
            _ = self.logits(hidden), self.value(hidden)
        return hidden, memory, heard

    def logits(self, hidden):
        if not self.config.tied:
            return self.head(hidden)
        return kernels.matmul(hidden, self.embed.embedding, self.dtype, rows=True)

    def values(self, hidden):
        return self.value(hidden)


def wrap(
    config: ModelConfig,
    body: nn.Module,
    init_memory: Callable,
    *,
    dtype: str = "float32",
    lora: int = 0,
    lora_alpha: float = 16.0,
    remat: str = "none",
    scan: bool = False,
) -> Model:
    """A body as a model; `init_memory(batch, dtype)` is its memory before the first
    token.

    With `config.context_width` the cache is (memory, what was heard): the context is
    given with the first tokens, and encoded once. Raises UserError for what only the
    transformer has, adapters and scanned layers, and for a context that does not fit.
    """
    del lora_alpha
    if lora or scan:
        what = "--lora 0" if lora else "without --scan-layers"
        raise UserError(f"a {config.kind} policy is trained whole: {what}")
    compute = jnp.dtype(dtype)
    module = Language(config, body, compute)
    hears = config.context_width > 0

    def init(key):
        ones = jnp.ones((1, 2), jnp.int32)
        context = (
            (jnp.zeros((1, 4, config.context_width)), jnp.full((1,), 4, jnp.int32))
            if hears
            else None
        )
        return module.init(key, ones, ones == 1, init_memory(1, compute), None, context)["params"]

    def init_cache(batch, length, dtype=compute):
        del length  # the memory does not grow
        return (init_memory(batch, dtype), None) if hears else init_memory(batch, dtype)

    def apply(params, tokens, attend, *, cache=None, context=None, dropout_key=None):
        memory, heard = cache if cache is not None and hears else (cache, None)
        check(config, context, heard)
        memory = init_memory(tokens.shape[0], compute) if memory is None else memory
        run = lambda params: module.apply(
            {"params": params}, tokens, attend, memory, heard, context, dropout_key
        )
        out: Any = (jax.checkpoint(run) if remat != "none" and cache is None else run)(params)
        hidden, memory, heard = out
        return cast(Array, hidden), None if cache is None else (memory, heard) if hears else memory

    def call(method) -> Callable[..., Array]:
        return lambda params, hidden: cast(
            Array, module.apply({"params": params}, hidden, method=method)
        )

    head = lambda params: (
        params["embed"]["embedding"] if config.tied else params["head"]["kernel"].T
    )
    return Model(
        init, init_cache, apply, call(Language.logits), call(Language.values), head, compute
    )
