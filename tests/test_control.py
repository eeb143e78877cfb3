from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from toys import SETTINGS

from jaxppo import algorithms, control
from jaxppo.config import Config


@pytest.mark.ci
def test_invalid_rows_are_not_in_the_measured_kl(llama):
    """Row n has n nats; row 7 is not valid, row 6 has no tokens: (0 + ... + 5) / 6 = 2.5."""
    rolled = toys.roll(llama, toys.prompts())
    mask = jnp.zeros((8, 5)).at[:, 0].set(1.0).at[6].set(0.0)
    nats = jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 5))
    rolled = rolled.replace(raw_logprobs=rolled.ref_logprobs + nats, mask=mask)
    config, metrics = replace(SETTINGS, kl_adaptive=True), {"last_approx_kl": jnp.float32(0)}
    state = toys.state(llama, config)
    kl, rows, _ = control.control(
        state, rolled, jnp.arange(8) < 7, metrics, toys.parts(config), config, None
    )
    assert (float(kl), float(rows)) == (pytest.approx(2.5), 8)


def test_the_coefficient_stays_when_it_is_not_adaptive():
    assert float(
        control.next_coef(jnp.float32(0.3), jnp.float32(9), 8, replace(SETTINGS, kl_adaptive=False))
    ) == pytest.approx(0.3)


def test_ppos_rules_for_coefficients():
    """Doubled above 1.5 targets, halved below 2/3 of it."""
    settings = Config(kl_rule="ppo", kl_target=1.0)
    after = lambda measured: float(
        control.next_coef(jnp.float32(0.2), jnp.float32(measured), 8, settings)
    )
    assert [after(x) for x in (0.5, 1.0, 1.6, np.nan)] == pytest.approx([0.1, 0.2, 0.4, 0.2])
    settings = Config(loss="kl_penalty", beta_target=0.01)
    parts = algorithms.make_parts(settings, toys.count_token(3))
    steered = lambda measured, settings=settings: float(
        control.next_beta(jnp.float32(2.0), jnp.float32(measured), parts, settings)
    )
    assert [steered(x) for x in (0.001, 0.01, 0.02, np.inf)] == [1.0, 2.0, 4.0, 2.0]
    assert steered(0.02, replace(settings, beta_target=0.0)) == 2.0
