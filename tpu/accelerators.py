"""The types of Cloud TPU slices that `tpu.py` can create.

The number in a type's name counts TensorCores for v4 and v5p (two per chip) and chips for v5e and
v6e: a v4-8 has 4 chips. Sizes and hosts: https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and
/v6e; images: /runtimes. Queued resources do not offer newer chips (TPU7x); see elsewhere.md.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One type of slice."""

    type: str  # for gcloud
    topology: str  # for `jaxppo plan`
    chips: int  # and devices, as JAX counts them
    hosts: int
    image: str  # the option --runtime-version


@dataclass(frozen=True)
class Chip:
    """The properties shared by all slices of one chip."""

    prefix: str  # of the type's name
    cores: int  # per chip, as the type's name counts them
    max_single_host: int  # most chips of a slice with one host; hosts of larger slices have 4
    image: str
    sizes: str  # the topologies


CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
SQUARES = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
CHIPS = {
    "v4": Chip("v4", 2, 4, "tpu-ubuntu2204-base", CUBES),
    "v5e": Chip("v5litepod", 1, 8, "v2-alpha-tpuv5-lite", SQUARES),
    "v5p": Chip("v5p", 2, 4, "v2-alpha-tpuv5", CUBES + " 16x16x16 16x16x24"),
    "v6e": Chip("v6e", 1, 8, "v2-alpha-tpuv6e", SQUARES),
}


def accelerator(name: str, chip: Chip, size: str) -> Accelerator:
    """Return the slice with a topology.

    >>> accelerator("v4", CHIPS["v4"], "2x2x1")
    Accelerator(type='v4-8', topology='v4:2x2x1', chips=4, hosts=1, image='tpu-ubuntu2204-base')
    """
    chips = math.prod(int(side) for side in size.split("x"))
    hosts = 1 if chips <= chip.max_single_host else chips // 4
    return Accelerator(
        f"{chip.prefix}-{chips * chip.cores}", f"{name}:{size}", chips, hosts, chip.image
    )


ACCELERATORS = {
    found.type: found
    for name, chip in CHIPS.items()
    for found in (accelerator(name, chip, size) for size in chip.sizes.split())
}
