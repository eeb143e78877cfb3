import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax.traverse_util import flatten_dict
from runs import RUN
from tokenizers import Tokenizer as Backend

from jaxppo import algorithms, models, ppo, pretrained
from jaxppo.config import RunConfig
from jaxppo.data.prompts import encode
from jaxppo.errors import UserError
from jaxppo.models import scan
from jaxppo.parallel import sharding
from jaxppo.pretrained.tiny import byte_tokenizer, tiny_model
from jaxppo.pretrained.tokenizer import Tokenizer, begin_with
from jaxppo.rewards.in_program import count_token
from jaxppo.run import load, resume, sampler, start
from jaxppo.run.policy import own_start
from jaxppo.run.settings import read_config, to_dict


def test_with_adapters_the_base_is_the_reference(loaded):
    config, policy = loaded
    assert (config.eos, config.pad) == (256, 256)
    assert policy.frozen["reference"] is None
    names = {
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(policy.params)
    }
    assert names and all("lora" in name or "value" in name for name in names)
    assert not any(
        "lora" in str(path) or "value" in str(path[0])
        for path in flatten_dict(policy.frozen["base"])
    )


def test_without_adapters_everything_is_trained_and_the_reference_is_a_copy():
    _, policy = load.load_policy(replace(RUN, lora=0))
    reference = policy.frozen["reference"]
    trained = flatten_dict(policy.params)
    for path, leaf in flatten_dict(reference).items():
        np.testing.assert_array_equal(trained[path], leaf)
        assert (
            trained[path].unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
        )  # one is donated, the other stays
    assert set(trained) - {path for path in flatten_dict(reference)} == {
        ("value", "kernel"),
        ("value", "bias"),
    }


def test_scanned_layers_are_the_same_weights(loaded):
    """The base of a scanned policy is that of an unrolled one, stacked; adapters and critic are
    stacked too.
    """
    _, policy = load.load_policy(replace(RUN, scan_layers=True))
    toys.assert_same(scan.unstack_layers(policy.frozen["base"]), loaded[1].frozen["base"])
    number = sum(name.startswith("layers_") for name in loaded[1].frozen["base"])
    assert all(x.shape[0] == number for x in jax.tree.leaves(policy.params["layers"]))
    _, separate = load.load_policy(replace(RUN, scan_layers=True, lora=0, critic="separate"))
    assert "layers" in separate.params["critic"] and "layers_0" not in separate.params["critic"]


def test_more_tokens_than_the_model_takes():
    with pytest.raises(
        UserError, match=r"200 \+ --response-length 100 = 300 tokens, but the model takes 256"
    ):
        load.load_policy(replace(RUN, prompt_length=200, response_length=100))


def test_a_separate_critic_shares_the_base_under_adapters():
    _, policy = load.load_policy(replace(RUN, critic="separate", value_init="normal"))
    base = policy.frozen["base"]
    place = lambda x: x["embed"]["embedding"].unsafe_buffer_pointer()
    assert place(base["critic"]) == place(base)  # one copy in memory
    assert (policy.params["critic"]["value"]["kernel"] != 0).any()
    assert "value" not in policy.params  # nobody asks the actor


def test_a_tokenizer_that_does_not_fit_the_model(monkeypatch):
    shape, weights, tokenizer = tiny_model(0)
    monkeypatch.setattr(
        load, "tiny_model", lambda seed, kind: (replace(shape, vocab_size=200), weights, tokenizer)
    )
    with pytest.raises(
        UserError,
        match="the tokenizer has ids up to 256, but the model's vocabulary has 200; use its own",
    ):
        load.load_policy(RUN)


@pytest.mark.ci
@pytest.mark.parametrize("changes", [{}, {"scan_layers": True}, {"lora": 0}])
def test_frozen_weights_in_8_bits(loaded, changes):
    """The base below adapters, of a separate critic, too, or the reference; not what is trained."""
    config, policy = load.load_policy(
        replace(RUN, base_dtype="int8", critic="separate", dtype="bfloat16", **changes)
    )
    frozen = policy.frozen["base" if config.lora else "reference"]
    flat = flatten_dict(frozen, sep="/")
    kernels = {x.dtype for name, x in flat.items() if name.endswith("kernel")}
    assert kernels == {jnp.dtype("int8")}
    assert {x.dtype for name, x in flat.items() if name.endswith("scale")} == {jnp.dtype("float32")}
    assert flat["embed/embedding"].dtype == ("bfloat16" if config.lora else "float32")
    assert ("critic" in frozen) == bool(config.lora)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(policy.params))


