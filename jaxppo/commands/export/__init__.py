"""A run as a folder for others: weights that `transformers` loads, or an adapter for
PEFT, with its tokenizer and a model card.

Nothing leaves the machine unless `jaxppo push` is called. What needs JAX is imported
late: `--help` reads the options here.
"""

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from jaxppo.commands.export import card as words
from jaxppo.commands.export import folder as folder_module
from jaxppo.commands.export import hub
from jaxppo.commands.export.folder import (
    BASE,
    CARD,
    free_place,
    whole_folder,
    write_adapter,
    write_model,
    write_tokenizer,
    write_value,
)
from jaxppo.commands.report import outcomes, pages, records, sections
from jaxppo.commands.report.pages import Block, Heading, Listing, Table, Text
from jaxppo.commands.report.records import Run
from jaxppo.config import HIDDEN, RunConfig
from jaxppo.data import prompts
from jaxppo.data.fetch import SOURCES
from jaxppo.models import lora
from jaxppo.models.scan import unstack_layers
from jaxppo.pretrained import BUNDLED
from jaxppo.run import files, load, manifest
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.load import Policy
from jaxppo.types import TrainState

# Tokens of well-known services, should one have come into a command or a setting in
# spite of all care.
TOKENS = re.compile(r"\b(hf|sk|ghp|gho|github_pat|glpat|xox[abp]|AKIA|AIza)[-_]?[A-Za-z0-9_-]{16,}")


@dataclass(frozen=True)
class ExportOptions:
    """A trained run as a folder that transformers loads: weights, tokenizer, generation
    settings, model card.

    $ jaxppo export runs/sentiment exported
    $ jaxppo export runs/sentiment exported --dtype bfloat16 --checkpoint newest
    $ jaxppo export runs/sentiment adapter --adapter
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """the run's folder, or that of a task's whole way"""
    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """where to write; it must not be there yet, or be empty"""
    adapter: bool = False
    """write the low-rank adapters for PEFT and leave the base as it is; without, they
    are merged into the weights
    """
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights"""
    checkpoint: Literal["best", "newest"] = "best"
    """best by the score of its evaluations (the newest where none has a score), or the
    newest
    """


@dataclass(frozen=True)
class PushOptions:
    """An exported folder to the model hub, after a question; the only verb that sends
    anything.

    $ hf auth login
    $ jaxppo push exported me/my-model
    $ jaxppo push exported me/my-model --public --yes
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """what `jaxppo export` wrote; read its model card, README.md, before"""
    repo_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="REPO_ID")]]
    """user/name or organisation/name; made when it is not there"""
    public: bool = False
    """whether all may see a repository that is made anew"""
    yes: bool = False
    """do not ask"""


class Exported(NamedTuple):
    """A checkpoint of a run, and what is known of it."""

    record: Run
    config: RunConfig
    policy: Policy
    state: TrainState
    which: str  # checkpoint, in words
    fingerprint: str  # of the settings, as the checkpoint's seal has it


def push(options: PushOptions) -> None:
    """Send the exported files to the hub."""

    hub.push(options.folder, options.repo_id, public=options.public, yes=options.yes)


def export(options: ExportOptions) -> None:
    """Write the folder, whole or not at all, and print what is there."""

    place = free_place(options.folder)
    load.use_compilation_cache()
    found = restored(options.run, options.checkpoint)
    with whole_folder(place) as folder:
        write(folder, found, options)
    print(f"written: {options.folder} ({found.which})")
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(place)}  {path.stat().st_size:,} bytes")


def restored(run: Path, checkpoint: str) -> Exported:
    """A checkpoint of a run. Raises UserError for a folder without a run, and for a run
    without a checkpoint.
    """

    record = records.read(run)
    config, policy, state = load.restore(record.config_folder, newest=True)
    checkpoints = Checkpoints(record.config_folder / "checkpoints", write=False)
    best = checkpoint == "best" and checkpoints.best_step() is not None
    state = load.restore_best(record.config_folder, state) if best else state
    about = manifest.read(checkpoints.folder / str(int(state.step)))
    which = f"the {'best' if best else 'newest'} checkpoint, of step {int(state.step)}"
    return Exported(record, config, policy, state, which, str(about["config"]))


def write(folder: Path, found: Exported, options: ExportOptions) -> None:
    """Every file, into a folder that is there. Raises UserError for a shape that
    transformers has no class for, and for an adapter of a run without one.
    """
    import jax

    config, policy, dtype = found.config, found.policy, options.dtype
    names = ("temperature", "top_k", "top_p")
    sampling = {name: getattr(config, name) for name in names} | {
        "max_new_tokens": config.response_length
    }
    known = known_base(config) if options.adapter else ""
    if options.adapter:
        adapters = folder_module.adapters(found.state.params)
        write_adapter(
            folder, policy.shape, adapters, alpha=config.lora_alpha, base=known, dtype=dtype
        )
        write_tokenizer(folder, policy.shape, policy.tokenizer)
    if not known:  # the whole network; with an adapter, the base, which nobody else has
        place = folder / BASE if options.adapter else folder
        place.mkdir(exist_ok=True)
        state = found.state.replace(params={}) if options.adapter else found.state
        params = jax.device_get(load.export_params(config, policy, state))
        write_model(place, policy.shape, params, policy.tokenizer, dtype=dtype, sampling=sampling)
    if config.value_loss != "none":
        write_value(folder, policy.shape, *critic_of(found), dtype=dtype)
    (folder / CARD).write_text(card(found, options), "utf-8")


def known_base(config: RunConfig) -> str:
    """The hub's id of what a run began with; nothing when it was a folder, a file or a
    new network.
    """

    return "" if Path(config.model).exists() else words.hub_id(config)


def critic_of(found: Exported) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the value head, the body of a critic of its own without adapters, or None where
    the head stands on the policy).
    """
    import jax

    whole = lora.merge(found.policy.frozen["base"], found.state.params)
    if "critic" not in whole:
        return jax.device_get(whole["value"]), None
    critic = jax.device_get(
        unstack_layers(lora.fold(whole["critic"], alpha=found.config.lora_alpha))
    )
    return critic.pop("value"), critic


