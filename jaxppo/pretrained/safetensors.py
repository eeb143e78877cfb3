"""Read and write the safetensors files of a checkpoint folder, whole or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxppo.errors import PretrainedError, first_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_INDEX_BYTES = 2**26


def read_folder(folder: Path) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return every tensor of a checkpoint folder in float32, by name. Raises
    PretrainedError for a missing or damaged file, a shard outside the folder, and a
    missing or quantised tensor.
    """
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise PretrainedError(
            f"{folder} has no {SINGLE} and no {INDEX}; save the checkpoint in safetensors"
        )
    shards = _read_index(folder / INDEX)
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise PretrainedError(
                f"{folder} lacks {shard}, which its {INDEX} names; download it again"
            )
        tensors |= read_file(folder / shard, [name for name, x in shards.items() if x == shard])
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name -> file name, checked to be in the folder."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise PretrainedError(
            f"{path} is larger than {MAX_INDEX_BYTES} bytes; it is not an index of shards"
        )
    try:
        shards = json.loads(path.read_text("utf-8"))["weight_map"]
        names = set(shards.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = set()
    if not names or not all(isinstance(name, str) for name in names):
        raise PretrainedError(f"{path} has no weight_map of names; download it again")
    for name in names:
        plain = PurePosixPath(name).name == name and not {"\\", ":"} & set(name)
        if not plain or not name.endswith(".safetensors"):
            raise PretrainedError(
                f"{path} names the shard {name!r}, which is not a file of its own folder"
            )
    return shards


def read_file(path: Path, names: list[str] | None = None) -> dict[str, Float32[np.ndarray, "..."]]:
    """Return the named tensors of one file, or all of them, in float32."""
    tensors = {}
    try:
        # the library bounds and checks the header
        with safe_open(path, framework="numpy") as file:
            stored = set(file.keys())
            if names is not None and (missing := sorted(set(names) - stored)):
                raise PretrainedError(
                    f"{path} lacks {missing[0]!r}, which its index names; download it again"
                )
            for name in sorted(stored) if names is None else names:
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS:
                    raise PretrainedError(
                        f"{path}: {name!r} is stored as {kind}; "
                        "use a checkpoint that is not quantised"
                    )
                tensors[name] = np.asarray(file.get_tensor(name), np.float32)
    # the last three are NumPy's, for shapes that it does not have
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        raise PretrainedError(
            f"{path} is not a whole safetensors file ({first_line(error)}); download it again"
        ) from error
    return tensors


def write_file(
    path: Path,
    tensors: Mapping[str, Float[np.ndarray, "..."]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors to one file. transformers needs the metadata {"format": "pt"}."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata=metadata)
