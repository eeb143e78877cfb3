"""What this machine has for jaxppo: devices, versions, the cache, room on the disk,
extras; and what is to be done.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jaxppo import __version__
from jaxppo.data.fetch import cache_folder
from jaxppo.errors import UserError

CORE = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
)  # whose versions are shown

ADDS = {  # what each extra of pyproject.toml is for
    "demo": "SmolLM2 from its package, the sentiment reward of the first example, and chat formats",
    "tasks": "metrics of the tasks: BLEU, ROUGE, word errors, entities, profanity",
    "reasoning": "reasoning puzzles as prompts with rewards",
    "track": "--track tensorboard and wandb",
    "notebook": "the Colab notebook: made from its script, and run",
    "parity": "PyTorch, to compare with",
    "test": "the test suite",
    "cuda12": "JAX on NVIDIA GPUs, CUDA 12",
    "cuda13": "JAX on NVIDIA GPUs, CUDA 13",
    "tpu": "JAX on Cloud TPUs",
    "tpu-plan": "jaxppo plan for TPUs that are not here",
}

ROOM = 2 * 10**9  # bytes that should be free for a checkpoint or a download

ACCELERATORS = {
    "/dev/nvidia0": "cuda13",
    "/dev/accel0": "tpu",
    "/dev/vfio/0": "tpu",
}  # what the system shows of one


@dataclass(frozen=True)
class DoctorOptions:
    """Whether all is well here: devices, versions, cache, disk, rights, extras; the
    last line says what to do.

    $ jaxppo doctor
    $ jaxppo doctor --runs /data/runs
    """

    runs: Path = Path("runs")
    """folder that is to hold the runs"""


@dataclass(frozen=True)
class Finding:
    """A line of the report, and what is to be done about it, if anything."""

    name: str
    text: str
    todo: str = ""


def doctor(options: DoctorOptions) -> None:
    """Print what is found. Exit code 2 when something is to be done."""
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
    """Of jaxppo, Python and the libraries that it stands on, against the ranges that it
    was made for.
    """
    yield Finding("jaxppo", f"{__version__}, {git()}")
    yield Finding(
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}",
    )
    wanted = {requirement.name: requirement for requirement in requirements("jaxppo")}
    for name in dict.fromkeys([*CORE, *wanted]):
        found, specifier = version(name), str(wanted[name].specifier) if name in wanted else ""
        if found is None:
            yield Finding(name, "missing", f'pip install "{name}{specifier}"')
        elif name in wanted and not wanted[name].specifier.contains(found, prereleases=True):
            yield Finding(
                name, f"{found}, but {specifier} is needed", f'pip install "{name}{specifier}"'
            )
        elif name in CORE:
            yield Finding(name, found)


def git() -> str:
    """The commit of this code, where it is a checkout: a run writes it down."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return "not a git checkout: runs write down the version alone"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = lambda *words: subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        commit, changed = (
            ask("rev-parse", "--short=12", "HEAD"),
            ask("status", "--porcelain", "--untracked-files=no"),
        )
        return f"git {commit}" + (
            f", {len(changed.splitlines())} files changed since" if changed else ""
        )
    return "a checkout whose git state is not known (is git installed?)"


def devices() -> Iterator[Finding]:
    """What JAX computes on; and an accelerator that it does not see."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # of any kind, from any driver
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        yield Finding(
            "devices", f"none: {reason}", "mend JAX's installation, or set JAX_PLATFORMS=cpu"
        )
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
                f"there is one that JAX does not use ({extra})",
                f'pip install -e ".[{extra}]"',
            )


def memory(device) -> str:
    """Of a device, where it says."""
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return f" ({stats['bytes_limit'] / 1e9:.1f} GB for JAX)" if "bytes_limit" in stats else ""


def cache() -> Iterator[Finding]:
    """Where downloads and compiled programs are kept."""
    try:
        folder = cache_folder()
    except UserError as error:
        yield Finding("cache", "cannot be made", str(error))
        return
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
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
    """Where runs are written: there, or to be made in the nearest folder above that
    is.
    """
    place = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    yield writable(
        "runs", place, f"{runs.absolute()}, {room(place)}", "choose another folder with --runs"
    )


def writable(name: str, folder: Path, text: str, otherwise: str) -> Finding:
    """A folder by a trial: what its bits say is not all that counts."""
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
    """What each extra adds, and which of its packages are missing or of another
    version.
    """
    from packaging.requirements import Requirement

    known = [Requirement(line).marker for line in declared("jaxppo")]
    names = dict.fromkeys(
        found[1] for marker in known if (found := re.search(r'extra == "([\w-]+)"', str(marker)))
    )
    if not names:
        yield Finding("extras", "not known: jaxppo is not installed here")
    for extra in names:
        wanted = requirements("jaxppo", extra)
        here = {x: version(x.name) for x in wanted}
        bad = [
            x.name if found is None else f"{x.name}{x.specifier} ({found} is here)"
            for x, found in here.items()
            if found is None or not x.specifier.contains(found, prereleases=True)
        ]
        missing = ", ".join(dict.fromkeys(bad))
        state = f'missing {missing}: pip install -e ".[{extra}]"' if missing else "installed"
        yield Finding(f"extra {extra}", f"{ADDS.get(extra, 'more')}; {state}")


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def declared(package: str) -> list[str]:
    """What an installed package asks for, with the markers of its extras; nothing when
    it is not installed. A checkout of jaxppo's own pyproject.toml is newer than what
    was written down when it was installed.
    """
    path = Path(__file__).parents[1] / "pyproject.toml"
    if package == "jaxppo" and path.is_file():
        project = tomllib.loads(path.read_text("utf-8"))["project"]
        inner = (
            (extra, line)
            for extra, lines in project["optional-dependencies"].items()
            for line in lines
        )
        return [*project["dependencies"], *(_of_extra(line, extra) for extra, line in inner)]
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _of_extra(line: str, extra: str) -> str:
    """A requirement as metadata have it: with its extra among its markers."""
    package, _, marker = line.partition(";")
    return f'{package}; {f"({marker.strip()}) and " if marker else ""}extra == "{extra}"'


def requirements(package: str, extra: str = "") -> list:
    """What a package asks for on this machine; with an extra, what that adds, the
    extras of others in it opened.
    """
    from packaging.requirements import Requirement

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
