"""A step that was not finite, done again with every operation checked: which of them
made the first NaN, and where.

A run is a function of its seed, so the state before any step can be had again from the
checkpoint before it; no state has to be kept for the case that something goes wrong.
"""

import traceback

import jax
from jax.experimental import checkify

from jaxppo import ppo
from jaxppo.config import RunConfig
from jaxppo.data.prompts import PromptSet
from jaxppo.errors import UserError
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.load import Policy
from jaxppo.types import Parts, TrainState


def diagnose(
    config: RunConfig,
    policy: Policy,
    parts: Parts,
    prompts: PromptSet,
    checkpoints: Checkpoints,
    like: TrainState,
    *,
    step: int,
) -> str:
    """What made training step `step` (counted from 1) not finite, in one line. One
    device does it again, from the newest checkpoint before it.

    Raises UserError when there is no such checkpoint.
    """
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
    return f"step {step}: {words(error)}"


def words(error: checkify.Error) -> str:
    """The first NaN's operation, and the line of code that is nearest to it and not of
    a library.
    """
    found = error.get_exception()
    if found is None:
        return "no operation made a NaN; the numbers became infinite, or the device that trained does not repeat them"
    frames = traceback.extract_tb(found.traceback_info.as_python_traceback())
    own = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and frame.filename.endswith(".py")
    ]
    where = f", at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    return f"{str(error.get()).splitlines()[0].rstrip('. ')}{where}"
