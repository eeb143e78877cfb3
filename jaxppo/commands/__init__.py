"""The command `jaxppo`: one verb a file, each imported when it is asked for."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

# verb: (module below this one, function, class of its options, what it does)
VERBS = {
    "sample": ("sample", "sample", "SampleOptions", "sample responses of a run to prompts"),
    "eval": ("evaluate", "evaluate", "EvalOptions", "metrics of a run on held-out examples"),
    "algorithms": ("algorithms", "algorithms", "AlgorithmsOptions", "list the algorithms"),
    "plan": ("plan", "plan", "PlanOptions", "does the step fit a TPU slice? memory and seconds"),
    "report": ("report", "report", "ReportOptions", "compare runs on one page"),
    "export": ("export", "export", "ExportOptions", "write a run's model for transformers"),
    "push": ("export", "push", "PushOptions", "upload an exported model to the Hugging Face hub"),
    "doctor": ("doctor", "doctor", "DoctorOptions", "check this machine's installation"),
}


def load(verb: str) -> tuple[Callable[[Any], None], type]:
    """The function of a verb, and the class of its options."""
    name, function, options, _ = VERBS[verb]
    module = importlib.import_module(f"jaxppo.commands.{name}")
    return getattr(module, function), getattr(module, options)


def main() -> None:
    """`jaxppo VERB ...`"""
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        asked_for_help = len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help")
        lines = [f"  {verb:10} {about}" for verb, (*_, about) in VERBS.items()]
        print("\n".join(["usage: jaxppo VERB ...   (jaxppo VERB --help tells more)", *lines]))
        if len(sys.argv) > 1 and not asked_for_help:
            near = difflib.get_close_matches(sys.argv[1], VERBS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            print(f"error: unknown verb {sys.argv[1]!r}{meant}", file=sys.stderr)
        raise SystemExit(0 if asked_for_help else 2)
    from jaxppo.cli import script  # `jaxppo --help` answers without loading JAX

    run, options = load(sys.argv[1])
    about = inspect.cleandoc(options.__doc__ or "")
    script(run, options, args=sys.argv[2:], alone=True, about=about, prog=f"jaxppo {sys.argv[1]}")