def test_stop_texts_have_their_table_among_the_frozen_weights(loaded):
    assert "stop" not in loaded[1].frozen
    config, policy = load.load_policy(replace(RUN, stop=("\n",)))
    stops = policy.frozen["stop"]
    assert config.stop == ("\n",) and stops.column.shape == (policy.shape.vocab_size,)
    (ending,) = policy.tokenizer.encode("\n")
    assert np.flatnonzero(stops.ends[0, stops.column]).tolist() == [ending]
    mesh = sharding.make_mesh("data=8")
    _, placed = load.load_policy(replace(RUN, stop=("\n",)), mesh=mesh)
    assert sharding.mesh_of(placed.frozen["stop"]) == mesh


def checkpoint(place, *, rows=0, ends=("<end>",), start=()):
    """A folder with a model whose tokenizer has these ends of text, puts `start` before a text,
    and is smaller than its embedding by `rows`.
    """
    own = byte_tokenizer()
    backend = Backend.from_str(own._backend.to_str())
    backend.add_special_tokens([*ends, *start])
    if start:
        backend.post_processor = begin_with({x: backend.token_to_id(x) for x in start})
    made = Tokenizer(backend, eos_id=[backend.token_to_id(x) for x in ends])
    shape = toys.llama().config
    shape = replace(shape, vocab_size=made.vocab_size + rows, max_length=64)
    params = jax.device_get(toys.random_params(models.make(shape)))
    params.pop("value")
    return pretrained.save(place, shape, params, made)


def with_model(place, **changes):
    return load.load_policy(replace(RUN, tiny=False, model=str(place), **changes))


def test_all_ends_of_text_are_in_the_settings(tmp_path):
    config, policy = with_model(checkpoint(tmp_path / "m", ends=("<end>", "<turn>")))
    assert config.eos == policy.tokenizer.eos_ids == (257, 258)
    assert with_model(tmp_path / "m", name="again")[0] == replace(config, name="again")


@pytest.mark.ci
def test_padding_rows_are_never_sampled(tmp_path):
    """Half of the rows have no token."""
    config, policy = with_model(checkpoint(tmp_path / "m", rows=258), response_length=16)
    state = ppo.init_state(config, policy.params, policy.frozen, jax.random.key(0))
    prompts = encode(["ab"] * 8, policy.tokenizer, 4)
    done = sampler.Sampler(config, policy, rows=8)(state, prompts, seed=0)
    assert max(max(sample.tokens) for sample in done) < 258


@pytest.mark.ci
@pytest.mark.parametrize(
    ("before", "prompt_start", "expected"),
    [
        ((), False, ()),
        ((), True, (256,)),  # <|endoftext|>
        (("<s>",), False, (258,)),
        (("<s>",), True, (258,)),  # not another token
        (("<s>", "<b>"), False, (258, 259)),
    ],
)
def test_prompts_begin_as_the_tokenizer_begins_a_text(tmp_path, before, prompt_start, expected):
    place = checkpoint(tmp_path / "m", start=before)
    config, policy = with_model(place, prompt_start=prompt_start)
    assert config.start == expected
    assert own_start(config, policy.tokenizer) == policy.tokenizer.start_ids


def test_a_run_says_what_begins_and_ends_its_texts(tmp_path, capsys):
    place = checkpoint(tmp_path / "m", ends=("<end>", "<turn>"), start=("<s>",))
    for config, policy in (with_model(place), load.load_policy(RUN)):
        start.build_step(config, policy, algorithms.make_parts(config, count_token(3)))
    said = [line for line in capsys.readouterr().out.splitlines() if "algorithm" not in line]
    assert said == [
        "prompts begin with '<s>', unless they are chats",
        "responses end with any of '<end>', '<turn>'",
    ]


@pytest.mark.ci
@pytest.mark.parametrize(("prompt_start", "expected"), [(False, ()), (True, (256,))])
def test_a_run_from_before_keeps_its_tokens(tmp_path, prompt_start, expected):
    """Its config.json has one end of text and no `start`; sampling and resuming leave it so."""
    place = checkpoint(tmp_path / "m", ends=("<end>", "<turn>"), start=("<s>",))
    changes = {"prompt_start": prompt_start, "name": "old", "runs": str(tmp_path)}
    now, policy = with_model(place, **changes)
    assert (now.eos, now.start) == ((257, 258), (259,))
    stored = to_dict(replace(now, eos=257))
    del stored["start"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(stored))
    old = read_config(RunConfig, tmp_path / "old" / "config.json")
    for config in (old, replace(RUN, tiny=False, model=str(place), resume=True, **changes)):
        found, policy = load.load_policy(config)
        assert (found.eos, found.start) == (257, expected)
        assert own_start(found, policy.tokenizer) == ()
    resume.check_settings(found, tmp_path / "old")
