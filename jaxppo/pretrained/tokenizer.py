"""One tokenizer class for every checkpoint."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Int64
from tokenizers import AddedToken, decoders, pre_tokenizers, processors

from jaxppo.data import textfile
from jaxppo.errors import PretrainedError, first_line
from jaxppo.pretrained import chat_template

FILE = "tokenizer.json"
END = "<|endoftext|>"
USER = {"role": "user", "content": "x"}
# where a folder names the ends of its texts, besides the tokenizer's own files
MODEL_FILES = ("generation_config.json", "config.json")


class Tokenizer:
    """Converts text to ids and back. It never adds special tokens by itself."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_id: int | Sequence[int] | None,
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """Wrap a tokenizer. Raises PretrainedError without end of text, or for an id
        that has no token.

        Args:
          eos_id: the ids that end a text; the first is the one to write.
          pad_id: the end of text by default.
          chat_template: one, or several by name, of which "default" is used.
          special_tokens: what templates may name, such as {"unk_token": "<unk>"}; by
            default "eos_token", "bos_token" and "pad_token".
        """
        ends = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id or ())
        if not ends:
            raise PretrainedError(
                "the tokenizer names no end-of-text token; "
                "set eos_token in its tokenizer_config.json"
            )
        # a file may say that texts are padded or cut
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._ids = np.unique(list(backend.get_vocab(with_added_tokens=True).values()))
        # the largest id + 1: there may be holes
        self.vocab_size: int = int(self._ids.max()) + 1
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(int(end) for end in ends))
        self.eos_id = self.eos_ids[0]
        self.bos_id = None if bos_id is None else int(bos_id)
        self.pad_id = self.eos_id if pad_id is None else int(pad_id)
        self.chat_template = chat_template
        named = [("bos", self.bos_id), ("pad", self.pad_id)]
        for name, token in [*(("eos", end) for end in self.eos_ids), *named]:
            if token is not None and token not in self._ids:
                raise PretrainedError(
                    f"the tokenizer's {name} id {token} is outside its vocabulary "
                    f"of {self.vocab_size}"
                )
        known = {"eos_token": self.eos_id, "bos_token": self.bos_id, "pad_token": self.pad_id}
        self.special_tokens: dict[str, str] = (
            {name: self.token(i) for name, i in known.items() if i is not None}
            if special_tokens is None
            else dict(special_tokens)
        )

    @property
    def start_id(self) -> int | None:
        """The token that starts a document in pretraining, to put before a prompt: in
        chat models bos starts a chat turn, and most saw `<|endoftext|>` between
        documents.
        """
        found = self._backend.token_to_id(END)
        return self.bos_id if found is None else found

    @functools.cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What the tokenizer's own post-processor puts before a text, as `<s>`, and
        `encode` does not.
        """
        texts = ("a", "1", ".", *map(self.token, self._ids.tolist()))
        encode = lambda text, special: self._backend.encode(text, add_special_tokens=special).ids
        text = next((text for text in texts if text and encode(text, False)), "")
        own, whole = encode(text, False), encode(text, True)
        starts = range(len(whole) - len(own) + 1)
        return tuple(next((whole[:n] for n in starts if whole[n : n + len(own)] == own), ()))

    def missing(self, size: int) -> Int64[np.ndarray, "m"]:
        """Return the ids below `size` that have no token, such as the rows with which
        an embedding is padded.
        """
        return np.setdiff1d(np.arange(size), self._ids)

    @property
    def decoder(self) -> decoders.Decoder | None:
        """What turns tokens into text; None joins them with spaces."""
        return self._backend.decoder

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it; "" for an id without one."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, ids: Iterable[SupportsInt], *, skip_special: bool = True) -> str:
        """Return the text of ids, which may be an array [L]."""
        return self.decode_batch([ids], skip_special=skip_special)[0]

    def decode_batch(
        self, rows: Iterable[Iterable[SupportsInt]], *, skip_special: bool = True
    ) -> list[str]:
        """Return the texts of many rows of ids, which may be an array [B L].

        `skip_special` leaves out special tokens but those inside an answer, such as
        `<think>`: the chat template has them, and a user's message has not.
        """
        own = [[int(i) for i in row] for row in rows]
        if skip_special and self._inside:
            own = [[i for i in row if i not in self._outside] for row in own]
            skip_special = False
        return self._backend.decode_batch(own, skip_special_tokens=skip_special)

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        added = self._backend.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    @functools.cached_property
    def _inside(self) -> set[int]:
        """Special tokens that belong to the text of an answer."""
        template = self._template()
        if template is None:
            return set()
        try:
            asked = self.apply_chat([USER], add_generation_prompt=False)
        except PretrainedError:  # it wants other messages
            return set()
        known = {*self.eos_ids, self.bos_id, self.pad_id}
        named = set(self.special_tokens.values())
        return {
            i
            for i, token in self._special.items()
            if token in template and token not in asked and token not in named and i not in known
        }

    @functools.cached_property
    def _outside(self) -> set[int]:
        return self._special.keys() - self._inside

    def _template(self) -> str | None:
        if isinstance(self.chat_template, Mapping):
            return self.chat_template.get("default")
        return self.chat_template

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return messages {"role": ..., "content": ...} in the chat format."""
        template = self._template()
        if template is None:
            names = ", ".join(sorted(self.chat_template or ()))
            found = f" named default, only {names}" if names else ""
            raise PretrainedError(f"this checkpoint has no chat template{found}; give plain text")
        return chat_template.render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def settings(self) -> dict[str, Any]:
        """Return what `tokenizer.json` does not hold."""
        several = len(self.eos_ids) > 1
        return {
            "eos_id": list(self.eos_ids) if several else self.eos_id,
            "bos_id": self.bos_id,
            "pad_id": self.pad_id,
            "chat_template": self.chat_template,
            "special_tokens": self.special_tokens,
        }

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


