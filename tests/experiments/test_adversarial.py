"""experiments/adversarial.py with a checkpoint whose texts begin with a token."""

import json

import jax
import pytest
import tokenizers
from runs import load_script, run_script

from jaxppo import models, pretrained
from jaxppo.data.examples import Example, Examples
from jaxppo.models.shapes import network
from jaxppo.pretrained.tiny import byte_tokenizer
from jaxppo.pretrained.tokenizer import Tokenizer, begin_with
from jaxppo.run import validation

START = 257
TEXTS = [f"film {i}" for i in range(20)]


@pytest.fixture
def model(tmp_path):
    """A checkpoint that puts <s> before a text."""
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer()._backend.to_str())
    backend.add_special_tokens(["<s>"])
    assert backend.token_to_id("<s>") == START
    backend.post_processor = begin_with({"<s>": START})
    shape = network("transformer", vocab_size=300)
    params = {
        name: x
        for name, x in jax.device_get(models.make(shape).init(jax.random.key(0))).items()
        if name != "value"
    }
    return pretrained.save(tmp_path / "model", shape, params, Tokenizer(backend, eos_id=256))


@pytest.mark.ci
def test_every_sentence_begins_with_the_start_of_the_checkpoint(model, tmp_path, monkeypatch):
    """The policy's prompt, the discriminator's real and sampled rows, and the test sentences."""
    script = load_script("adversarial")
    options = script.Adversarial(
        prompt_length=2, response_length=6, parallel="jit", judge_steps=1, batch_size=8
    )
    examples = Examples([], [], [Example("", text) for text in TEXTS])
    game = script.Game(options, tmp_path, model, examples)
    begin = [START, *game.policy.tokenizer.encode("\n")]
    assert len(begin) == 2 and game.prompts(3).tokens.tolist() == [begin] * 3
    state = game.initial_state()
    data, _ = game.real_and_sampled(TEXTS[:4], state, seed=0)
    assert all(tokens[mask][:2].tolist() == begin for tokens, mask in zip(data.tokens, data.mask))
    seen = []
    found = {"accuracy": 0.0, "perplexity": 0.0}
    keep = lambda config, policy, objective, data: seen.append(data) or (lambda state: found)
    monkeypatch.setattr(validation, "make_validation", keep)
    monkeypatch.setattr(game, "train_discriminator", lambda *args, **named: state)
    game.evaluate("judge", state)
    assert all(
        tokens[mask][:2].tolist() == begin
        for data in seen
        for tokens, mask in zip(data.tokens, data.mask)
    )


def test_a_prompt_without_room_is_found_before_anything_is_trained(model, tmp_path, capsys):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with pytest.raises(SystemExit) as stop:
        run_script(
            "adversarial", "--model", str(model), "--data", str(data), "--runs", str(tmp_path)
        )
    assert stop.value.code == 2
    assert "leaves no room for a prompt; use at least 2" in capsys.readouterr().err
    assert not (tmp_path / "adversarial").exists()