def card(found: Exported, options: ExportOptions) -> str:
    """README.md: what it is, how to load it, how it was made, what it has come to, and
    what it is not good for. Whatever text comes from the run's files is shown, and none
    of it works.
    """

    config, record, base = found.config, without_secrets(found.record), known_base(found.config)
    group, last = records.groups([record]), record.rows[-1] if record.rows else {}
    origin = "a new network" if config.tiny else scrubbed(config.model)
    ends = [outcomes.of_group(group[0])]
    number = prompts.start_token(config, found.policy.tokenizer)
    start = "" if number is None else found.policy.tokenizer.token(number)
    blocks = [
        Text(
            f"A language model, trained with jaxppo. It began as {origin}; its weights are those of {found.which}."
        ),
        Heading("To load it"),
        Listing(words.loading(base, adapter=options.adapter)),
        *map(Text, words.contents(config, options.dtype)),
        *map(Text, words.asking(config, start)),
        Heading("Training"),
        *map(Text, words.method(config, last)),
        *sections.reproduction(record),
        Text(f"Hash of the run's settings: {found.fingerprint}"),
        *sections.settings_tables(group),
        Heading("Metrics"),
        Table(*outcomes.table(group, ends), text_columns=2),
        *evaluated(record),
        Text(words.ABOUT_METRICS),
        Heading("Limits"),
        *map(Text, words.limits(config, last)),
        Heading("Versions"),
        Text(", ".join(f"{name} {x}" for name, x in record.versions.items() if x) or "Not known."),
    ]
    bundled = config.model in BUNDLED and not config.tiny
    licence = SOURCES[config.model].licence if bundled else ""
    return words.front_matter(base, adapter=options.adapter, licence=licence) + pages.markdown(
        record.name, blocks
    )


def evaluated(record: Run) -> list[Block]:
    """The numbers of `jaxppo eval`, where it has been run on the run; a damaged file
    has none.
    """

    try:
        found = json.loads((record.folder / "eval.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    known = found.items() if isinstance(found, dict) else ()
    numbers = {k: x for k, x in known if isinstance(x, list) and len(x) == 3}
    numbers |= {k: [x, None, None] for k, x in known if isinstance(x, float)}
    rows = [
        [k, *(f"{y:.3f}" if isinstance(y, int | float) else "–" for y in x)]
        for k, x in numbers.items()
    ]
    return (
        [
            Text("Measured by jaxppo eval, with 95 % intervals:"),
            Table(["number", "value", "low", "high"], rows),
        ]
        if rows
        else []
    )


def without_secrets(record: Run) -> Run:
    """The record once more without what looks like a secret: the run's files may have
    been written to by hand.
    """

    words = lambda x: scrubbed(x) if isinstance(x, str) else x
    settings = {name: words(x) for name, x in files.hide_secrets(record.settings).items()}
    return dataclasses.replace(
        record, settings=settings, commands=[command(line) for line in record.commands]
    )


def command(line: str) -> str:
    """A line of command.txt without secrets.

    >>> command(
    ...     "python x.py --api-key abc --data 'my pairs.jsonl' --note hf_abcdefghijklmnopqrstuvwxyz"
    ... )
    "python x.py --api-key '***' --data 'my pairs.jsonl' --note '***'"
    """

    try:
        words = shlex.split(line)
    except ValueError:
        return "(a damaged line)"
    return files.command_line([scrubbed(word) for word in words]) if words else ""


def scrubbed(text: str) -> str:
    """The text without tokens of well-known services, and without the credentials of an
    address.
    """

    return TOKENS.sub(HIDDEN, files.CREDENTIALS.sub(f"//{HIDDEN}@", text))
