"""A run small enough for every test, and its prompts."""

from jaxppo.config import RunConfig

RUN = RunConfig(
    tiny=True,
    batch_size=4,
    prompt_length=4,
    response_length=3,
    minibatches=2,
    steps=4,
    save_every=2,
    eval_every=3,
    lora=2,
    lr=1e-2,
    parallel="jit",
)
TEXTS = ["one", "two", "four", "x", "seven", "it", "ab"]
