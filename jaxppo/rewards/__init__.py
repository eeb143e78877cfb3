"""Rewards: in the program (`in_program`, `metrics`, `classifier`), or Python functions
on the host (`host`, `pool`, `text`). Each is a `types.RewardFn`.

Nothing is imported here, so that the workers of a `RewardPool` start without JAX.
"""
