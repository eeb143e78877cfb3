from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from jaxppo.commands.chat import decode_stream
from jaxppo.data.prompts import PromptSet
from jaxppo.pretrained.tokenizer import Tokenizer
from jaxppo.run import sampler
from jaxppo.types import Rollout


@pytest.mark.ci
def test_sampler_takes_any_number_of_prompts(read, moved, prompts):
    seven = read(moved, prompts, seed=0)
    assert [sample.prompt for sample in seven] == ["one", "two", "four", "x", "even", "it", "ab"]
    assert all(1 <= len(sample.tokens) <= 3 for sample in seven)
    five = read(moved, PromptSet(prompts.tokens[:5], prompts.mask[:5]), seed=0)
    assert five == seven[:5]  # what fills up the last part changes nothing
    assert read(moved, prompts, seed=0) == seven
    assert read(moved, prompts, seed=1) != seven


def test_kl_of_samples_is_to_the_base(read, moved, prompts, loaded):
    assert any(abs(sample.kl) > 1e-4 for sample in read(moved, prompts, seed=0))
    fresh = moved.replace(params=loaded[1].params)  # adapters as they were made: nothing added
    assert all(abs(sample.kl) < 1e-4 for sample in read(fresh, prompts, seed=0))


def test_parts_come_one_after_the_other(read, moved, prompts):
    parts = list(read.batches(moved, prompts, seed=0))
    assert [len(part) for part in parts] == [4, 3]
    assert [sample for part in parts for sample in part] == read(moved, prompts, seed=0)


def test_a_response_keeps_the_space_that_its_prompt_goes_on_with(loaded):
    """SentencePiece's decoder drops the first space of a text."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({"▁the": 0, "▁film": 1, "▁is": 2, "</s>": 3}, unk_token="</s>")
    )
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    config, policy = loaded
    policy = replace(policy, tokenizer=Tokenizer(backend, eos_id=3))
    done = Rollout(
        tokens=np.array([[0, 1, 2, 3]]),
        attend=np.ones((1, 4), bool),
        mask=np.ones((1, 2)),
        finished=np.array([True]),
        **dict.fromkeys(("logprobs", "raw_logprobs", "ref_logprobs", "values"), np.zeros((1, 2))),
    )
    (found,) = sampler.Sampler(config, policy)._texts(done)
    assert (found.prompt, found.response) == ("the film", " is")
    stream = decode_stream(policy.tokenizer, [2, 1, 3], [0, 1])
    assert list(stream) == [" is", " film"]
