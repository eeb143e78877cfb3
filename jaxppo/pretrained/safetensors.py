"""Read the safetensors files of a checkpoint folder, in one piece or in shards. Nothing
in them is ever executed.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float, Float32

from jaxppo.errors import PretrainedError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_INDEX_BYTES = 2**26


def read_folder(folder: Path) -> dict[str, Float32[np.ndarray, "..."]]:
    """Every tensor of a checkpoint folder in float32, by name; the files are
    memory-mapped.

    Raises:
        PretrainedError: when there is no such file, a shard is missing or named outside
        the folder, a tensor is not in
            the shard that should have it, a file is damaged, or a tensor is not in
            floating point (quantised).
    """
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise PretrainedError(
            f"{folder} has no {SINGLE} and no {INDEX}; save the checkpoint in safetensors"
        )
    where = _index(folder / INDEX)
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(where.values())):
        if not (folder / shard).is_file():
            raise PretrainedError(
                f"{folder} lacks {shard}, which its {INDEX} names; download it again"
            )
        names = [name for name, file in where.items() if file == shard]
        tensors |= read_file(folder / shard, names)
    return tensors


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file name. The file comes from a stranger: it may name only files
    that lie beside it.
    """
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise PretrainedError(
            f"{path} is larger than {MAX_INDEX_BYTES} bytes; it is not an index of shards"
        )
    try:
        where = json.loads(path.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        where = None
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(file, str) for file in where.values())
    ):
        raise PretrainedError(f"{path} has no weight_map of names; download it again")
    for file in set(where.values()):
        if (
            PurePosixPath(file).name != file
            or "\\" in file
            or ":" in file
            or not file.endswith(".safetensors")
        ):
            raise PretrainedError(
                f"{path} names the shard {file!r}, which is not a file of its own folder; it was not read"
            )
    return where


def read_file(path: Path, names: list[str] | None = None) -> dict[str, Float32[np.ndarray, "..."]]:
    """The named tensors of one file (or all of them) in float32."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        # the library bounds and checks the header
        with safe_open(path, framework="numpy") as file:
            stored = set(file.keys())
            if names is not None and (missing := sorted(set(names) - stored)):
                raise PretrainedError(
                    f"{path} lacks {missing[0]!r}, which the index says it has; download it again"
                )
            for name in names if names is not None else sorted(stored):
                kind = file.get_slice(name).get_dtype()
                if kind not in FLOATS:
                    raise PretrainedError(
                        f"{path}: {name!r} is stored as {kind}; use a checkpoint that is not quantised"
                    )
                tensors[name] = np.asarray(file.get_tensor(name), np.float32)
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        OverflowError,
    ) as error:  # NumPy's for shapes it does not have
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise PretrainedError(
            f"{path} is not a whole safetensors file ({reason}); download it again"
        ) from error
    return tensors


def write_file(
    path: Path,
    tensors: Mapping[str, Float[np.ndarray, "..."]],
    *,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors into one file; transformers wants the metadata {"format": "pt"},
    whoever wrote it.
    """
    from safetensors.numpy import save_file

    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        path,
        metadata=metadata,
    )
