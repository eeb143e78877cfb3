"""`jaxppo export` and `jaxppo push`: a run's model for transformers or PEFT, with its
tokenizer and a model card. Only `push` sends anything.
"""

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from jaxppo.commands.export import card, folder, hub
from jaxppo.commands.report import outcomes, pages, records, sections
from jaxppo.commands.report.pages import Block, Heading, Listing, Table, Text
from jaxppo.commands.report.records import Run
from jaxppo.config import HIDDEN, RunConfig
from jaxppo.data import prompts, textfile
from jaxppo.data.fetch import SOURCES
from jaxppo.data.folders import complete_folder
from jaxppo.models import lora
from jaxppo.models.scan import unstack_layers
from jaxppo.pretrained import BUNDLED, peft
from jaxppo.run import files, load, manifest
from jaxppo.run.checkpoint import Checkpoints
from jaxppo.run.policy import Policy
from jaxppo.types import TrainState

# Tokens of well-known services, which a command or a setting may still contain.
TOKENS = re.compile(r"\b(hf|sk|ghp|gho|github_pat|glpat|xox[abp]|AKIA|AIza)[-_]?[A-Za-z0-9_-]{16,}")


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained run as a folder that transformers loads: weights, tokenizer,
    generation settings, model card.

    $ jaxppo export runs/sentiment exported
    $ jaxppo export runs/sentiment exported --dtype bfloat16 --checkpoint newest
    $ jaxppo export runs/sentiment adapter --adapter
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """folder of the run or task"""
    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """where to write; a new or empty folder"""
    adapter: bool = False
    """write the low-rank adapters for PEFT; default: merge them into the weights"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the weights"""
    checkpoint: str = "best"
    """best (by validation score, else by training reward), newest, or a step"""
    raw: bool = False
    """of a run with --ema-decay: the weights of the step, not their average"""


@dataclass(frozen=True)
class PushOptions:
    """Upload an exported folder to the Hugging Face hub, after a confirmation.

    $ hf auth login
    $ jaxppo push exported me/my-model
    $ jaxppo push exported me/my-model --public --yes
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """folder that `jaxppo export` wrote; read its model card, README.md, first"""
    repo_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="REPO_ID")]]
    """user/name or organisation/name; created if it does not exist"""
    public: bool = False
    """make a new repository public"""
    yes: bool = False
    """do not ask for confirmation"""


class Exported(NamedTuple):
    """A checkpoint of a run, and what belongs to it."""

    record: Run
    config: RunConfig
    policy: Policy
    state: TrainState
    which: str  # the checkpoint, in words
    fingerprint: str  # hash of the settings, from the checkpoint's manifest


def push(options: PushOptions) -> None:
    """Upload the exported files."""
    hub.push(options.folder, options.repo_id, public=options.public, yes=options.yes)


def export(options: ExportOptions) -> None:
    """Write the folder, complete or not at all, and print its files."""
    place = folder.check_free(options.folder)
    load.use_compilation_cache()
    found = restore(options.run, options.checkpoint, raw=options.raw)
    with complete_folder(place) as path:
        write(path, found, options)
    print(f"written: {options.folder} ({found.which})")
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(place)}  {path.stat().st_size:,} bytes")


def restore(run: Path, checkpoint: str, *, raw: bool = False) -> Exported:
    """Load a checkpoint of a run: best, newest or a step; `raw` as in `load.restore`.
    Raises UserError if there is no run or no such checkpoint.
    """
    record = records.read(run)
    config, policy, state = load.restore(record.config_folder, checkpoint=checkpoint, raw=raw)
    checkpoints = Checkpoints(record.config_folder / "checkpoints", write=False)
    about = manifest.read(checkpoints.folder / str(int(state.step)))
    which = f"the checkpoint of step {int(state.step)}"
    if checkpoint in ("best", "newest"):
        best = checkpoint == "best" and checkpoints.best_step() is not None
        which = f"the {'best' if best else 'newest'} checkpoint, of step {int(state.step)}"
    if config.ema_decay and not raw:
        which += f", averaged with a decay of {config.ema_decay:g} a step"
    return Exported(record, config, policy, state, which, str(about["config"]))


def write(place: Path, found: Exported, options: ExportOptions) -> None:
    """Write every file into an existing folder. Raises UserError for a network that
    transformers has no class for, and for an adapter of a run without one.
    """
    config, policy, dtype = found.config, found.policy, options.dtype
    names = ("temperature", "top_k", "top_p")
    sampling = {name: getattr(config, name) for name in names}
    sampling["max_new_tokens"] = config.response_length
    if config.min_tokens:
        sampling["min_new_tokens"] = config.min_tokens
    base = hub_base(config) if options.adapter else ""
    if options.adapter:
        adapters = folder.adapters(found.state.params)
        scale = {"alpha": config.lora_alpha, "rslora": config.rslora}
        folder.write_adapter(place, policy.shape, adapters, **scale, base=base, dtype=dtype)
        folder.write_tokenizer(place, policy.shape, policy.tokenizer, start=config.start or ())
    if not base:  # the whole network or, with an adapter, a base that no hub has
        path = place / peft.BASE if options.adapter else place
        path.mkdir(exist_ok=True)
        state = found.state.replace(params={}) if options.adapter else found.state
        params = jax.device_get(load.export_params(config, policy, state))
        folder.write_model(
            path,
            policy.shape,
            params,
            policy.tokenizer,
            dtype=dtype,
            sampling=sampling,
            start=config.start or (),
        )
    if config.value_loss != "none":
        folder.write_value(place, policy.shape, *critic_of(found), dtype=dtype)
    (place / folder.CARD).write_text(model_card(found, options), "utf-8")


def hub_base(config: RunConfig) -> str:
    """The hub id of the model that a run started from; "" for a folder, a file or a new
    network.
    """
    return "" if Path(config.model).exists() else card.hub_id(config)


def critic_of(found: Exported) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the value head, the body of a separate critic with merged adapters or None)."""
    whole = lora.merge(found.policy.exact_base(found.config), found.state.params)
    if "critic" not in whole:
        return jax.device_get(whole["value"]), None
    folded = lora.fold(whole["critic"], alpha=lora.alpha_of(found.config))
    critic = jax.device_get(unstack_layers(folded))
    return critic.pop("value"), critic


