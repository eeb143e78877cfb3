"""Losses: what each token contributes, before any reduction.

A policy loss is (logprobs, old_logprobs, advantages, mask, *, settings, key=None) ->
(per_token, diagnostics):

- logprobs are differentiated; old_logprobs (of the policy that sampled) and advantages
  are constants; all are [B T].
- per_token [B T] is to be minimised, is 0 where the mask is 0, and is reduced by the
  weights of `aggregate`.
- diagnostics are [B T] too, 0 where the mask is 0 and without gradient: 1 or 0 for a
  yes or no, or a value for each
  token. The caller takes one masked mean over the global batch. All have "approx_kl",
  KL(old‖new) by the k3 estimator; those that clip have "clip_fraction", the tokens
  where the clipped branch was taken.
- what stands at padding may be anything, NaN and infinity included. Log-ratios are held
  in [−20, 20] before exp.
- a loss on whole sequences repeats its value on every token of the row, so that
  `aggregate.sequence_mean` gives the
  paper's objective; the row's advantage is the masked mean of its tokens'.
- key is used by `clip_cov` alone; the others take it and leave it, so that all can be
  called alike.

d stands for logprobs − old_logprobs, r for exp(d), A for the advantage.
"""

from jaxppo.losses.covariance import clip_cov, kl_cov
from jaxppo.losses.preference import dpo, ipo
from jaxppo.losses.sequence import gmpo, gspo, gspo_token
from jaxppo.losses.shared import truncated_importance
from jaxppo.losses.token import (
    awr,
    cispo,
    clip,
    dppo_kl,
    dppo_tv,
    dro,
    dual_clip,
    kl_penalty,
    reinforce,
    sapo,
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
    "ipo",
    "kl_cov",
    "kl_penalty",
    "reinforce",
    "sapo",
    "truncated_importance",
    "value_clipped",
    "value_huber",
    "value_mse",
]
