"""JAX at its strictest, before anything imports it: several devices, no silent broadcasting;
warnings are errors (pyproject).

Most of the time is compilation. Programs are compiled without most of XLA's optimisations, in a
fifth of the time; `JAXPPO_OPTIMISED=1` compiles as in training. They are kept in the user's cache,
outside the repository: a second run of the suite compiles nothing.
"""

import contextlib
import ctypes
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "Agg"

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxppo" / "test-xla"
CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can run code here
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

if not os.environ.get("JAXPPO_OPTIMISED"):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    )

import gc

import hypothesis
import jax
import pytest
import toys
from runs import RUN, TEXTS

from jaxppo import ppo
from jaxppo.data.prompts import encode
from jaxppo.run import figures, load, sampler

# The first example compiles; and what the suite says today it says tomorrow.
hypothesis.settings.register_profile("jaxppo", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxppo")


def pytest_collection_finish():
    """What is there before the first test stays until the end: the garbage collector need not look
    at it again and again while programs are traced.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


MEMORY = {
    "most": 3 * 2**30
}  # bytes of a worker; thousands of compiled programs would grow it to 9 GB


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """After a module, a large process forgets what it has compiled; the cache on disk has it. glibc
    keeps what it is given back until it is asked.
    """
    yield
    if resident() > MEMORY["most"]:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        MEMORY["most"] = max(
            MEMORY["most"], int(1.5 * resident())
        )  # what stays is not given up in vain each time


def resident() -> int:
    """Bytes of memory of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.fixture
def curves():
    """The runs of this test draw their curves."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """A drawing takes a second of each run: those of tests with `curves` have one, and those of
    fixtures.
    """
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(figures, "plot_curves", lambda folder: folder / "curves.png")


@pytest.fixture
def x64():
    """float64 is available, and nothing may turn into another type unasked."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def strict():
    """No type turns into another unasked. (Optax itself does not pass.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def family(request) -> toys.Toy:
    """Both families, one after the other, with weights large enough for every term to count."""
    return toys.FAMILIES[request.param]()


@pytest.fixture(scope="session")
def llama() -> toys.Toy:
    return toys.llama()


@pytest.fixture(scope="session")
def toy_step() -> toys.Step:
    """One compiled PPO step for all tests: the tiny Llama, reward = count of a token, adaptive
    KL.
    """
    return toys.Step(
        kl_adaptive=True, kl_target=1.0, kl_horizon=100.0, kl_coef_min=0.05, missing_eos_penalty=0.5
    )


# A policy small enough for every test, its prompts, and a program that samples


@pytest.fixture(scope="module")
def loaded():
    return load.load_policy(RUN)


@pytest.fixture(scope="module")
def prompts(loaded):
    return encode(TEXTS, loaded[1].tokenizer, 4, too_long="last")


@pytest.fixture(scope="module")
def read(loaded):
    config, policy = loaded
    return sampler.Sampler(config, policy, rows=4)


@pytest.fixture(scope="module")
def moved(loaded):
    """A state whose adapters are no longer zero."""
    config, policy = loaded
    params = jax.tree.map(lambda x: x + 0.1, policy.params)
    return ppo.init_state(config, params, policy.frozen, jax.random.key(0))
