"""What all architectures share: embedding, norm, head and value head; models of a body.

A body is a Flax module `body(x [B L D], attend [B L], memory) -> (x [B L D], memory)`.
Its memory, a tuple of arrays with rows first, continues it token by token. Where
`attend` is False, a state does not change and a window sees zeros.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxppo import kernels
from jaxppo.errors import UserError
from jaxppo.models.attention import soft_cap
from jaxppo.models.audio import AudioAttention, Encoder, check_context
from jaxppo.models.layers import Linear, Norm, Value, dropout
from jaxppo.models.shapes import ModelConfig
from jaxppo.types import Model


class LanguageModel(nn.Module):
    """The shared layers."""

    config: ModelConfig
    dtype: Any

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02))
        self.final_norm = Norm(c.norm, c.norm_eps)
        if not c.tied:
            self.head = Linear(c.vocab_size, False, self.dtype)
        self.value = Value()

    def rounded(self, embedding):
        """Round as operands are, so that sampler and scorer see the same numbers."""
        return embedding.astype(self.dtype).astype(jnp.float32)

    def hidden(self, x, dropout_key):
        """The last hidden states, from the output of the last layer."""
        hidden = dropout(self.final_norm(x), self.config.dropout, dropout_key, 1)
        if self.is_initializing():
            _ = self.logits(hidden), self.value(hidden)
        return hidden

    def logits(self, hidden):
        if self.config.tied:
            found = kernels.matmul(hidden, self.embed.embedding, self.dtype, rows=True)
        else:
            found = self.head(hidden)
        return soft_cap(found, self.config.logit_cap)

    def values(self, hidden):
        return self.value(hidden)


def as_model(module: LanguageModel, init: Callable, init_cache: Callable, apply: Callable) -> Model:
    """The `Model` of a module with the functions of its architecture."""

    def call(method: str) -> Callable[..., Array]:
        return lambda params, hidden: cast(
            Array, module.apply({"params": params}, hidden, method=method)
        )

    def head(params):
        return params["embed"]["embedding"] if module.config.tied else params["head"]["kernel"].T

    return Model(init, init_cache, apply, call("logits"), call("values"), head, module.dtype)


class BodyModel(LanguageModel):
    """Embedding -> body -> attention to a recording, if there is one -> norm."""

    body: nn.Module

    def setup(self):
        super().setup()
        if self.config.context_width:
            self.encoder = Encoder(self.config, self.dtype)
            self.listening = AudioAttention(self.config, self.dtype)

    def __call__(self, tokens, attend, memory, audio=None, context=None, dropout_key=None):
        body: Any = self.body
        if context is not None:
            features, lengths = context
            audio = self.encoder(features, lengths, dropout_key)
        x = self.rounded(self.embed.embedding[tokens])
        x, memory = body(dropout(x, self.config.dropout, dropout_key, 0), attend, memory)
        if audio is not None:
            x = self.listening(x, audio)
        return self.hidden(x, dropout_key), memory, audio


def from_body(
    config: ModelConfig,
    body: nn.Module,
    init_memory: Callable,
    *,
    dtype: str = "float32",
    lora: int = 0,
    lora_alpha: float = 16.0,
    lora_on: str = "q,v",
    remat: str = "none",
    scan: bool = False,
) -> Model:
    """A body as a model; `init_memory(batch)` is its memory before the first token.
    With `config.context_width` the cache is (memory, encoded recording); the first
    tokens bring the context. Raises UserError for adapters, scanned layers, a wrong
    context.
    """
    del lora_alpha, lora_on
    if lora or scan:
        what = "adapters: use --lora 0" if lora else "scanned layers: run without --scan-layers"
        raise UserError(f"a {config.kind} policy has no {what}")
    compute = jnp.dtype(dtype)
    module = BodyModel(config, compute, body)
    has_context = config.context_width > 0

    def init(key):
        ones, frames = jnp.ones((1, 2), jnp.int32), jnp.zeros((1, 4, config.context_width))
        context = (frames, jnp.full((1,), 4, jnp.int32)) if has_context else None
        return module.init(key, ones, ones == 1, init_memory(1), None, context)["params"]

    def init_cache(batch, length, dtype=compute):
        del length, dtype  # the memory does not grow, and stays float32
        return (init_memory(batch), None) if has_context else init_memory(batch)

    def apply(params, tokens, attend, *, cache=None, context=None, dropout_key=None):
        memory, audio = cache if cache is not None and has_context else (cache, None)
        check_context(config, context, audio)
        memory = init_memory(tokens.shape[0]) if memory is None else memory
        run = lambda params: module.apply(
            {"params": params}, tokens, attend, memory, audio, context, dropout_key
        )
        out: Any = (jax.checkpoint(run) if remat != "none" and cache is None else run)(params)
        hidden, memory, audio = out
        if cache is None:
            return hidden, None
        return hidden, (memory, audio) if has_context else memory

    return as_model(module, init, init_cache, apply)
