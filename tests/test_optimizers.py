from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxppo import optimizers
from jaxppo.config import Config
from jaxppo.errors import UserError


def steps(config, grads, n):
    """The changes of n updates with the same gradients."""
    optimizer = optimizers.make_optimizer(config)
    state, out = optimizer.init(grads), []
    for _ in range(n):
        changes, state = optimizer.update(grads, state)
        out.append(jax.tree.map(float, changes))
    return out


GRADS = {"a": jnp.float32(3.0), "b": jnp.float32(4.0)}


def test_clipping_by_the_global_norm_then_adam():
    config = Config(lr=0.1, max_grad_norm=1.0, adam_eps=0.5, lr_schedule="constant")
    # The norm of (3, 4) is 5, so (.6, .8). Adam's first step divides by its own size plus eps: .1 ·
    # .6 / 1.1 and .1 · .8 / 1.3
    for change in steps(config, GRADS, 2):  # with constant gradients each step is like the first
        assert change == pytest.approx({"a": -0.0545454, "b": -0.0615385}, rel=1e-4)


def test_a_small_gradient_is_not_scaled_up():
    config = Config(lr=0.1, max_grad_norm=10.0, adam_eps=2.0, lr_schedule="constant")
    # .1 · 3 / 5, .1 · 4 / 6
    assert steps(config, GRADS, 1)[0] == pytest.approx({"a": -0.06, "b": -0.4 / 6}, rel=1e-4)


@pytest.mark.parametrize("most", [0.0, float("inf")])
def test_no_clipping(most):
    """Of a gradient of 300 SGD subtracts .1 x 300 = 30."""
    config = Config(lr=0.1, optimizer="sgd", max_grad_norm=most, lr_schedule="constant")
    assert steps(config, {"a": jnp.float32(300.0)}, 1)[0] == pytest.approx({"a": -30.0})


def test_adam_eps_is_1e_5_by_default():
    """A gradient of 1e-5 moves by half the rate: g / (g + 1e-5)."""
    change = steps(Config(lr=0.1, lr_schedule="constant"), {"a": jnp.float32(1e-5)}, 1)[0]
    assert change["a"] == pytest.approx(-0.05, rel=1e-3)


def test_linear_decay_reaches_0():
    config = Config(lr=0.1, steps=2, epochs=1, minibatches=2)  # 4 updates
    sizes = [-change["a"] for change in steps(config, {"a": jnp.float32(1.0)}, 6)]
    assert sizes == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.0], rel=1e-3)


def test_sgd_is_gradient_ascent_on_the_return():
    """The change is −rate · gradient of the loss, and the loss is minus the return."""
    config = Config(lr=0.1, optimizer="sgd", max_grad_norm=1e9, lr_schedule="constant")
    assert steps(config, GRADS, 2)[1] == pytest.approx({"a": -0.3, "b": -0.4})


def test_rmsprop():
    """v = .01 · 9 after the first step, so −.1 · 3 / (.3 + eps)."""
    config = Config(
        lr=0.1, optimizer="rmsprop", max_grad_norm=1e9, lr_schedule="constant", adam_eps=1e-8
    )
    assert steps(config, GRADS, 1)[0]["a"] == pytest.approx(-1.0, rel=1e-4)


def test_adamw_decays_by_rate_times_decay_times_weight():
    config = Config(
        lr=0.1,
        optimizer="adamw",
        weight_decay=0.5,
        max_grad_norm=1e9,
        lr_schedule="constant",
        adam_eps=1e-12,
    )
    optimizer, params = optimizers.make_optimizer(config), {"a": jnp.float32(2.0)}
    change, _ = optimizer.update({"a": jnp.float32(3.0)}, optimizer.init(params), params)
    assert float(change["a"]) == pytest.approx(-0.1 * (1 + 0.5 * 2.0), rel=1e-5)


def rates(config, n):
    """The learning rates of n updates."""
    return [
        -x["a"]
        for x in steps(
            replace(config, optimizer="sgd", max_grad_norm=1e9), {"a": jnp.float32(1.0)}, n
        )
    ]


