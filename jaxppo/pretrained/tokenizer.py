"""One tokenizer class for every checkpoint: text to ids and back."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import tokenizers

from jaxppo.errors import PretrainedError

FILE = "tokenizer.json"


class Tokenizer:
    """Text to ids and back; never adds special tokens on its own."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int | None,
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        """Wrap a tokenizer of the package `tokenizers`; without a pad id, the end of
        text pads.

        Raises:
            PretrainedError: when there is no end-of-text token, or an id lies outside
            the vocabulary.
        """
        if eos_id is None:
            raise PretrainedError(
                "the tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json"
            )
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = int(eos_id)
        self.bos_id = None if bos_id is None else int(bos_id)
        self.pad_id = self.eos_id if pad_id is None else int(pad_id)
        self.chat_template = chat_template
        for name, token in (("eos", self.eos_id), ("bos", self.bos_id), ("pad", self.pad_id)):
            if token is not None and not 0 <= token < self.vocab_size:
                raise PretrainedError(
                    f"the tokenizer's {name} id {token} is outside its vocabulary of {self.vocab_size}"
                )

    @property
    def start_id(self) -> int | None:
        """The token that starts a document in pretraining, to put before a text that
        has nothing before it.

        Chat models name the start of a chat turn as bos; between documents most of them
        saw `<|endoftext|>`.
        """
        found = self._backend.token_to_id("<|endoftext|>")
        return self.bos_id if found is None else found

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = True) -> str:
        """The text of ids, which may be an array [L]."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(
        self, rows: Iterable[Iterable[SupportsInt]], *, skip_special: bool = True
    ) -> list[str]:
        """The texts of many rows of ids, which may be an array [B L]."""
        return self._backend.decode_batch(
            [[int(i) for i in row] for row in rows], skip_special_tokens=skip_special
        )

    def apply_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation [{"role": ..., "content": ...}, ...] in the
        checkpoint's own chat format.
        """
        if self.chat_template is None:
            raise PretrainedError("this checkpoint has no chat template; give plain text")
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise PretrainedError(
                "chat templates need jinja2 (of the extra demo): pip install jinja2"
            ) from error
        # The template comes with the checkpoint: only the sandbox may run it.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        names: dict[str, Any] = {
            "eos_token": self._token(self.eos_id),
            "bos_token": self._token(self.bos_id),
        }
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **names
            )
        except TemplateError as error:
            raise PretrainedError(
                f"the checkpoint's chat template does not take these messages ({error})"
            ) from error

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self.token(token_id)

    def settings(self) -> dict[str, Any]:
        """What `tokenizer.json` does not hold."""
        ids = {"eos_id": self.eos_id, "bos_id": self.bos_id, "pad_id": self.pad_id}
        return {**ids, "chat_template": self.chat_template}

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`; `settings` go elsewhere."""
        (folder / FILE).write_text(self._backend.to_str(), "utf-8")


def from_file(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote."""
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(folder / FILE))
    except Exception as error:  # the library raises bare Exception
        raise PretrainedError(
            f"{folder / FILE} cannot be read ({error}); delete the folder and start again"
        ) from error
    return Tokenizer(backend, **settings)


def from_transformers(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, through `transformers.AutoTokenizer`; code
    in the folder is never run.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # what a stranger's files make the library raise is not documented
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise PretrainedError(
            f"{folder} has no tokenizer that can be read ({reason}); put its tokenizer files there"
        ) from error
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise PretrainedError(
            f"{folder} has a slow tokenizer; save it as tokenizer.json with transformers"
        )
    backend.no_padding()
    backend.no_truncation()
    template = found.chat_template if isinstance(found.chat_template, str) else None
    return Tokenizer(
        backend,
        eos_id=found.eos_token_id,
        bos_id=found.bos_token_id,
        pad_id=found.pad_token_id,
        chat_template=template,
    )


def as_transformers(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json: what `transformers.AutoTokenizer` needs beside
    tokenizer.json.
    """
    ids = {
        "eos_token": tokenizer.eos_id,
        "bos_token": tokenizer.bos_id,
        "pad_token": tokenizer.pad_id,
    }
    names = {
        name: tokenizer.token(token_id) for name, token_id in ids.items() if token_id is not None
    }
    template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    # Not the family's own class, which would split texts in a way of its own; padding
    # as in training.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **names,
        **template,
    }
