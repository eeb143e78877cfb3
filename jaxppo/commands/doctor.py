"""`jaxppo doctor`: check the installation: versions, devices, cache, disk, extras."""

import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from jaxppo import __version__
from jaxppo.data.fetch import cache_folder
from jaxppo.errors import UserError, first_line
from jaxppo.run import files

# Packages whose versions are always shown.
CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")

ADDS = {  # what each extra of pyproject.toml adds
    "demo": "SmolLM2 from its package, and the sentiment reward of the first example",
    "tasks": "metrics of the tasks: BLEU, ROUGE, word errors, entities, profanity",
    "speech": "features of recordings from Whisper's encoder",
    "reasoning": "reasoning puzzles with rewards",
    "track": "--track tensorboard and wandb",
    "notebook": "build and run the notebooks for Colab and Kaggle",
    "parity": "PyTorch, for comparison",
    "docs": "build the documentation as a site",
    "test": "the test suite",
    "cuda12": "JAX on NVIDIA GPUs, CUDA 12",
    "cuda13": "JAX on NVIDIA GPUs, CUDA 13",
    "tpu": "JAX on Cloud TPUs",
    "tpu-plan": "jaxppo plan without a TPU",
}

ROOM = 2 * 10**9  # bytes that should be free for a checkpoint or a download

# Device files of accelerators, and the extra that each needs.
ACCELERATORS = {"/dev/nvidia0": "cuda13", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}


@dataclass(frozen=True)
class DoctorOptions:
    """Check the installation: versions, devices, cache, disk, permissions, extras. The
    last line says what to do.

    $ jaxppo doctor
    $ jaxppo doctor --runs /data/runs
    """

    runs: Path = Path("runs")
    """folder for runs"""


@dataclass(frozen=True)
class Finding:
    """A line of the report, and what to do about it, if anything."""

    name: str
    text: str
    todo: str = ""


def doctor(options: DoctorOptions) -> None:
    """Print all findings. Exit code 2 if there is something to do."""
    todo = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        versions,
        devices,
        cache,
        lambda: folder_of_runs(options.runs),
        extras,
    ]
    for check in checks:
        for found in check():
            print(f"{'!' if found.todo else ' '} {found.name:18}{found.text}", flush=True)
            todo += [found.todo] if found.todo else []
    print("all is well" if not todo else f"to do: {'; '.join(todo)}")
    if todo:
        raise SystemExit(2)


def versions() -> Iterator[Finding]:
    """The versions of jaxppo, Python and required packages, against their ranges."""
    yield Finding("jaxppo", f"{__version__}, {git()}")
    machine = f"{platform.system()} {platform.machine()}"
    yield Finding("python", f"{platform.python_version()} on {machine}, {sys.executable}")
    wanted = {requirement.name: requirement for requirement in requirements("jaxppo")}
    for name in dict.fromkeys([*CORE, *wanted]):
        found = version(name)
        specifier = wanted[name].specifier if name in wanted else SpecifierSet()
        install = f'pip install "{name}{specifier}"'
        if found is None:
            yield Finding(name, "missing", install)
        elif not specifier.contains(found, prereleases=True):
            yield Finding(name, f"{found}, but {specifier} is needed", install)
        elif name in CORE:
            yield Finding(name, found)


def git() -> str:
    """The commit of this code, if it is known."""
    commit = files.versions()["git"]
    return f"git {commit}" if commit else "not a git checkout: runs record the version alone"


def devices() -> Iterator[Finding]:
    """JAX's devices, and accelerators that it does not use."""
    try:
        import jax  # slow, and its errors belong to this finding

        found = jax.devices()
    except Exception as error:  # any driver may raise anything
        cure = "repair JAX's installation, or set JAX_PLATFORMS=cpu"
        yield Finding("devices", f"none: {first_line(error)}", cure)
        return
    kinds = [f"{device.device_kind}{memory(device)}" for device in found]
    yield Finding(
        "devices", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    )
    if found[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        for extra in dict.fromkeys(
            extra for path, extra in ACCELERATORS.items() if Path(path).exists()
        ):
            yield Finding(
                "accelerator",
                f"found one that JAX does not use ({extra})",
                f'pip install -e ".[{extra}]"',
            )


def memory(device) -> str:
    """A device's memory, if it is known."""
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return f" ({stats['bytes_limit'] / 1e9:.1f} GB for JAX)" if "bytes_limit" in stats else ""


def cache() -> Iterator[Finding]:
    """The folder of downloads and compiled programs."""
    try:
        folder = cache_folder()
    except UserError as error:
        yield Finding("cache", "cannot be created", str(error))
        return
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # removed in the meantime
            size += 0 if path.is_dir() else path.lstat().st_size
    yield writable(
        "cache",
        folder,
        f"{folder}, {size / 1e9:.2f} GB, {room(folder)}",
        "set JAXPPO_CACHE to another folder",
    )
    programs = folder / "xla"
    if programs.exists() and (
        programs.stat().st_uid != os.getuid() or programs.stat().st_mode & 0o022
    ):
        yield Finding(
            "compiled programs",
            "not kept: others can write to their folder",
            f"chmod 700 {programs}",
        )


def folder_of_runs(runs: Path) -> Iterator[Finding]:
    """The folder of runs, or the nearest existing folder above it."""
    place = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    yield writable(
        "runs", place, f"{runs.absolute()}, {room(place)}", "choose another folder with --runs"
    )


def writable(name: str, folder: Path, text: str, otherwise: str) -> Finding:
    """Try to write to a folder: its permission bits alone do not tell."""
    probe = folder / f".jaxppo-doctor-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding(name, f"{text}, cannot be written to ({error.strerror})", otherwise)
    if shutil.disk_usage(folder).free < ROOM:
        return Finding(
            name,
            f"{text}, less than {ROOM / 1e9:.0f} GB",
            f"free space on the disk of {folder}, or {otherwise}",
        )
    return Finding(name, text)


def room(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free"


def extras() -> Iterator[Finding]:
    """What each extra adds, and its packages that are missing or of a wrong version."""
    known = [Requirement(line).marker for line in declared("jaxppo")]
    names = dict.fromkeys(
        found[1] for marker in known if (found := re.search(r'extra == "([\w-]+)"', str(marker)))
    )
    if not names:
        yield Finding("extras", "unknown: jaxppo is not installed here")
    for extra in names:
        wanted = requirements("jaxppo", extra)
        here = {x: version(x.name) for x in wanted}
        bad = [
            x.name if found is None else f"{x.name}{x.specifier} ({found} is installed)"
            for x, found in here.items()
            if found is None or not x.specifier.contains(found, prereleases=True)
        ]
        missing = ", ".join(dict.fromkeys(bad))
        state = f'missing {missing}: pip install -e ".[{extra}]"' if missing else "installed"
        yield Finding(f"extra {extra}", f"{ADDS.get(extra, 'more')}; {state}")


def version(name: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def declared(package: str) -> list[str]:
    """The requirements of an installed package, with those of its extras."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def requirements(package: str, extra: str = "") -> list:
    """A package's requirements on this machine or, with `extra`, what that extra adds.
    Extras of other packages are replaced by their requirements.
    """
    found = []
    for one in map(Requirement, declared(package)):
        always = one.marker is None or one.marker.evaluate({"extra": ""})
        asked = (
            always
            if not extra
            else not always and one.marker is not None and one.marker.evaluate({"extra": extra})
        )
        if asked:
            found += [
                more for inner in sorted(one.extras) for more in requirements(one.name, inner)
            ]
            found += [] if one.extras and one.name == package else [one]
    return found