def model_card(found: Exported, options: ExportOptions) -> str:
    """The model card, README.md. Text from the run's files is escaped and without
    secrets.
    """
    config, base, adapter = found.config, hub_base(found.config), options.adapter
    record = without_secrets(found.record)
    last = record.rows[-1] if record.rows else {}
    group = records.groups([record])
    origin = "a new network" if config.tiny else scrub(config.model)
    tokenizer = found.policy.tokenizer
    ids = prompts.as_ids(prompts.start_token(config, tokenizer))
    own = tuple(ids) == tokenizer.start_ids  # then it adds them
    start = "" if own else "".join(map(tokenizer.token, ids))
    versions = ", ".join(f"{name} {x}" for name, x in record.versions.items() if x)
    blocks = [
        Text(
            f"A language model trained with jaxppo, starting from {origin}. Its weights are those "
            f"of {found.which}."
        ),
        Heading("How to load it"),
        Listing(card.loading(base, adapter=adapter)),
        *map(Text, card.contents(config, options.dtype)),
        *map(Text, card.prompting(config, start)),
        Heading("Training"),
        *map(Text, card.method(config, last)),
        *sections.reproduction(record),
        Text(f"Hash of the run's settings: {found.fingerprint}"),
        *sections.settings_tables(group),
        Heading("Metrics"),
        Table(*outcomes.table(group, [outcomes.of_group(group[0])]), text_columns=2),
        *eval_table(record),
        Text(card.ABOUT_METRICS),
        Heading("Limits"),
        *map(Text, card.limits(config, last)),
        Heading("Versions"),
        Text(versions or "Unknown."),
    ]
    bundled = config.model in BUNDLED and not config.tiny
    licence = SOURCES[config.model].licence if bundled else ""
    front_matter = card.front_matter(base, adapter=adapter, licence=licence)
    return front_matter + pages.markdown(record.name, blocks)


def eval_table(record: Run) -> list[Block]:
    """The numbers of `jaxppo eval`, if they are there and readable."""
    items = textfile.read_object(record.folder / "eval.json").items()
    numbers = {k: x for k, x in items if isinstance(x, list) and len(x) == 3}
    numbers |= {k: [x, None, None] for k, x in items if isinstance(x, float)}
    cell = lambda x: f"{x:.3f}" if isinstance(x, int | float) else "–"
    table = Table(
        ["number", "value", "low", "high"], [[k, *map(cell, x)] for k, x in numbers.items()]
    )
    return [Text("Measured by jaxppo eval, with 95 % intervals:"), table] if numbers else []


def without_secrets(record: Run) -> Run:
    """The record without what looks like a secret in its settings and commands."""
    words = lambda x: scrub(x) if isinstance(x, str) else x
    settings = {name: words(x) for name, x in files.hide_secrets(record.settings).items()}
    commands = [scrub_command(line) for line in record.commands]
    return dataclasses.replace(record, settings=settings, commands=commands)


def scrub_command(line: str) -> str:
    """A line of command.txt without secrets.

    >>> scrub_command("python x.py --api-key abc --note hf_abcdefghijklmnopqrstuvwxyz")
    "python x.py --api-key '***' --note '***'"
    """
    try:
        words = shlex.split(line)
    except ValueError:
        return "(a damaged line)"
    return files.command_line([scrub(word) for word in words]) if words else ""


def scrub(text: str) -> str:
    """The text without tokens of well-known services and credentials in addresses."""
    return TOKENS.sub(HIDDEN, files.CREDENTIALS.sub(f"//{HIDDEN}@", text))
