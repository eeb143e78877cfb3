"""Repeat a step whose update was not finite, and find the operation that made the NaN.

A run is a function of its seed, so the state before any step can be computed again from
an earlier checkpoint.
"""

import traceback

import jax
from jax.experimental import checkify

from jaxppo import ppo
from jaxppo.config import RunConfig
from jaxppo.data.prompts import BatchSource, PromptSet
from jaxppo.errors import UserError
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.policy import Policy
from jaxppo.supervised import Objective
from jaxppo.types import Parts, TrainState


def diagnose(
    config: RunConfig,
    policy: Policy,
    parts: Parts | Objective,
    prompts: BatchSource,
    checkpoints: Checkpoints,
    like: TrainState,
    *,
    step: int,
) -> str:
    """Say in one line what made training step `step` (counted from 1) not finite.

    One device repeats the steps from the newest checkpoint before it, unless the stage
    is supervised. Raises UserError if there is none.
    """
    if isinstance(parts, Objective):
        return f"the update of step {step} is not finite; lower --lr"
    assert isinstance(prompts, PromptSet)
    checkpoints.wait()
    before = [number for number in checkpoints.steps() if number < step]
    if not before:
        raise UserError(
            f"no checkpoint from before step {step} is left to replay it from; lower --save-every"
        )
    state = checkpoints.restore(like, step=before[-1])
    train_step = ppo.make_train_step(policy.model, parts, config)
    plain = jax.jit(train_step)
    while int(state.step) < step - 1:
        state, _ = plain(state, jax.device_put(prompts.batch(config, int(state.cursor))))
    checked = jax.jit(checkify.checkify(train_step, errors=checkify.nan_checks))
    error, _ = checked(state, jax.device_put(prompts.batch(config, int(state.cursor))))
    return f"step {step}: {describe(error)}"


def describe(error: checkify.Error) -> str:
    """The operation of the first NaN, and the innermost line of code outside of
    libraries.
    """
    found = error.get_exception()
    if found is None:
        return (
            "no operation made a NaN: the values became infinite, or the device that trained "
            "computes differently"
        )
    frames = traceback.extract_tb(found.traceback_info.as_python_traceback())
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and frame.filename.endswith(".py")
    ]
    where = f", at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    return f"{str(error.get()).splitlines()[0].rstrip('. ')}{where}"
