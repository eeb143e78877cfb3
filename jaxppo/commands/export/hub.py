"""Upload an exported folder to the Hugging Face hub, after listing its files."""

import re
import sys
from pathlib import Path

from jaxppo.commands.export.folder import CARD, FILES, TOKENIZER
from jaxppo.errors import PretrainedError, UserError, first_line
from jaxppo.pretrained import peft, safetensors

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push(folder: Path, repo_id: str, *, public: bool, yes: bool) -> None:
    """Create the repository if needed, and upload the files that `jaxppo export` wrote.
    The login is that of the hub's client (`hf auth login`).

    Raises UserError for a folder that is no export, an invalid name, without a login or
    a confirmation, and for errors of the hub.
    """
    files = exported(folder)
    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no repository name; give user/name")
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise UserError("not logged in to the Hugging Face hub; run `hf auth login` first")
    api = huggingface_hub.HfApi()
    try:
        who, there = api.whoami()["name"], api.repo_exists(repo_id)
        about = "which exists" if there else f"a new {'public' if public else 'private'} repository"
        print(f"{folder} -> {repo_id} on the Hugging Face hub, as {who}, {about}:")
        for name in files:
            print(f"  {name}  {(folder / name).stat().st_size:,} bytes")
        if not yes and not confirmed():
            raise UserError("nothing was sent")
        if not there:
            api.create_repo(repo_id, private=not public)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Model from jaxppo",
        )
    except (OSError, ValueError) as error:  # base classes of the hub client's errors
        raise UserError(
            f"the Hugging Face hub refused it ({first_line(error)}); check the name, the login and "
            "the network"
        ) from error
    print(f"sent: {len(files)} files to {repo_id}")


def exported(folder: Path) -> list[str]:
    """The files of an export. Raises PretrainedError if any required one is missing."""
    files = [
        name for name in FILES if (folder / name).is_file() and not (folder / name).is_symlink()
    ]
    whole = {"config.json", safetensors.SINGLE} <= {*files} or {peft.CONFIG, peft.WEIGHTS} <= {
        *files
    }
    if not whole or not {CARD, *TOKENIZER} <= {*files}:
        raise PretrainedError(f"{folder} is no folder of `jaxppo export`; export the run first")
    return files


def confirmed() -> bool:
    """Ask for confirmation at the terminal."""
    if not sys.stdin.isatty():
        raise UserError("no terminal to ask for confirmation; give --yes")
    try:
        return input("upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
