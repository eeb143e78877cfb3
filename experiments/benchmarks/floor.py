"""The arithmetic floor of one PPO step: how long its matrix products and memory traffic take at the
machine's own rates.

    floor = Σ FLOPs / GEMM rate                                  (prompts, reference, update)
          + Σ_t max(FLOPs_t / GEMM rate, bytes_t / bandwidth)    (decoding, token by token)
          + 28 bytes · parameters · updates / bandwidth          (Adam)

Counted: 2 FLOPs for each weight and token in a forward pass and 3 times that in training, for every
token of a row; the causal half of attention; the output head at response positions, with log-probs
and values kept from decoding, so nothing is scored twice. Decoding reads each weight and the cached
keys and values once for each token, in the compute type. Adam reads parameter, gradient and two
moments, and writes three of them. Not counted: norms, softmax, activations, sampling, the sum over
the gradients. So no step can reach 1.0, and 1.2 to 1.3 times the floor would be a perfect score.

It does not run JAX: the rates come in as numbers (`own_step.py` measures them).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxppo.models.shapes import ModelConfig, gpt2

ADAM_BYTES = (
    28  # float32: reads parameter, gradient, first and second moment; writes all but the gradient
)


@dataclass(frozen=True)
class Work:
    """One step's shapes."""

    model: ModelConfig
    rows: int  # rollouts
    prompt: int
    response: int
    epochs: int = 4
    minibatches: int = 4

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def updates(self) -> int:
        return self.epochs * self.minibatches

    @property
    def new_tokens(self) -> int:
        return self.rows * self.response


def _small(response: int) -> Work:
    model = gpt2(vocab_size=8192, width=256, num_layers=4, num_heads=4, max_length=16 + response)
    return Work(model, rows=64, prompt=16, response=response)


WORKS = {
    "S/32": _small(32),
    "S/128": _small(128),
    "M/32": Work(gpt2(), rows=16, prompt=16, response=32),
    "tiny": Work(
        gpt2(vocab_size=64, width=16, num_layers=2, num_heads=2, max_length=8),
        rows=8,
        prompt=4,
        response=4,
    ),
}


class Product(NamedTuple):
    """[batch m k] times [batch k n], or times a matrix stored [n k] with `rows`. `share` of its
    FLOPs is needed (½ if causal).
    """

    m: int
    k: int
    n: int
    rows: bool = False
    batch: int = 1
    share: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.k * self.n * self.share

    @property
    def shape(self) -> tuple[int, int, int, bool, int]:
        return self[:5]


Products = list[tuple[Product, int]]  # with how often it runs


def matrices(model: ModelConfig) -> dict[tuple[int, int], int]:
    """The weight matrices [in out] of all layers, and how many there are of each shape."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = [
        (model.width, queries),
        (model.width, keys),
        (model.width, keys),
        (queries, model.width),
    ]
    layer += [(model.width, model.mlp_width)] * (2 if model.gated else 1) + [
        (model.mlp_width, model.width)
    ]
    return {shape: layer.count(shape) * model.num_layers for shape in layer}


def weights(model: ModelConfig) -> tuple[int, int]:
    """Numbers in the layers' matrices, and in the head."""
    return sum(
        k * n * times for (k, n), times in matrices(model).items()
    ), model.vocab_size * model.width


def forward(work: Work, rows: int, length: int, head_rows: int) -> Products:
    """Products of one forward pass of `rows` rows of `length` tokens, `head_rows` of all of them
    with logits.
    """
    model = work.model
    trunk: Products = [
        (Product(rows * length, k, n), times) for (k, n), times in matrices(model).items()
    ]
    head: Products = [(Product(head_rows, model.width, model.vocab_size, rows=model.tied), 1)]
    return trunk + attention(model, rows, length) + head


def attention(model: ModelConfig, rows: int, length: int) -> Products:
    """q kᵀ and weights · v of every layer, the causal half of each square."""
    batch, share = rows * model.num_heads, (length + 1) / (2 * length)
    scores = Product(length, model.head_dim, length, True, batch, share)
    return [
        (scores, model.num_layers),
        (Product(length, length, model.head_dim, False, batch, share), model.num_layers),
    ]


