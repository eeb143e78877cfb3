"""Loss functions: one value for each token, before any reduction.

A policy loss is (logprobs, old_logprobs, advantages, mask, *, settings, key=None) ->
(per_token, diagnostics):

- logprobs are differentiated. old_logprobs (of the policy that sampled) and advantages
  are constants. All are [B T].
- per_token [B T] is minimised. It is 0 where the mask is 0. The caller reduces it with
  the weights of `aggregate`.
- diagnostics are [B T] without gradient, and 0 where the mask is 0. The caller takes
  their masked mean over the global batch. All losses have "approx_kl", KL(old‖new) by
  the k3 estimator. Losses that clip have "clip_fraction", 1 where a token is clipped.
- Values at padding may be NaN or infinite. Log-ratios are clamped to [−20, 20] before
  exp.
- A loss on whole sequences repeats its value on every token of the row, so that
  `aggregate.sequence_mean` gives the paper's objective.
- Only `clip_cov` uses key. The others accept it so that all have one signature.

To add a loss, write it here and give it a row in `algorithms.POLICY_LOSSES`.

In the formulas d = logprobs − old_logprobs, r = exp(d), and A is the advantage.

One token at a time      `token`: reinforce, clip, dual_clip, kl_penalty, cispo,
                         two_sided, sapo, dppo_tv, dppo_kl, and for data of another
                         policy dro, awr
Whole sequences          `sequence`: gspo, gspo_token, gmpo, rloo_clip, vespo
Right answers            `token`: likelihood, a term besides a policy loss
Selected tokens          `covariance`: kl_cov, clip_cov
Critic and entropy       `value`: value_mse, value_clipped, value_huber, entropy
Pairs of responses       `preference`: dpo, ipo
Factors of the loss,     `correction`: importance, rejection, off_policy_mask,
and what is left out     top_entropy
"""

from jaxppo.losses.correction import importance, off_policy_mask, rejection, top_entropy
from jaxppo.losses.covariance import clip_cov, kl_cov
from jaxppo.losses.preference import dpo, ipo
from jaxppo.losses.sequence import gmpo, gspo, gspo_token, rloo_clip, vespo
from jaxppo.losses.token import (
    awr,
    cispo,
    clip,
    dppo_kl,
    dppo_tv,
    dro,
    dual_clip,
    kl_penalty,
    likelihood,
    reinforce,
    sapo,
    two_sided,
)
from jaxppo.losses.value import entropy, value_clipped, value_huber, value_mse

__all__ = [
    "awr",
    "cispo",
    "clip",
    "clip_cov",
    "dpo",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "dual_clip",
    "entropy",
    "gmpo",
    "gspo",
    "gspo_token",
    "importance",
    "ipo",
    "kl_cov",
    "kl_penalty",
    "likelihood",
    "off_policy_mask",
    "reinforce",
    "rejection",
    "rloo_clip",
    "sapo",
    "top_entropy",
    "two_sided",
    "value_clipped",
    "value_huber",
    "value_mse",
    "vespo",
]
