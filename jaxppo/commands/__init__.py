"""The command `jaxppo VERB`. Each verb is a module, imported only when it is used."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

# verb: (module in this package, function, class of its options, one line of help)
VERBS = {
    "train": ("train", "train", "TrainOptions", "train on your prompts with your reward"),
    "sample": ("sample", "sample", "SampleOptions", "sample a run's responses to prompts"),
    "eval": ("evaluate", "evaluate", "EvalOptions", "measure a run on held-out examples"),
    "algorithms": ("algorithms", "algorithms", "AlgorithmsOptions", "list the algorithms"),
    "plan": ("plan", "plan", "PlanOptions", "check whether the step fits a TPU slice"),
    "report": ("report", "report", "ReportOptions", "compare runs on one page"),
    "export": ("export", "export", "ExportOptions", "write a run's model for transformers"),
    "push": ("export", "push", "PushOptions", "upload an exported model to the Hugging Face hub"),
    "doctor": ("doctor", "doctor", "DoctorOptions", "check the installation on this machine"),
}


def load(verb: str) -> tuple[Callable[[Any], None], type]:
    """Import a verb: its function, and the class of its options."""
    name, function, options, _ = VERBS[verb]
    module = importlib.import_module(f"jaxppo.commands.{name}")
    return getattr(module, function), getattr(module, options)


def main() -> None:
    """Run `jaxppo VERB ...`."""
    given = sys.argv[1:2]
    if not given or given[0] not in VERBS:
        lines = [f"  {verb:10} {about}" for verb, (*_, about) in VERBS.items()]
        print("\n".join(["usage: jaxppo VERB ...   (jaxppo VERB --help tells more)", *lines]))
        if given in (["-h"], ["--help"]):
            raise SystemExit(0)
        if given:
            near = difflib.get_close_matches(given[0], VERBS, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            print(f"error: unknown verb {given[0]!r}{meant}", file=sys.stderr)
        raise SystemExit(2)
    verb, *args = sys.argv[1:]
    # XLA reads this when JAX is imported. `plan` reads the warnings and shows none.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if verb == "plan" else "2")
    from jaxppo.cli import script  # slow to import; `jaxppo --help` does not need it

    run, options = load(verb)
    about = inspect.cleandoc(options.__doc__ or "")
    alone = verb != "train"
    script(run, options, args=args, alone=alone, about=about, prog=f"jaxppo {verb}")