def backward(products: Products) -> Products:
    """For y = x w: dx = dy wᵀ, and dw = xᵀ dy."""
    out: Products = []
    for p, times in products:
        dx = Product(p.m, p.n, p.k, p.batch == 1 and not p.rows, p.batch, p.share)
        first, second = (p.n, p.k) if p.rows else (p.k, p.n)
        out += [(dx, times), (Product(first, p.m, second, False, p.batch, p.share), times)]
    return out


def phases(work: Work) -> dict[str, tuple[Products, int]]:
    """Products of each phase but decoding, and how often the phase runs."""
    part = work.rows // work.minibatches
    once = forward(work, part, work.length, part * work.response)
    return {
        "prompts": (forward(work, work.rows, work.prompt, 0)[:-1], 1),
        "reference": (forward(work, work.rows, work.length, work.new_tokens), 1),
        "update": (once + backward(once), work.updates),
    }


def decoding(work: Work, itemsize: int) -> Iterator[tuple[Products, float, float]]:
    """For each token step: its products, the FLOPs of its attention, and the bytes it reads."""
    model = work.model
    products: Products = [
        (Product(work.rows, k, n), times) for (k, n), times in matrices(model).items()
    ]
    products += [(Product(work.rows, model.width, model.vocab_size, rows=model.tied), 1)]
    for t in range(work.response):
        seen = work.prompt + t + 1
        flops = 4.0 * model.num_layers * work.rows * model.num_heads * model.head_dim * seen
        cached = 2 * model.num_layers * work.rows * model.num_kv_heads * model.head_dim * seen
        yield products, flops, float(itemsize * (sum(weights(model)) + cached))


def own_shapes(work: Work) -> list[tuple[int, int, int, bool, int]]:
    """Every shape of product in the step, to be measured."""
    every = [p for products, _ in phases(work).values() for p, _ in products]
    every += [p for p, _ in next(decoding(work, 4))[0]]
    return sorted({p.shape for p in every})


def gflop(work: Work) -> dict[str, float]:
    """10⁹ operations of each part of the step."""
    counted = {
        name: times * _flops(products) / 1e9 for name, (products, times) in phases(work).items()
    }
    decode = sum(_flops(products) + extra for products, extra, _ in decoding(work, 4)) / 1e9
    return {"generate": counted.pop("prompts") + decode, **counted}


def peer_gflop(work: Work) -> float:
    """The same for a trainer with a separate value model and logits of all positions: TRL's way of
    doing it.
    """
    every = work.rows * work.length
    full = forward(work, work.rows, work.length, every)
    trunk = full[:-1]
    once = _flops(full) + _flops(trunk)  # policy or reference, and the value model
    return gflop(work)["generate"] + (once + 3 * work.epochs * once) / 1e9


def _flops(products: Products) -> float:
    return sum(p.flops * times for p, times in products)


@dataclass(frozen=True)
class Rates:
    """What the machine reaches: FLOP/s of a product (all shapes alike unless listed), and bytes/s
    of memory.
    """

    gemm: float
    memory: float
    shapes: dict[tuple[int, int, int, bool, int], float] = field(default_factory=dict)

    def seconds(self, products: Products) -> float:
        rate = lambda p: self.shapes[p.shape] if self.shapes else self.gemm
        return sum(p.flops * times / rate(p) for p, times in products)


def seconds(work: Work, rates: Rates, *, itemsize: int, parameters: int) -> dict[str, float]:
    """The floor of each part of the step."""
    out = {
        name: times * rates.seconds(products) for name, (products, times) in phases(work).items()
    }
    decode = sum(
        max(rates.seconds(products) + extra / rates.gemm, read / rates.memory)
        for products, extra, read in decoding(work, itemsize)
    )
    adam = ADAM_BYTES * parameters * work.updates / rates.memory
    return {"generate": out.pop("prompts") + decode, **out, "adam": adam}
