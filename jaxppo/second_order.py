"""Natural policy gradient (NPG) and TRPO for small models. They replace
`update.make_update` for the policy; the critic still learns by it.

    maximise g·x  subject to  ½ xᵀ F x ≤ δ     =>     x = √(2 δ / gᵀ F⁻¹ g) · F⁻¹ g

g is the gradient of the surrogate, δ is `trust_kl`, and F is the Fisher matrix: the
Hessian of the mean KL per token at the old policy, exact over the vocabulary, plus
`cg_damping` times the identity. F⁻¹ g comes from conjugate gradients on products F v.
NPG takes the full step (Kakade 2001, "A natural policy gradient"). TRPO halves it until
the KL is at most 1.5 δ and the surrogate improves (https://arxiv.org/abs/1502.05477,
appendix C), at most `backtracks` times. Use float32: products in bfloat16 are too
noisy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxppo import masked, optimizers, packing, policy
from jaxppo.config import Config
from jaxppo.losses import token
from jaxppo.models import lora
from jaxppo.types import Batch, Model, Parts, PyTree, Scalar, TrainState
from jaxppo.update import loss_constants, make_update, ratio_off

SLACK = 1.5  # most KL of the line search as a multiple of the bound, as in TRPO's code


def conjugate_gradient(
    product: Callable[[PyTree], PyTree], b: PyTree, *, iterations: int, tolerance: Scalar = 1e-10
) -> PyTree:
    """x with product(x) = b, for a symmetric positive definite product (Hestenes and
    Stiefel 1952), until the squared residual is below `tolerance`.

    >>> product = lambda v: jnp.array([2.0, 4.0]) * v
    >>> conjugate_gradient(product, jnp.array([2.0, 8.0]), iterations=2)
    Array([1., 2.], dtype=float32)
    """
    solve: Any = jax.scipy.sparse.linalg.cg
    return solve(product, b, tol=0.0, atol=tolerance**0.5, maxiter=iterations)[0]


def natural_step(
    gradient: PyTree,
    product: Callable[[PyTree], PyTree],
    *,
    bound: Scalar,
    iterations: int,
    damping: Scalar,
) -> PyTree:
    """√(2 δ / xᵀ (F + λ I) x) · x with x = (F + λ I)⁻¹ g; 0 for a gradient of 0."""
    damped = lambda v: jax.tree.map(lambda a, c: a + damping * c, product(v), v)
    x = conjugate_gradient(damped, gradient, iterations=iterations)
    curvature = jnp.asarray(optax.tree.vdot(x, damped(x)))
    positive = curvature > 0
    scale = jnp.where(positive, jnp.sqrt(2 * bound / jnp.where(positive, curvature, 1.0)), 0.0)
    return jax.tree.map(lambda a: scale * a, x)


def make_natural_update(
    model: Model,
    parts: Parts,
    config: Config,
    *,
    axis_name: str | None = None,
    stop_axis: str | None = None,
    line_search: bool,
) -> Callable:
    """update(state, batch, key) -> (state, metrics), like `update.make_update`: a
    natural-gradient step on the surrogate −r A, whatever `parts.policy_loss` is, then
    the critic's.
    """
    critic = make_update(
        model, parts, config, axis_name=axis_name, stop_axis=stop_axis, critic_alone=True
    )
    total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)

    def update(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict]:
        base, rolled, mask = loss_constants(state, parts, config).base, batch.rollout, batch.mask
        mine, others = lora.split(dict(state.params), lambda path: path[0] not in optimizers.CRITIC)
        whole = lambda theta: lora.merge(base, lora.merge(others, theta))
        old = whole(mine)
        weights = parts.aggregate(mask, axis_name=axis_name)
        tokens = jnp.maximum(masked.total(mask, mask, axis_name=axis_name), 1)

        axes = (axis_name, stop_axis)
        over_parts = packing.make_sum(
            model, config, rolled, mask, group_size=config.group_size, axes=axes
        )

        def gain(theta, part):
            found = policy.response_logprobs(
                model, whole(theta), rolled, config=config, with_values=False, part=part
            )
            own = packing.only(part, mask)
            loss, _ = token.kl_penalty(
                found.logprobs, batch.old_logprobs, batch.advantages, own, beta=0.0
            )
            return -(weights * masked.keep(loss, own)).sum(), found

        def divergence(theta, part):
            """KL(old ‖ theta), mean over all tokens; this device's share."""
            kl = policy.full_kl(model, old, whole(theta), rolled, config=config, part=part)
            return masked.total(kl, mask) / tokens

        def fisher(v):
            """F v by reverse mode twice: the kernels have no forward-mode rules."""
            slope = lambda theta, part: optax.tree.vdot(jax.grad(divergence)(theta, part), v)
            return total(over_parts(partial(jax.grad(slope), mine)))

        (before, found), gradient = over_parts(
            partial(jax.value_and_grad(gain, has_aux=True), mine)
        )
        before, gradient = total(before), total(gradient)
        step = natural_step(
            gradient,
            fisher,
            bound=config.trust_kl,
            iterations=config.cg_iterations,
            damping=config.cg_damping,
        )

        def attempt(halvings):
            theta = jax.tree.map(lambda p, s: p + 0.5**halvings * s, mine, step)
            better = over_parts(lambda part: gain(theta, part)[0])
            moved = over_parts(partial(divergence, theta))
            return halvings, theta, total(better) - before, total(moved)

        if line_search:
            limit = SLACK * config.trust_kl
            within = lambda better, kl: (better > 0) & (kl <= limit)  # false for NaN
            halvings, theta, better, kl = jax.lax.while_loop(
                lambda carry: (carry[0] < config.backtracks) & ~within(*carry[2:]),
                lambda carry: attempt(carry[0] + 1),
                attempt(jnp.zeros((), jnp.int32)),
            )
            accepted = within(better, kl)
        else:
            halvings, theta, better, kl = attempt(jnp.zeros((), jnp.int32))
            accepted = jnp.isfinite(better) & jnp.isfinite(kl)
        theta = jax.tree.map(lambda n, o: jnp.where(accepted, n, o), theta, mine)

        norm = optax.tree.norm(gradient)
        metrics = {
            "policy_loss": -before,
            "entropy": masked.mean(found.entropy, mask, axis_name=axis_name),
            "improvement": jnp.where(accepted, better, 0.0),
            "trust_kl": jnp.where(accepted, kl, 0.0),
            "halvings": halvings.astype(jnp.float32),
            "accepted": accepted.astype(jnp.float32),
            "policy_grad_norm": norm,
        }
        # The critic's update scores the policy again, after its step: its ratios do not
        # compare sampler and scorer.
        off = {"first_ratio_off": ratio_off(found.logprobs, batch.old_logprobs, mask, axis_name)}
        state = state.replace(params=lora.merge(others, theta))
        if parts.value_loss is not None:
            state, learned = critic(state, batch, key)
            return state, learned | metrics | off
        zero = jnp.zeros(())
        skipped = 1.0 - jnp.isfinite(norm).astype(jnp.float32)
        counts = {"skipped": skipped, "stopped": zero, "empty": zero, "updates": jnp.ones(())}
        return state, metrics | off | {"last_approx_kl": kl} | counts

    return update


trpo = partial(make_natural_update, line_search=True)
npg = partial(make_natural_update, line_search=False)
