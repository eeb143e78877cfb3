"""Natural policy gradient and TRPO as other ways from a batch to new parameters, for
models that fit: one step a batch.

    maximise g·x  subject to  ½ xᵀ F x ≤ δ     =>     x = √(2 δ / gᵀ F⁻¹ g) · F⁻¹ g

F is the Fisher matrix, the Hessian of the mean KL a token at the old policy, exact over
the vocabulary; F⁻¹ g comes from conjugate gradients on products F v, so that F is never
formed. NPG takes the step as it is (Kakade 2001, "A natural policy gradient"); TRPO
halves it until the KL holds and the surrogate improves
(https://arxiv.org/abs/1502.05477, appendix C). The critic learns as everywhere, by its
own gradients. Use float32: products in bfloat16 are too noisy for conjugate gradients.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxppo import masked, optimizers, policy
from jaxppo.config import Config
from jaxppo.losses import token
from jaxppo.models import lora
from jaxppo.types import Batch, Model, Parts, PyTree, Scalar, TrainState
from jaxppo.update import loss_constants, make_update, ratio_off

# the line search takes a step whose KL is at most this multiple of the bound, as the
# public implementation does
SLACK = 1.5


def conjugate_gradient(
    product: Callable[[PyTree], PyTree], b: PyTree, *, iterations: int, tolerance: Scalar = 1e-10
) -> PyTree:
    """x with product(x) = b, for a symmetric positive definite product, after at most
    `iterations` steps (Hestenes and Stiefel 1952); no more steps once the squared
    residual is below `tolerance`.

    >>> import jax.numpy as jnp
    >>> conjugate_gradient(
    ...     lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 8.0]), iterations=2
    ... )
    Array([1., 2.], dtype=float32)
    """
    add = lambda scale, x, y: jax.tree.map(lambda a, c: c + scale * a, x, y)

    def body(_, carry):
        x, r, p, rr = carry
        z = product(p)
        going = rr >= tolerance
        step = jnp.where(going, rr / jnp.where(going, optax.tree.vdot(p, z), 1.0), 0.0)
        x, r = add(step, p, x), add(-step, z, r)
        new = optax.tree.vdot(r, r)
        p = jax.tree.map(
            lambda a, c: jnp.where(
                going, c + jnp.where(going, new / jnp.where(going, rr, 1.0), 0.0) * a, a
            ),
            p,
            r,
        )
        return x, r, p, new

    start = (jax.tree.map(jnp.zeros_like, b), b, b, optax.tree.vdot(b, b))
    return jax.lax.fori_loop(0, iterations, body, start)[0]


def natural_step(
    gradient: PyTree,
    product: Callable[[PyTree], PyTree],
    *,
    bound: Scalar,
    iterations: int,
    damping: Scalar,
) -> PyTree:
    """√(2 δ / xᵀ (F + λ I) x) · x with x = (F + λ I)⁻¹ g, an ascent direction; 0 for a
    gradient of 0.

    `product(v)` is F v, `bound` δ, `damping` λ.
    """
    damped = lambda v: jax.tree.map(lambda a, c: a + damping * c, product(v), v)
    x = conjugate_gradient(damped, gradient, iterations=iterations)
    curvature = jnp.asarray(optax.tree.vdot(x, damped(x)))
    positive = curvature > 0
    scale = jnp.where(positive, jnp.sqrt(2 * bound / jnp.where(positive, curvature, 1.0)), 0.0)
    return jax.tree.map(lambda a: scale * a, x)


def make_natural_update(
    model: Model, parts: Parts, config: Config, *, axis_name: str | None = None, line_search: bool
) -> Callable:
    """update(state, batch, key) -> (state, metrics), like `update.make_update`: one
    natural-gradient step on the policy over the whole batch, then the critic's epochs.
    The policy loss is the plain surrogate −r A, whatever `parts.policy_loss` is.
    """
    critic = make_update(model, parts, config, axis_name=axis_name, critic_alone=True)
    total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)

    def update(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict]:
        base, rolled, mask = loss_constants(state, parts, config).base, batch.rollout, batch.mask
        mine, others = lora.split(dict(state.params), lambda path: path[0] not in optimizers.CRITIC)
        whole = lambda theta: lora.merge(base, lora.merge(others, theta))
        old = whole(mine)
        weights = parts.aggregate(mask, axis_name=axis_name)

        def gain(theta):
            """The surrogate's improvement Σ w r A, on this device."""
            scores = policy.token_logprobs(
                model, whole(theta), rolled, config=config, with_values=False
            )
            loss, _ = token.kl_penalty(
                scores.logprobs, batch.old_logprobs, batch.advantages, mask, beta=0.0
            )
            return -(weights * loss).sum(), scores

        def divergence(theta):
            """KL(old ‖ theta), mean over tokens; this device's share."""
            tokens = masked.total(mask, mask, axis_name=axis_name)
            kl = policy.full_kl(model, old, whole(theta), rolled, config=config)
            return masked.total(kl, mask) / jnp.maximum(tokens, 1)

        def fisher(v):
            """F v by reverse mode twice: the matrix products have rules for reverse
            mode only.
            """
            slope = lambda theta: optax.tree.vdot(jax.grad(divergence)(theta), v)
            return total(jax.grad(slope)(mine))

        (before, scores), gradient = jax.value_and_grad(gain, has_aux=True)(mine)
        before, gradient = total(before), total(gradient)
        step = natural_step(
            gradient,
            fisher,
            bound=config.trust_kl,
            iterations=config.cg_iterations,
            damping=config.cg_damping,
        )

        def tried(halvings):
            theta = jax.tree.map(lambda p, s: p + 0.5**halvings * s, mine, step)
            return theta, total(gain(theta)[0]) - before, total(divergence(theta))

        if line_search:
            # false for NaN
            ok = lambda better, kl: (better > 0) & (kl <= SLACK * config.trust_kl)

            def attempt(carry):
                halvings, *_ = carry
                theta, better, kl = tried(halvings + 1)
                return halvings + 1, theta, better, kl

            searching = lambda carry: (carry[0] < config.backtracks) & ~ok(carry[2], carry[3])
            halvings, theta, better, kl = jax.lax.while_loop(
                searching, attempt, (jnp.zeros((), jnp.int32), *tried(0))
            )
            accepted = ok(better, kl)
        else:
            halvings, (theta, better, kl) = jnp.zeros((), jnp.int32), tried(0)
            accepted = jnp.isfinite(better) & jnp.isfinite(kl)
        theta = jax.tree.map(lambda n, o: jnp.where(accepted, n, o), theta, mine)

        metrics = {
            "policy_loss": -before,
            "entropy": masked.mean(scores.entropy, mask, axis_name=axis_name),
            "improvement": jnp.where(accepted, better, 0.0),
            "trust_kl": jnp.where(accepted, kl, 0.0),
            "halvings": halvings.astype(jnp.float32),
            "accepted": accepted.astype(jnp.float32),
            "policy_grad_norm": optax.tree.norm(gradient),
        }
        state = state.replace(params=lora.merge(others, theta))
        off = ratio_off(scores.logprobs, batch.old_logprobs, mask, axis_name)
        if parts.value_loss is None:
            bad = 1.0 - jnp.isfinite(optax.tree.norm(gradient)).astype(jnp.float32)
            none = {"stopped": jnp.zeros(()), "empty": jnp.zeros(()), "updates": jnp.ones(())}
            return state, metrics | {
                "first_ratio_off": off,
                "skipped": bad,
                "last_approx_kl": kl,
            } | none
        # The critic's own loss also scores the policy, which has moved by now: its
        # ratio is no disagreement.
        state, learned = critic(state, batch, key)
        return state, learned | metrics | {"first_ratio_off": off}

    return update


trpo = partial(make_natural_update, line_search=True)
npg = partial(make_natural_update, line_search=False)
