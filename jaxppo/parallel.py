"""How a train step is compiled. The step itself never knows."""

from collections.abc import Callable

import jax

from jaxppo.types import Prompts, TrainState


class CompiledStep:
    """A train step as one XLA program, with its state donated: the old state is gone after a call.

    `frozen` is passed beside the state and not donated, so that it stays where it is. `traces` counts how often the step
    was traced: 1 after any number of calls with the same shapes.
    """

    def __init__(self, train_step: Callable):
        self.traces = 0

        def program(live: TrainState, frozen, prompts: Prompts):
            self.traces += 1
            state, metrics = train_step(live.replace(frozen=frozen), prompts)
            return state.replace(frozen=None), metrics

        self.program = jax.jit(program, donate_argnums=0)

    def __call__(self, state: TrainState, prompts: Prompts) -> tuple[TrainState, dict]:
        frozen = state.frozen
        live, metrics = self.program(state.replace(frozen=None), frozen, prompts)
        return live.replace(frozen=frozen), metrics

    def lower(self, state: TrainState, prompts: Prompts):
        """The lowered program, for cost and memory analysis."""
        return self.program.lower(state.replace(frozen=None), state.frozen, prompts)


def compile_step(train_step: Callable) -> CompiledStep:
    """`train_step` under jit on one device."""
    return CompiledStep(train_step)
