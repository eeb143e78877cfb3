"""Chips that need not be here: their published peaks, slices of them for the TPU's
compiler, and shapes of known models.
"""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxppo.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (https://docs.cloud.google.com/tpu/docs/v4, /v5e,
    /v5p, /v6e); its memory is what the compiler leaves to a program.

    `links` is all that a chip can send to others in a second, over every link at once:
    half of the published bidirectional number. A slice without wrap-around links, or a
    ring along one side, has less: as part of a lower bound of seconds it is safe.
    """

    name: str
    memory: float  # bytes
    flops: float  # a second, in bfloat16
    bandwidth: float  # bytes a second, of the memory
    links: float  # bytes a second, sent


CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1640e9, 400e9),
}

KINDS = {  # what JAX calls a TPU
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}

# operations a second in bfloat16 (a T4: float16), dense, from the maker's data sheets
GPUS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}

# No metadata server is asked, two plans at once do not wait for each other, and no log
# is written. Warnings come on the terminal, where `quiet` reads them.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


def peak(kind: str) -> float:
    """The published peak of a chip that JAX calls so, or 0.

    >>> peak("NVIDIA H100 80GB HBM3"), peak("TPU v5 lite"), peak("cpu")
    (989000000000000.0, 197000000000000.0, 0.0)
    """
    if kind in KINDS:
        return CHIPS[KINDS[kind]].flops
    words = re.split(r"[ -]", kind)  # "NVIDIA A100-SXM4-40GB", "Tesla T4"
    return next((GPUS[word] for word in words if word in GPUS), 0.0)


def rounds_in_software(flags: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU is known to have no unit for products in bfloat16
    (AMX, AVX-512's or Arm's), which makes them slower than those in float32. False
    where nothing is known.
    """
    words = set(flags.read_text(errors="replace").split()) if flags.exists() else set()
    return bool(words & {"flags", "Features"}) and not words & {"amx_bf16", "avx512_bf16", "bf16"}


def here() -> list:
    """The devices of this machine."""
    import jax

    with quiet():
        return jax.devices()


def topology(text: str) -> tuple[Chip, list]:
    """The chip and the devices of a slice such as v5e:2x4, which need not be here; one
    device a chip.

    Raises UserError for a text that is no slice, for a size that the chip does not come
    in, and without the compiler.
    """
    kind, _, size = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise UserError(
            f"--topology {text!r}: give CHIP:SIZE with one of {', '.join(CHIPS)}, such as v5e:2x4 or v5p:2x2x2"
        )
    os.environ.update(ENVIRONMENT)
    from jax.experimental import topologies

    sides = [int(side) for side in size.split("x")]
    options: dict[str, Any] = (
        {"chip_config_name": "megacore"} if kind == "v4" else {}
    )  # both cores of a v4 as one device
    if all(side == 1 for side in sides):
        # a host has four chips unless it is told
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with quiet():
            found = topologies.get_topology_desc(platform="tpu", topology_name=text, **options)
    except Exception as error:
        reason = str(error).splitlines()[0][:160]
        missing = importlib.util.find_spec("libtpu") is None
        hint = "; it needs the TPU compiler: pip install -e '.[tpu-plan]'" if missing else ""
        raise UserError(f"--topology {text}: {reason}{hint}") from error
    return CHIPS[kind], list(found.devices)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Nothing on the terminal from a library that complains of the missing chip; what
    it said is in the list afterwards.
    """
    said: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            # A cached program cannot be loaded without its chip: JAX says so, and
            # compiles it again.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*compilation cache")
                yield said
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            said.append(sink.read().decode(errors="replace"))
