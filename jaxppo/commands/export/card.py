"""The sentences of a model card: how to load the model, what is in it, its limits."""

import json
import re

from jaxppo.config import RunConfig
from jaxppo.presets import ALGORITHMS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
ABOUT_METRICS = (
    "Training: means of the run's last 10 steps. In brackets: 95 % intervals by bootstrap over the "
    "test examples, which say nothing about other seeds."
)


def hub_id(config: RunConfig) -> str:
    """The hub id of a run's first model, perhaps with "@revision"; "" for other names.

    >>> hub_id(RunConfig(model="me/model@v1")), hub_id(RunConfig(model="smollm2"))
    ('me/model@v1', '')
    >>> hub_id(RunConfig(model="runs/a/start"))
    ''
    """
    return config.model if HUB_ID.fullmatch(config.model) and not config.tiny else ""


def front_matter(base: str, *, adapter: bool, licence: str = "") -> str:
    """The card's metadata for the hub. `base` is a hub id, `licence` that of the base;
    "" = unknown.
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
    """Python that loads the folder; the base of an adapter by its hub id, or from the
    folder base/.
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
    """About the files."""
    other = f" Training computed in {config.dtype}." if config.dtype != dtype else ""
    body = ", and the body of the separate critic" if config.critic == "separate" else ""
    value = (
        f"value_head.safetensors holds the linear layer that estimated returns in training{body}. "
        "Generation does not need it."
    )
    return [f"The weights are {dtype}.{other}"] + [value] * (config.value_loss != "none")


def method(config: RunConfig, last: dict[str, float]) -> list[str]:
    """The algorithm, if the last step was one of policy optimisation."""
    chosen = ALGORITHMS.get(config.algorithm)
    known = "reward" in last and chosen
    return [f"{config.algorithm}: {chosen.about} ({chosen.paper})"] if chosen and known else []


def prompting(c: RunConfig, start: str) -> list[str]:
    """How to format a prompt, if it is not the bare text; the tokenizer alone does not
    do it. `start` is the token that every prompt began with, or "".
    """
    out = []
    if c.prompt_format != "{prompt}":
        out.append(f"The format of prompts was {c.prompt_format!r}.")
    if start:
        out.append(
            f"Every prompt began with the token {start!r}, which the tokenizer does not add: put "
            "it in front of your text."
        )
    if c.chats:
        out.append(
            "Prompts were chats in the tokenizer's chat template: write them with "
            "tokenizer.apply_chat_template(messages, add_generation_prompt=True)."
        )
    if c.stop:
        out.append(
            f"Responses also ended with any of the texts {', '.join(map(repr, c.stop))}: give them "
            "to generate, with stop_strings=[...] and tokenizer=tokenizer."
        )
    return out


def limits(c: RunConfig, last: dict[str, float]) -> list[str]:
    """What the model was not trained for."""
    out = [
        f"Trained on prompts of at most {c.prompt_length} tokens and responses of at most "
        f"{c.response_length}, never on longer ones.",
        f"Sampled with temperature {c.temperature}, top_k {c.top_k} (0 = all), top_p {c.top_p}; "
        "other settings were not measured.",
    ]
    if "reward" in last:
        out.append(
            "It was trained to score well by one reward, and may exploit what that reward "
            "overlooks."
        )
    return [
        *out,
        "It inherits the licence, the biases and the errors of its base model and of the data.",
    ]
