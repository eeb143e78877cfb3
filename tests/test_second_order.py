from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import SETTINGS

from jaxppo import policy, ppo, second_order
from jaxppo.types import Batch

pytestmark = pytest.mark.ci

KEY = jax.random.key(3)
TRPO = replace(
    SETTINGS,
    update="trpo",
    trust_kl=0.01,
    cg_damping=1e-3,
    cg_iterations=10,
    value_loss="mse",
    loss="reinforce",
)


def spd(n=4, seed=0):
    root = np.random.default_rng(seed).standard_normal((n, n))
    return jnp.asarray(root @ root.T + 0.5 * np.eye(n), jnp.float32)


def test_conjugate_gradient_solves_in_as_many_steps_as_dimensions():
    matrix, b = spd(), jnp.array([1.0, -2.0, 0.5, 3.0])
    x = second_order.conjugate_gradient(lambda v: matrix @ v, b, iterations=4, tolerance=0.0)
    np.testing.assert_allclose(x, jnp.linalg.solve(matrix, b), rtol=1e-3)


def test_conjugate_gradient_works_on_trees_and_stops():
    """2 I: one step is exact, and further steps change nothing (no NaN)."""
    b = {"a": jnp.array([2.0, 4.0]), "b": jnp.array(6.0)}
    x = second_order.conjugate_gradient(
        lambda v: jax.tree.map(lambda a: 2 * a, v), b, iterations=20
    )
    toys.assert_close(x, {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}, rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, b)
    toys.assert_same(second_order.conjugate_gradient(lambda v: v, zero, iterations=3), zero)


def test_the_natural_step_has_the_length_of_the_bound():
    """½ xᵀ (F + λ I) x = δ, and its direction is (F + λ I)⁻¹ g."""
    fisher, g = spd(), jnp.array([1.0, 2.0, 3.0, 4.0])
    x = second_order.natural_step(g, lambda v: fisher @ v, bound=0.02, iterations=8, damping=0.1)
    damped = fisher + 0.1 * jnp.eye(4)
    assert float(x @ damped @ x) / 2 == pytest.approx(0.02, rel=1e-3)
    direction = jnp.linalg.solve(damped, g)
    np.testing.assert_allclose(
        x / jnp.linalg.norm(x), direction / jnp.linalg.norm(direction), rtol=1e-3
    )
    assert not second_order.natural_step(
        jnp.zeros(4), lambda v: v, bound=0.1, iterations=3, damping=0.1
    ).any()


@pytest.fixture(scope="module")
def subject(llama):
    rolled = toys.roll(llama, toys.prompts())
    rng = np.random.default_rng(0)
    random = lambda: jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    batch = Batch(rolled, rolled.mask, rolled.logprobs, random(), rolled.values + random())
    return ppo.init_state(
        TRPO, llama.params, {"base": {}, "reference": None, "reward": {}}, jax.random.key(0)
    ), batch


@cache
def program(model, settings):
    make = second_order.trpo if settings.update == "trpo" else second_order.npg
    return jax.jit(make(model, toys.parts(settings), settings))


def updated(llama, subject, settings):
    return program(llama.model, settings)(*subject, KEY)


def kl_from(llama, subject, params):
    rolled, mask = subject[1].rollout, subject[1].mask
    kl = policy.full_kl(llama.model, llama.params, params, rolled, config=TRPO)
    return float((kl * mask).sum() / mask.sum())


def test_trpo_improves_within_its_bound(llama, subject):
    new, metrics = updated(llama, subject, TRPO)
    assert float(metrics["accepted"]) == 1
    assert float(metrics["improvement"]) > 0
    # the critic learns after the policy's step and does not change the policy
    kl = kl_from(llama, subject, new.params)
    assert kl == pytest.approx(float(metrics["trust_kl"]), rel=1e-3)
    assert 0.001 < kl <= 1.5 * 0.01
    assert (new.params["value"]["kernel"] != llama.params["value"]["kernel"]).any()
    assert all(np.isfinite(x) for x in metrics.values())


@pytest.mark.slow
def test_a_small_step_has_about_the_kl_predicted_by_the_fisher_matrix(llama, subject):
    """Without damping, ½ xᵀ F x = δ is the KL itself up to the third order."""
    settings = replace(
        TRPO, update="npg", trust_kl=1e-4, cg_damping=1e-6, cg_iterations=20, value_loss="none"
    )
    new, metrics = updated(llama, subject, settings)
    assert kl_from(llama, subject, new.params) == pytest.approx(1e-4, rel=0.1)
    assert float(metrics["halvings"]) == 0


def test_an_update_that_cannot_improve_changes_nothing(llama, subject):
    state, batch = subject
    settings = replace(TRPO, value_loss="none")
    for bad in (jnp.zeros((8, 5)), jnp.full((8, 5), jnp.nan)):
        new, metrics = updated(llama, (state, batch.replace(advantages=bad)), settings)
        toys.assert_same(new.params, state.params)
        assert float(metrics["accepted"]) == 0
        # only a step that is not finite counts as skipped
        assert float(metrics["skipped"]) == np.isnan(bad).any()


def test_without_a_line_search_a_step_that_is_not_finite_changes_nothing(llama, subject):
    state, batch = subject
    bad = (state, batch.replace(advantages=jnp.full((8, 5), jnp.nan)))
    new, metrics = updated(llama, bad, replace(TRPO, update="npg", value_loss="none"))
    toys.assert_same(new.params, state.params)
    assert (float(metrics["accepted"]), float(metrics["skipped"])) == (0, 1)


@pytest.mark.slow
def test_the_step_is_halved_until_the_bound_holds(llama, subject):
    """A bound so wide that the quadratic model is wrong."""
    settings = replace(TRPO, trust_kl=0.5, value_loss="none")
    _, metrics = updated(llama, subject, settings)
    assert float(metrics["accepted"]) == 1
    assert float(metrics["trust_kl"]) <= 0.75
    free = updated(llama, subject, replace(settings, update="npg"))[1]
    assert float(metrics["halvings"]) > 0 or float(free["trust_kl"]) <= 0.75


@pytest.mark.slow  # test_presets.py has trpo and npg under pmap
def test_two_devices_equal_one(llama, subject):
    state, batch = subject
    settings = replace(TRPO, value_loss="none", cg_iterations=4)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    parts = toys.parts(settings)
    run = second_order.trpo(llama.model, parts, settings, axis_name="devices")
    two, metrics = jax.jit(jax.vmap(lambda b: run(state, b, KEY), axis_name="devices"))(halves)
    one, want = updated(llama, subject, settings)
    for d in range(2):
        toys.assert_close(jax.tree.map(lambda x: x[d], two.params), one.params, atol=1e-4)
        assert float(metrics["trust_kl"][d]) == pytest.approx(float(want["trust_kl"]), rel=1e-2)
