"""One tokenizer class for every checkpoint."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import tokenizers
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, pre_tokenizers

from jaxppo.errors import PretrainedError, first_line

FILE = "tokenizer.json"
END = "<|endoftext|>"


class Tokenizer:
    """Converts text to ids and back. It never adds special tokens by itself."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int | None,
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        """Wrap a tokenizer; `pad_id` is the end of text by default. Raises
        PretrainedError without end of text, or for an id outside the vocabulary.
        """
        if eos_id is None:
            raise PretrainedError(
                "the tokenizer names no end-of-text token; "
                "set eos_token in its tokenizer_config.json"
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
                    f"the tokenizer's {name} id {token} is outside its vocabulary "
                    f"of {self.vocab_size}"
                )

    @property
    def start_id(self) -> int | None:
        """The token that starts a document in pretraining, to put before a prompt: in
        chat models bos starts a chat turn, and most saw `<|endoftext|>` between
        documents.
        """
        found = self._backend.token_to_id(END)
        return self.bos_id if found is None else found

    @property
    def decoder(self) -> decoders.Decoder | None:
        """What turns tokens into text; None joins them with spaces."""
        return self._backend.decoder

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = True) -> str:
        """Return the text of ids, which may be an array [L]."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(
        self, rows: Iterable[Iterable[SupportsInt]], *, skip_special: bool = True
    ) -> list[str]:
        """Return the texts of many rows of ids, which may be an array [B L]."""
        return self._backend.decode_batch(
            [[int(i) for i in row] for row in rows], skip_special_tokens=skip_special
        )

    def apply_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return messages {"role": ..., "content": ...} in the chat format."""
        if self.chat_template is None:
            raise PretrainedError("this checkpoint has no chat template; give plain text")
        # The template comes with the checkpoint: only the sandbox may run it.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                eos_token=self.token(self.eos_id),
                bos_token="" if self.bos_id is None else self.token(self.bos_id),
            )
        except TemplateError as error:
            raise PretrainedError(
                f"the checkpoint's chat template does not take these messages ({error})"
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return what `tokenizer.json` does not hold."""
        ids = {"eos_id": self.eos_id, "bos_id": self.bos_id, "pad_id": self.pad_id}
        return {**ids, "chat_template": self.chat_template}

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, without `settings`."""
        (folder / FILE).write_text(self._backend.to_str(), "utf-8")


def byte_level(
    model: tokenizers.models.Model, *, special: Iterable[str] = (), use_regex: bool = True
) -> tokenizers.Tokenizer:
    """Return a tokenizer over bytes as GPT-2 has it: it can write every text."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special_tokens(special))
    return backend


def special_tokens(names: Iterable[str]) -> list[AddedToken]:
    """Return tokens that are never split, and that decoding leaves out."""
    return [AddedToken(name, special=True, normalized=False) for name in names]


def from_file(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read the tokenizer that `Tokenizer.save` wrote."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(folder / FILE))
    except Exception as error:  # the library raises bare Exception
        raise PretrainedError(
            f"{folder / FILE} cannot be read ({error}); delete the folder and start again"
        ) from error
    return Tokenizer(backend, **settings)


def from_transformers(folder: Path) -> Tokenizer:
    """Read a checkpoint folder's tokenizer, without running code in the folder."""
    from transformers import AutoTokenizer  # takes seconds

    try:
        found = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # what a stranger's files make the library raise is not documented
    except Exception as error:
        raise PretrainedError(
            f"{folder} has no tokenizer that can be read ({first_line(error)}); "
            "put its tokenizer files there"
        ) from error
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise PretrainedError(
            f"{folder} has a slow tokenizer; save it as tokenizer.json with transformers"
        )
    backend.no_padding()
    backend.no_truncation()
    return Tokenizer(
        backend,
        eos_id=found.eos_token_id,
        bos_id=found.bos_token_id,
        pad_id=found.pad_token_id,
        chat_template=found.chat_template if isinstance(found.chat_template, str) else None,
    )


def to_transformers(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json, which AutoTokenizer needs as well."""
    stored = {
        # not the family's own class, which would split texts its own way
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "left",  # as in training
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "pad_token": tokenizer.token(tokenizer.pad_id),
    }
    if tokenizer.bos_id is not None:
        stored["bos_token"] = tokenizer.token(tokenizer.bos_id)
    if tokenizer.chat_template is not None:
        stored["chat_template"] = tokenizer.chat_template
    return stored
