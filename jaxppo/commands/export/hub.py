"""An exported folder to the model hub: what is sent is named first, and nothing is sent
without a yes.
"""

import re
import sys
from pathlib import Path

from jaxppo.commands.export.folder import ADAPTER, ADAPTER_CONFIG, CARD, FILES, TOKENIZER
from jaxppo.errors import PretrainedError, UserError
from jaxppo.pretrained import safetensors

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push(folder: Path, repo_id: str, *, public: bool, yes: bool) -> None:
    """Make the repository where it is not there, and send the files that `jaxppo
    export` writes; others stay here.

    The login is the hub client's own (`hf auth login`, or its environment variable).

    Raises:
        UserError: for a folder that is no export, a name that is none, without a login,
        without a yes; and what the hub says.
    """
    files = exported(folder)
    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no name of a repository; give user/name")
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise UserError("not logged in to the model hub; run `hf auth login` first")
    api = huggingface_hub.HfApi()
    try:
        who, there = api.whoami()["name"], api.repo_exists(repo_id)
        made = (
            "which is there already"
            if there
            else f"which is made anew, {'for all to see' if public else 'private'}"
        )
        print(f"{folder} -> {repo_id} on the model hub, as {who}, {made}:")
        for name in files:
            print(f"  {name}  {(folder / name).stat().st_size:,} bytes")
        if not yes and not agreed():
            raise UserError("nothing was sent")
        if not there:
            api.create_repo(repo_id, private=not public)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Model from jaxppo",
        )
    except (
        OSError,
        ValueError,
    ) as error:  # the hub's errors and its HTTP client's derive from these
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"the model hub did not take it ({reason}); check the name, the login and the network"
        ) from error
    print(f"sent: {len(files)} files to {repo_id}")


def exported(folder: Path) -> list[str]:
    """The files of an export. Raises PretrainedError when the folder has not all that
    one must have.
    """
    files = [
        name for name in FILES if (folder / name).is_file() and not (folder / name).is_symlink()
    ]
    whole = {"config.json", safetensors.SINGLE} <= {*files} or {ADAPTER_CONFIG, ADAPTER} <= {*files}
    if not whole or not {CARD, *TOKENIZER} <= {*files}:
        raise PretrainedError(f"{folder} is not what `jaxppo export` writes; export the run first")
    return files


def agreed() -> bool:
    """Whether somebody at the terminal says yes."""
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked; say --yes")
    try:
        return input("send it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