def begin_with(tokens: Mapping[str, int]) -> processors.TemplateProcessing:
    """Return a post-processor that puts tokens, with their ids, before a text."""
    return processors.TemplateProcessing(single=[*tokens, "$A"], special_tokens=[*tokens.items()])


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
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    stored = [_known_ids(textfile.read_object(folder / name), special) for name in MODEL_FILES]
    own = found.eos_token_id
    pads = [pad for _, pad in stored if pad is not None]
    return Tokenizer(
        backend,
        eos_id=[*([] if own is None else [own]), *(end for ends, _ in stored for end in ends)],
        bos_id=found.bos_token_id,
        pad_id=next(iter(pads), None) if found.pad_token_id is None else found.pad_token_id,
        chat_template=found.chat_template,
        special_tokens=_named_tokens(folder, found.special_tokens_map, found.chat_template),
    )


def _named_tokens(folder: Path, known: Mapping[str, str], template: Any) -> dict[str, str]:
    """Return the special tokens that the folder names, or its template: the class of a
    family has defaults for others.
    """
    said = [str(template)]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said += textfile.read_object(folder / name)
    return {name: token for name, token in known.items() if any(name in x for x in said)}


def _known_ids(stored: Mapping[str, Any], special: set[int]) -> tuple[list[int], int | None]:
    """(ends of text, padding or None) in a checkpoint's settings. Only special tokens
    count: transformers writes its defaults, such as 2, for every model.
    """
    ends, pad = stored.get("eos_token_id"), stored.get("pad_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    known = [x for x in (*ends, pad) if type(x) is int and x in special]
    return [end for end in known if end in ends], pad if pad in known else None


def to_transformers(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json, which AutoTokenizer needs as well."""
    templates = tokenizer.chat_template
    stored = {
        # not the family's own class, which would split texts its own way
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "padding_side": "left",  # as in training
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
        "eos_token": tokenizer.token(tokenizer.eos_id),
        "pad_token": tokenizer.token(tokenizer.pad_id),
    }
    if tokenizer.bos_id is not None:
        stored["bos_token"] = tokenizer.token(tokenizer.bos_id)
    if isinstance(templates, Mapping):
        templates = [{"name": name, "template": x} for name, x in templates.items()]
    if templates is not None:
        stored["chat_template"] = templates
    return stored
