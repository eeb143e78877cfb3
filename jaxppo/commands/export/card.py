"""What a model card says of an exported checkpoint, in sentences: how to load it, what
is in it, what it is not good for.
"""

import json
import re

from jaxppo.config import RunConfig
from jaxppo.presets import ALGORITHMS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
ABOUT_METRICS = (
    "Of training: means of the run's last 10 steps. In brackets: 95 %, by bootstrap over the test examples, which says nothing "
    "of other seeds."
)


def hub_id(config: RunConfig) -> str:
    """Where the model hub may have what a run began with: its id, perhaps with
    "@revision"; nothing for other names.

    >>> (
    ...     hub_id(RunConfig(model="me/model@v1")),
    ...     hub_id(RunConfig(model="smollm2")),
    ...     hub_id(RunConfig(model="runs/a/start")),
    ... )
    ('me/model@v1', '', '')
    """
    return config.model if HUB_ID.fullmatch(config.model) and not config.tiny else ""


def front_matter(base: str, *, adapter: bool, licence: str = "") -> str:
    """What the model hub reads; `base` is a hub id or empty, `licence` that of what the
    run began with, where it is known.
    """
    lines = [
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- jaxppo",
    ]
    lines += [f"base_model: {json.dumps(base.partition('@')[0])}"] if base else []
    lines += [f"license: {licence.lower()}"] if licence else []
    return "\n".join(["---", *lines, "---", "", ""])


def loading(base: str, *, adapter: bool) -> list[str]:
    """Lines of Python that load the folder; an adapter's base by its hub id, or from
    the folder `base`.
    """
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *["from peft import PeftModel"] * adapter,
        "",
    ]
    lines += [
        'folder = "the/folder/of/this/file"',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if not adapter:
        return [*lines, "model = AutoModelForCausalLM.from_pretrained(folder)"]
    name, _, revision = base.partition("@")
    known = (
        json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
        if base
        else 'folder + "/base"'
    )
    lines += [f"base = AutoModelForCausalLM.from_pretrained({known})"]
    return [*lines, "model = PeftModel.from_pretrained(base, folder)"]


def contents(config: RunConfig, dtype: str) -> list[str]:
    """What a reader has to know of the files."""
    other = (
        f" Products of matrices were {config.dtype} in training." if config.dtype != dtype else ""
    )
    body = (
        ", and the body of the critic, a network of its own" if config.critic == "separate" else ""
    )
    value = f"value_head.safetensors holds the linear layer that estimated returns in training{body}. To generate takes none of it."
    return [f"The weights are {dtype}.{other}"] + [value] * (config.value_loss != "none")


def method(config: RunConfig, last: dict[str, float]) -> list[str]:
    """The algorithm, where the run's last step was one of policy optimisation."""
    chosen = ALGORITHMS.get(config.algorithm)
    return (
        [f"{config.algorithm}: {chosen.about} ({chosen.paper})"]
        if "reward" in last and chosen
        else []
    )


def asking(c: RunConfig, start: str) -> list[str]:
    """How a prompt has to be put, where it was put otherwise than as bare text: the
    tokenizer alone does neither. `start` is the token that every prompt began with, if
    one did.
    """
    out = [f"Prompts were put as {c.prompt_format!r}."] if c.prompt_format != "{prompt}" else []
    begin = f"Every prompt began with the token {start!r}, which the tokenizer does not add: put it before your text."
    return out + [begin] * bool(start)


def limits(c: RunConfig, last: dict[str, float]) -> list[str]:
    """What it was not trained for."""
    lengths = (
        f"prompts of at most {c.prompt_length} tokens and responses of at most {c.response_length}"
    )
    out = [
        f"Trained on {lengths}; longer ones were never seen.",
        f"Sampled with temperature {c.temperature}, top_k {c.top_k} (0 = all), top_p {c.top_p}; others were not measured.",
    ]
    if "reward" in last:
        out += [
            "It was trained to score well by one reward, and may do so by what that reward overlooks."
        ]
    return [
        *out,
        "The licence, the biases and the errors of the model that it began as, and of the data, go on in it.",
    ]