def test_cosine_goes_through_half_to_0():
    config = Config(lr=0.1, lr_schedule="cosine", steps=4, epochs=1, minibatches=1)
    # .05 (1 + cos(π k / 4)): cos 0 = 1, cos 45° = .7071
    assert rates(config, 6) == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "after"),
    [("constant", [0.1, 0.1]), ("linear", [0.1, 0.075]), ("cosine", [0.1, 0.0853553])],
)
def test_warm_up_rises_then_the_schedule_starts(kind, after):
    """One step of warm-up is 2 updates: .05, .1; then the schedule over the other 4."""
    config = Config(lr=0.1, lr_schedule=kind, steps=3, epochs=1, minibatches=2, lr_warmup=1)
    assert rates(config, 4) == pytest.approx([0.05, 0.1, *after], abs=1e-6)
    two_epochs = replace(config, epochs=2, minibatches=1)  # as many updates
    assert rates(two_epochs, 4) == pytest.approx([0.05, 0.1, *after], abs=1e-6)


def test_the_critic_may_have_its_own_learning_rate():
    config = Config(
        lr=0.1, critic_lr=0.01, optimizer="sgd", max_grad_norm=1e9, lr_schedule="constant"
    )
    one = {"kernel": jnp.float32(1.0)}
    grads = {"embed": one, "value": one, "critic": {"embed": one}}
    change = steps(config, grads, 1)[0]
    assert change["embed"]["kernel"] == pytest.approx(-0.1)
    assert change["value"]["kernel"] == change["critic"]["embed"]["kernel"] == pytest.approx(-0.01)


def test_a_separate_critic_is_clipped_separately():
    """Policy (3, 4) has norm 5, its critic 100: (.6, .8) and 1; with one norm for both the policy
    would get .03 and .04.
    """
    config = Config(lr=0.1, optimizer="sgd", critic="separate", lr_schedule="constant")
    grads = {"a": jnp.float32(3.0), "b": jnp.float32(4.0), "critic": jnp.float32(100.0)}
    assert steps(config, grads, 1)[0] == pytest.approx({"a": -0.06, "b": -0.08, "critic": -0.1})
    assert steps(replace(config, critic_lr=0.5), grads, 1)[0] == pytest.approx(
        {"a": -0.06, "b": -0.08, "critic": -0.5}
    )
    # a value head on the policy's trunk is clipped together with it
    shared = {"a": jnp.float32(3.0), "value": jnp.float32(4.0)}
    assert steps(replace(config, critic="shared"), shared, 1)[0] == pytest.approx(
        {"a": -0.06, "value": -0.08}
    )
    # and so is one with a rate of its own: .8 · .5
    own_rate = replace(config, critic="shared", critic_lr=0.5)
    assert steps(own_rate, shared, 1)[0] == pytest.approx({"a": -0.06, "value": -0.4})


def test_a_traced_rate_works():
    """A sweep puts tracers into the settings."""

    def change(rate, kind):
        config = Config(
            lr=rate,
            lr_schedule=kind,
            steps=2,
            minibatches=1,
            max_grad_norm=1e9,
            optimizer="sgd",
            lr_warmup=1,
        )
        optimizer = optimizers.make_optimizer(config)
        grads = {"a": jnp.float32(1.0)}
        return optimizer.update(grads, optimizer.init(grads))[0]["a"]

    for kind in ("constant", "linear", "cosine"):
        got = jax.vmap(lambda rate, kind=kind: change(rate, kind))(jnp.array([0.1, 0.2]))
        np.testing.assert_allclose(got, [-0.1, -0.2], rtol=1e-5)


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="'lion': choose one of adam, adamw, rmsprop, sgd"):
        optimizers.make_optimizer(Config(optimizer="lion"))


def test_zero_policy_keeps_the_critic():
    tree = {"embed": jnp.ones(2), "value": {"kernel": jnp.ones(2)}}
    on, off = (optimizers.zero_policy(tree, jnp.asarray(x)) for x in (True, False))
    assert not on["embed"].any() and on["value"]["kernel"].all()
    assert off["embed"].all()
