"""Write a checkpoint as files of other libraries: a folder for transformers, an adapter
for PEFT, a value head in PyTorch's layout.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

from jaxppo.errors import PretrainedError
from jaxppo.models.shapes import ModelConfig
from jaxppo.pretrained import mapping, peft, safetensors, settings
from jaxppo.pretrained.tokenizer import Tokenizer, begin_with, to_transformers

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

VALUE, CARD = "value_head.safetensors", "README.md"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
MODEL = ("config.json", "generation_config.json", safetensors.SINGLE, *TOKENIZER)

# All files that an export may have.
FILES = (CARD, *MODEL, peft.WEIGHTS, peft.CONFIG, VALUE, *(f"{peft.BASE}/{name}" for name in MODEL))

PYTORCH = {"format": "pt"}


def check_free(folder: Path) -> Path:
    """The absolute path of a new folder. Raises PretrainedError if it exists and is not
    an empty folder.
    """
    place = folder.expanduser().absolute()
    try:
        if place.is_symlink() or (place.exists() and (not place.is_dir() or any(place.iterdir()))):
            raise PretrainedError(
                f"{folder} exists and is not an empty folder; give another name, or remove it"
            )
    except OSError as error:
        raise PretrainedError(
            f"{folder} cannot be read ({error.strerror}); give another name"
        ) from error
    if place.name in ("", "..") or place == Path.cwd():
        raise PretrainedError(f"{folder} has no name of its own; give the name of a new folder")
    return place


def write_model(
    folder: Path,
    model: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    dtype: str,
    sampling: Mapping[str, Any],
    start: Sequence[int] = (),
) -> None:
    """Write the files that `AutoModelForCausalLM` and `AutoTokenizer` load: weights,
    config.json, generation_config.json and the tokenizer's.

    Args:
      folder: an existing one.
      params: nested dicts of float32 arrays without value head, kernels [in, out].
      dtype: float32 or bfloat16, of all tensors.
      sampling: settings for `generate`.
      start: see `write_tokenizer`.

    Raises PretrainedError for a network that transformers has no class for, and for
    parameters of another shape.
    """
    ends = tokenizer.eos_ids
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    stored = settings.to_transformers(model)
    tensors = mapping.to_checkpoint(stored["model_type"], model, params)
    write_json(folder / "config.json", {**stored, **ids, "dtype": dtype})
    write_json(folder / "generation_config.json", {"do_sample": True, **sampling, **ids})
    safetensors.write_file(folder / safetensors.SINGLE, cast(tensors, dtype), metadata=PYTORCH)
    write_tokenizer(folder, model, tokenizer, start=start)


def write_tokenizer(
    folder: Path, model: ModelConfig, tokenizer: Tokenizer, *, start: Sequence[int] = ()
) -> None:
    """Write tokenizer.json and tokenizer_config.json. The tokenizer puts `start`, what
    began every prompt in training, before a text if it did so by itself, and nothing
    else.
    """
    tokenizer.save(folder)
    stored = json.loads((folder / TOKENIZER[0]).read_text("utf-8"))
    if "TemplateProcessing" in json.dumps(stored.get("post_processor")):
        own = bool(start) and tuple(start) == tokenizer.start_ids
        adding = (
            json.loads(begin_with({tokenizer.token(i): i for i in start}).__getstate__())
            if own
            else None
        )
        write_json(folder / TOKENIZER[0], stored | {"post_processor": adding})
    write_json(folder / "tokenizer_config.json", to_transformers(tokenizer, model.max_length))


def write_adapter(
    folder: Path,
    model: ModelConfig,
    adapters: Mapping[str, Any],
    *,
    alpha: float,
    base: str,
    dtype: str,
    rslora: bool = False,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
      adapters, alpha, rslora: as in `peft.from_run`.
      base: hub id of the base model, perhaps with "@revision"; "" = unknown.
    """
    family = settings.family_of(model)
    own, tensors = peft.from_run(family, model, adapters, alpha=alpha, rslora=rslora)
    name, _, revision = base.partition("@")
    stored = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name or None,
        "revision": revision or None,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        **own,
    }
    write_json(folder / peft.CONFIG, stored)
    safetensors.write_file(folder / peft.WEIGHTS, cast(tensors, dtype), metadata=PYTORCH)


def adapters(trained: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's adapters in the trained parameters, with layers unrolled. Raises
    PretrainedError if there are none.
    """
    names = r"(?P<layer>layers(_\d+)?)/(?P<place>.+/lora_[ab])"
    out = {}
    for name, tensor in mapping.flatten(trained).items():
        match = re.fullmatch(names, name)
        if match and match["layer"] == "layers":  # scanned: one array for all of them
            out |= {
                f"layers_{i}/{match['place']}": np.asarray(x, np.float32)
                for i, x in enumerate(np.asarray(tensor))
            }
        elif match:
            out[name] = np.asarray(tensor, np.float32)
    if not out:
        raise PretrainedError(
            "the run has no adapters: it trained every weight (--lora 0); leave --adapter out"
        )
    return mapping.unflatten(out)


def write_value(
    folder: Path,
    model: ModelConfig,
    head: Mapping[str, Any],
    body: Mapping[str, Any] | None,
    *,
    dtype: str,
) -> None:
    """Write value_head.safetensors: `value.weight` [1 D] and `value.bias` [1] of a
    linear layer on the last hidden states; with `body`, also the network of a separate
    critic, under the names of its family.
    """
    kernel, bias = (np.asarray(head[name], np.float32) for name in ("kernel", "bias"))
    # The head is always float32, as in training.
    out: dict[str, Any] = {"value.weight": kernel.T, "value.bias": bias.reshape(1)}
    if body is not None:
        own = mapping.to_checkpoint(settings.family_of(model), model, body)
        out |= cast(
            {name: tensor for name, tensor in own.items() if name != "lm_head.weight"}, dtype
        )
    safetensors.write_file(folder / VALUE, out, metadata=PYTORCH)


def cast(
    tensors: Mapping[str, Float32[np.ndarray, "..."]], dtype: str
) -> dict[str, Float[np.ndarray, "..."]]:
    """The tensors in another type, rounded to nearest."""
    return {name: np.asarray(x).astype(DTYPES[dtype]) for name, x in tensors.items()}


def write_json(path: Path, stored: Mapping[str, Any]) -> None:
    """Write JSON as transformers does."""
    path.write_text(json.dumps(stored, indent=2) + "\n", "utf-8")
