"""Rewards: in the graph, learned, or a Python function on the host. Each is a
`types.RewardFn`.
"""

from jaxppo.rewards.host import on_host
from jaxppo.rewards.in_program import count_token
from jaxppo.rewards.pool import RewardPool
from jaxppo.rewards.shaping import penalise_missing_eos, token_rewards

__all__ = ["RewardPool", "count_token", "on_host", "penalise_missing_eos", "token_rewards"]
