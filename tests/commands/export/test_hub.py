"""What `jaxppo push` sends, and when it sends nothing; the hub is one that takes everything and
writes down what it was asked.
"""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from jaxppo.commands.export import folder, hub
from jaxppo.errors import UserError
from jaxppo.models.shapes import llama
from jaxppo.pretrained import mapping
from jaxppo.pretrained.tiny import byte_tokenizer

SHAPE = llama(vocab_size=300, width=8)


class Hub(types.ModuleType):
    """A hub that takes everything, and writes down what it was asked for."""

    def __init__(self, *, token: str | None = "t", there=False, fault: Exception | None = None):
        super().__init__("huggingface_hub")
        self.calls, self.token, self.there, self.fault = [], token, there, fault

    def get_token(self):
        return self.token

    def HfApi(self):
        return self

    def whoami(self):
        if self.fault:
            raise self.fault
        return {"name": "me"}

    def repo_exists(self, repo_id):
        return self.there

    def create_repo(self, repo_id, *, private):
        self.calls.append(("create", repo_id, private))

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        self.calls.append(("upload", repo_id, folder_path, allow_patterns))


@pytest.fixture
def ready(tmp_path) -> Path:
    params = mapping.unflatten(
        {name: np.zeros(shape, np.float32) for name, shape in mapping.param_shapes(SHAPE).items()}
    )
    folder.write_model(tmp_path, SHAPE, params, byte_tokenizer(), dtype="float32", sampling={})
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "private.txt").write_text("nobody's business")
    return tmp_path


def with_hub(monkeypatch, hub_: Hub, *, answer: str | None = None) -> Hub:
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub_)
    if answer is not None:
        monkeypatch.setattr(hub.sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr("builtins.input", lambda question: answer)
    return hub_


SENT = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize(("public", "there"), [(False, False), (True, False), (False, True)])
def test_push_asks_and_sends_the_exports_files_alone(public, there, ready, monkeypatch, capsys):
    fake = with_hub(monkeypatch, Hub(there=there), answer="y")
    hub.push(ready, "me/model", public=public, yes=False)
    made = [] if there else [("create", "me/model", not public)]
    assert fake.calls == [*made, ("upload", "me/model", ready, SENT)]
    shown = capsys.readouterr().out
    assert "as me" in shown and "private.txt" not in shown and "model.safetensors" in shown


@pytest.mark.parametrize("answer", ["", "n", "no", "yess"])
def test_without_a_yes_nothing_is_sent(answer, ready, monkeypatch):
    fake = with_hub(monkeypatch, Hub(), answer=answer)
    with pytest.raises(UserError, match="nothing was sent"):
        hub.push(ready, "me/model", public=False, yes=False)
    assert fake.calls == []


def test_push_refuses(ready, tmp_path, monkeypatch):
    fake = with_hub(monkeypatch, Hub())
    monkeypatch.setattr(hub.sys, "stdin", types.SimpleNamespace(isatty=lambda: False))
    with pytest.raises(UserError, match="give --yes"):
        hub.push(ready, "me/model", public=False, yes=False)
    for name in ("model", "a/b/c", "../x", "me/model\n", ""):
        with pytest.raises(UserError, match="no repository name"):
            hub.push(ready, name, public=False, yes=True)
    with pytest.raises(UserError, match="hf auth login"):
        with_hub(monkeypatch, Hub(token=None))
        hub.push(ready, "me/model", public=False, yes=True)
    with pytest.raises(UserError, match="refused it .401 no.;") as error:
        with_hub(monkeypatch, Hub(fault=OSError("401 no\nmore lines")))
        hub.push(ready, "me/model", public=False, yes=True)
    assert "\n" not in str(error.value)
    (ready / "README.md").unlink()
    with pytest.raises(UserError, match="no folder of `jaxppo export`"):
        hub.push(ready, "me/model", public=False, yes=True)
    assert fake.calls == []
