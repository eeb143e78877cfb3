"""Read text files of users: UTF-8 with or without a byte order mark, with any line
ends.
"""

import json
from pathlib import Path
from typing import Any

from jaxppo.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"  # a file that stands for a large one
LFS_CURE = "a pointer of Git LFS, not the file; fetch the file with: git lfs pull"


def read(path: str | Path, *, max_bytes: int = 2**30, what: str = "text file") -> str:
    r"""Return the text of a file, with \n as its line ends.

    Raises UserError for a file that cannot be read, is not UTF-8, or has more than
    `max_bytes`, and then is no `what`.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a {what}") from None
    if len(raw) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:,} bytes: it is no {what}")
    return decode(raw, path)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if it is missing or damaged."""
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def decode(raw: bytes, name: str | Path) -> str:
    r"""Return text in UTF-8 without a byte order mark, with \n as its line ends. Raises
    UserError with the number of the first wrong byte, and for a pointer of Git LFS.

    >>> decode(b"\xef\xbb\xbfa\r\nb\rc\n", "x.txt")
    'a\nb\nc\n'
    """
    if raw.startswith(LFS):
        raise UserError(f"{name} is {LFS_CURE}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
