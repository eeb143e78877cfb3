from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from runs import RUN

from jaxppo import errors, models, ppo, pretrained
from jaxppo.errors import UserError
from jaxppo.models import lora
from jaxppo.pretrained.tiny import tiny_model
from jaxppo.run import load
from jaxppo.run.checkpoint import Checkpoints


def test_an_unknown_model():
    with pytest.raises(UserError) as caught:
        load.load_policy(replace(RUN, tiny=False, model="./no/such/folder"))
    assert isinstance(caught.value, errors.PretrainedError)
    assert "no/such/folder" in str(caught.value)


@pytest.mark.ci
def test_a_value_head_from_a_reward_model():
    config = replace(RUN, value_init="reward")
    with pytest.raises(UserError, match="--value-init reward needs a --reward-model RUN"):
        load.load_policy(config)
    _, plain = load.load_policy(RUN)
    model = {"value": jax.tree.map(lambda x: x + 3.0, plain.params["value"])}
    _, policy = load.load_policy(config, reward=model)
    toys.assert_same(policy.params["value"], model["value"])


def test_a_network_of_another_kind():
    _, policy = load.load_policy(replace(RUN, model_kind="gru", lora=0))
    assert policy.shape.kind == "gru" and "recurrent" in policy.params["body"]["layers_0"]
    with pytest.raises(UserError, match="a gru policy has no adapters: use --lora 0"):
        load.load_policy(replace(RUN, model_kind="gru"))


def test_a_checkpoint_is_of_one_kind_and_may_have_dropout(tmp_path):
    """Another kind is refused, not passed over; the folder is written anew when the weights are
    others.
    """
    config, policy = load.load_policy(replace(RUN, model_kind="gru", lora=0))
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    for change in (0.0, 1.0):
        moved = state.replace(
            params=jax.tree.map(lambda x, change=change: x + change, state.params)
        )
        load.save_model(config, policy, moved, tmp_path / "model")
    stored = replace(RUN, model=str(tmp_path / "model"), tiny=False, lora=0)
    _, again = load.load_policy(stored, dropout=0.5)
    assert again.shape == replace(policy.shape, dropout=0.5)
    toys.assert_close(again.params["embed"], moved.params["embed"], atol=1e-6)
    with pytest.raises(UserError, match="--model-kind lstm: .* is a gru; train another"):
        load.load_policy(replace(stored, model_kind="lstm"))


@pytest.mark.ci
def test_the_trained_network_as_a_checkpoint():
    """Adapters folded in, layers unrolled, no critic: the same logits, and what a plain model
    takes.
    """
    for changes in ({}, {"scan_layers": True}, {"lora": 0, "critic": "separate"}):
        config, policy = load.load_policy(replace(RUN, **changes))
        params = jax.tree.map(lambda x: x + 0.01, policy.params)
        state = ppo.init_state(config, params, policy.frozen, jax.random.key(0))
        whole = load.export_params(config, policy, state)
        flat = pretrained.mapping.check_params(
            policy.shape, pretrained.mapping.flatten(jax.device_get(whole))
        )
        assert "head/kernel" not in flat and not any(
            "lora" in name or "value" in name for name in flat
        )
        tokens = jnp.array([[1, 2, 3]])
        plain = models.make(policy.shape)
        got, _ = plain.apply(whole, tokens, tokens > 0)
        want, _ = policy.model.apply(
            lora.merge(policy.frozen["base"], state.params), tokens, tokens > 0
        )
        np.testing.assert_allclose(got, want[..., : got.shape[-1]], atol=1e-4)


@pytest.mark.ci
def test_an_export_of_a_bfloat16_run_has_the_base_as_it_was_stored():
    config, policy = load.load_policy(replace(RUN, dtype="bfloat16"))
    assert policy.frozen["base"]["embed"]["embedding"].dtype == jnp.bfloat16
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    whole = load.export_params(config, policy, state)  # new adapters change nothing
    _, stored, _ = tiny_model(config.seed, config.model_kind)
    stored = {name: x for name, x in stored.items() if name != "value"}
    toys.assert_same(whole, stored)


@pytest.mark.ci
def test_an_export_of_a_run_in_8_bits_has_the_base_as_it_was_stored(loaded):
    config, policy = load.load_policy(replace(RUN, base_dtype="int8"))
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    whole = load.export_params(config, policy, state)
    toys.assert_same(whole, load.export_params(*loaded, state))
    with pytest.raises(UserError, match="a gru policy has no --base-dtype int8: leave it out"):
        load.load_policy(replace(RUN, base_dtype="int8", model_kind="gru", lora=0))


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch, capsys, mode):
    """Who can put a program there can run code in this process."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAXPPO_CACHE", str(tmp_path / "cache"))
    chosen = []
    monkeypatch.setattr(load.jax.config, "update", lambda name, value: chosen.append(value))
    if mode != 0o700:
        (tmp_path / "cache" / "xla").mkdir(parents=True)
        (tmp_path / "cache" / "xla").chmod(mode)
    load.use_compilation_cache()
    folder = tmp_path.resolve() / "cache" / "xla"
    assert chosen == ([str(folder)] if mode == 0o700 else [])
    assert ("others can write to" in capsys.readouterr().out) == (mode != 0o700)
    assert folder.stat().st_mode & 0o777 == mode


def test_which_checkpoint(tmp_path):
    """Steps 10 and 20 have the scores 2 and 1; 0 has none."""
    steps = {0: None, 10: 2.0, 20: 1.0}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_every=10)
    toy = toys.llama()
    for step, score in steps.items():
        checkpoints.save(toys.state(toy).replace(step=jnp.int32(step)), score=score)
    checkpoints.close()
    found = lambda which: load.checkpoint_step(checkpoints, which)
    assert [found(x) for x in ("best", "newest", "0", 10, "20")] == [10, None, 0, 10, 20]
    with pytest.raises(UserError, match="--checkpoint 15: there is no such step; .* 0, 10, 20$"):
        found(15)
    with pytest.raises(UserError, match="--checkpoint last"):
        found("last")
    assert load.checkpoint_step(Checkpoints(tmp_path / "none"), "3") is None


def test_a_policy_of_dpo_is_no_reward_model(tmp_path):
    (tmp_path / "config.json").write_text('{"dpo": true}')
    with pytest.raises(UserError, match="that run has no value head"):
        load.reward_run(replace(RUN, reward_model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert load.reward_run(replace(RUN, reward_model=str(tmp_path))) == tmp_path
