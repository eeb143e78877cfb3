"""Metrics of several samples of each prompt: avg@k, pass@k and maj@k."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxppo.errors import UserError


def pass_at_k(right: Int[np.ndarray, "N"], n: int, k: int) -> Float[np.ndarray, "N"]:
    """Return the chance that one of k samples is right, for problems of whose n samples
    `right` were: 1 − C(n − c, k) / C(n, k), unbiased (Chen et al. 2021,
    https://arxiv.org/abs/2107.03374). Raises UserError if k or a count does not fit n.

    >>> pass_at_k(np.array([0, 1, 3]), 4, 2)  # c = 1: C(3, 2) / C(4, 2) = 3 / 6 miss
    array([0. , 0.5, 1. ])
    """
    right = np.asarray(right)
    if not 1 <= k <= n or right.min(initial=0) < 0 or right.max(initial=0) > n:
        raise UserError(f"pass@{k} needs 1 to {n} samples to draw of {n}, and counts in 0 to {n}")
    # C(n − c, k) / C(n, k) = Π (1 − k / i) over i = n, n − 1, ..., n − c + 1
    missed = np.concatenate([[1.0], np.cumprod(1 - k / np.arange(n, 0, -1))])
    return 1 - missed[right]


def pass_at_powers(right: Bool[np.ndarray, "N n"]) -> dict[str, float]:
    """Return the mean of pass@k over the problems, for k = 1, 2, 4, ... and n.

    >>> pass_at_powers(np.array([[True, False, False], [False, False, False]]))
    {'pass@1': 0.1666..., 'pass@2': 0.3333..., 'pass@3': 0.5}
    """
    n = right.shape[1]
    powers = sorted({n, *(2**i for i in range(n.bit_length()))})
    return {f"pass@{k}": float(pass_at_k(right.sum(1), n, k).mean()) for k in powers}


def majority(texts: Sequence[str]) -> int:
    """Return the place of the most frequent text, at its first occurrence; of equally
    frequent ones, the text that came first (Wang et al. 2022,
    https://arxiv.org/abs/2203.11171). Outer spaces do not count.

    >>> majority(["3", "5", " 5"]), majority(["3", "5"])
    (1, 0)
    """
    texts = [text.strip() for text in texts]
    return texts.index(Counter(texts).most_common(1)[0][0])


def summarise(
    scores: Float[np.ndarray, "N k"], texts: Sequence[Sequence[str]], *, least: float
) -> dict[str, float]:
    """Return means over N prompts with k samples each: avg@k, of the score; pass@1, 2,
    4, ... k; and maj@k, whether the most frequent text is right. A sample is right if
    its score is at least `least`.

    >>> summarise(np.array([[0.0, 2.0]]), [["a", "b"]], least=1.0)
    {'avg@2': 1.0, 'maj@2': 0.0, 'pass@2': 1.0, 'pass@1': 0.5}
    """
    k = scores.shape[1]
    # in the scores' precision: .9 in float32 is less than .9 in float64
    right = scores >= scores.dtype.type(least)
    chosen = [majority(row) for row in texts]
    return {
        f"avg@{k}": float(scores.mean()),
        f"maj@{k}": float(right[np.arange(len(right)), chosen].mean()),
        # the largest k first: a report draws the first few
        **dict(reversed(pass_at_powers(right).items())),
    }
