"""NLPO's action mask: a token may be sampled only inside the nucleus of a lagged copy
of the policy (https://arxiv.org/abs/2210.01241), one of `copies.py`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxppo import sampling
from jaxppo.config import Config
from jaxppo.models import lora
from jaxppo.models.critic import pair_of_caches
from jaxppo.types import Model, Params, PyTree


def with_mask(model: Model, config: Config) -> Model:
    """The model with NLPO's mask as `allowed`; the model itself if `mask_top_p` is 1.
    With parameters under "lagged" both networks read every token, and the lagged hidden
    states [... D] stand behind the policy's. Without them only the policy runs.
    """
    if config.mask_top_p >= 1:
        return model
    own = lambda params: {name: x for name, x in params.items() if name != "lagged"}
    width = lambda params: model.head(own(params)).shape[1]
    policy = lambda params, hidden: hidden[..., : -width(params)] if "lagged" in params else hidden

    def init_cache(*args, **options):
        return pair_of_caches(model.init_cache, model.init_cache, *args, **options)

    def apply(params, tokens, attend, *, cache=None, dropout_key=None, **options):
        one, other = (None, None) if cache is None else cache
        hidden, one = model.apply(
            own(params), tokens, attend, cache=one, dropout_key=dropout_key, **options
        )
        if "lagged" in params:
            lagged, other = model.apply(params["lagged"], tokens, attend, cache=other, **options)
            hidden = jnp.concatenate([hidden, lagged], -1)
        return hidden, None if cache is None else (one, other)

    def allowed(params, hidden):
        if "lagged" not in params:
            return None
        return nucleus(model.logits(params["lagged"], hidden[..., -width(params) :]), config=config)

    return model._replace(
        init_cache=init_cache,
        apply=apply,
        logits=lambda params, hidden: model.logits(own(params), policy(params, hidden)),
        value=lambda params, hidden: model.value(own(params), policy(params, hidden)),
        allowed=allowed,
    )


def nucleus(logits: Float[Array, "... V"], *, config: Config) -> Bool[Array, "... V"]:
    """The likeliest tokens with Σ p ≥ mask_top_p, with p = softmax(z / temperature).

    >>> import jax.numpy as jnp
    >>> nucleus(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), config=Config(mask_top_p=0.6))
    Array([[ True,  True, False]], dtype=bool)
    """
    tempered = sampling.temper(logits, temperature=config.temperature)
    return sampling.keep_set(tempered, top_p=config.mask_top_p) > -jnp.inf


def with_lagged(base: Params, statistics: PyTree) -> Params:
    """The untrained weights and, under "lagged", the whole lagged policy."""
    if "lagged" not in statistics:
        return base
    whole = lora.merge(base, statistics["lagged"])
    return {**base, "lagged": {name: x for name, x in whole.items() if name != "critic"}}
