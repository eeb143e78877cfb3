"""Write a job's settings as a config.json for `jaxppo plan`.

    python job_settings.py OUT SCRIPT [OPTION...]

The script's own parser reads options, settings files and presets, so the plan is for what will run.
The script is imported, but its `main` does not run. Only this file needs jaxppo; tpu.py calls it
with jaxppo's Python. Exit code 2: the options are wrong; 3: the script has no run settings.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path

from jaxppo.cli import parse
from jaxppo.config import RunConfig
from jaxppo.run.settings import to_dict


def config_class(script: Path) -> type | None:
    """Return the dataclass of the script's options: the most derived RunConfig that it defines."""
    spec = importlib.util.spec_from_file_location("job", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["job"] = module  # dataclasses look here for the names in annotations
    sys.path.insert(0, str(script.resolve().parent))
    spec.loader.exec_module(module)
    own = [
        x
        for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, RunConfig) and x.__module__ == "job"
    ]
    last = [x for x in own if not any(x in other.__mro__[1:] for other in own)]
    return last[0] if len(last) == 1 else None


def main(out: str, script: str, *options: str) -> int:
    """Write the settings to `out` and return the exit code."""
    kind = config_class(Path(script))
    if kind is None:
        print(
            f"error: {script} defines no dataclass of settings that extends RunConfig",
            file=sys.stderr,
        )
        return 3
    Path(out).write_text(json.dumps(to_dict(parse(kind, args=list(options))), indent=1) + "\n")
    if is_supervised(Path(script).read_text(encoding="utf-8")):
        print(
            "note: its step generates nothing: the plan is for a policy gradient "
            "with these settings, which needs more"
        )
    return 0


def is_supervised(source: str) -> bool:
    """Return whether a script trains an objective of `jaxppo.supervised` only."""
    names = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return "supervised" in names and not names & {"algorithms", "stages"}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
