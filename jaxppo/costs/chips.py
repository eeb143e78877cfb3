"""Published peaks of chips, and TPU slices to compile for without the hardware."""

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

import jax
from jax.experimental import topologies

from jaxppo.errors import UserError, first_line

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (https://docs.cloud.google.com/tpu/docs/v4, /v5e,
    /v5p, /v6e). The memory is what the compiler leaves to a program.

    `links` sums up all links of a chip: half of the published bidirectional number.
    Slices without wrap-around links have less, so bounds from it are lower bounds.
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

KINDS = {  # from JAX's name of a TPU
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}

# Dense operations a second in bfloat16 (T4: float16), from NVIDIA's data sheets.
GPUS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}

# Ask no metadata server, let two plans run at once, write no log. Warnings go to
# stderr, where `capture_stderr` reads them.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
    "TPU_LOG_DIR": "disabled",
}


def peak_flops(kind: str) -> float:
    """The published peak of a chip by JAX's name for it, or 0.

    >>> peak_flops("NVIDIA H100 80GB HBM3"), peak_flops("TPU v5 lite")
    (989000000000000.0, 197000000000000.0)
    >>> peak_flops("cpu")
    0.0
    """
    if kind in KINDS:
        return CHIPS[KINDS[kind]].flops
    words = re.split(r"[ -]", kind)  # "NVIDIA A100-SXM4-40GB", "Tesla T4"
    return next((GPUS[word] for word in words if word in GPUS), 0.0)


def lacks_bfloat16(flags: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU lacks instructions for bfloat16 products (of AMX, AVX-512 or
    Arm), which makes them slower than float32. False if that is unknown.
    """
    words = set(flags.read_text(errors="replace").split()) if flags.exists() else set()
    return bool(words & {"flags", "Features"}) and not words & {"amx_bf16", "avx512_bf16", "bf16"}


def local_devices() -> list:
    """The devices of this machine, without their warnings."""
    with capture_stderr():
        return jax.devices()


def topology(text: str) -> tuple[Chip, list]:
    """The chip and the devices of a slice such as v5e:2x4, one device for each chip. No
    hardware is needed.

    Raises UserError for an unknown chip or size, and without the TPU compiler.
    """
    kind, _, size = text.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", size):
        raise UserError(
            f"--topology {text!r}: give CHIP:SIZE with one of {', '.join(CHIPS)}, such as v5e:2x4 "
            "or v5p:2x2x2"
        )
    os.environ.update(ENVIRONMENT)
    sides = [int(side) for side in size.split("x")]
    # Both cores of a v4 form one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if all(side == 1 for side in sides):  # by default a host has four chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        with capture_stderr():
            found = topologies.get_topology_desc(platform="tpu", topology_name=text, **options)
    except Exception as error:
        reason = first_line(error)
        missing = importlib.util.find_spec("libtpu") is None
        hint = "; it needs the TPU compiler: pip install -e '.[tpu-plan]'" if missing else ""
        raise UserError(f"--topology {text}: {reason}{hint}") from error
    return CHIPS[kind], list(found.devices)


@contextlib.contextmanager
def capture_stderr() -> Iterator[list[str]]:
    """Keep stderr off the terminal. The list has what was written, afterwards."""
    said: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            # Without the chip JAX cannot load a cached program: it warns and compiles.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*compilation cache")
                yield said
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            said.append(sink.read().decode(errors="replace"))
