"""Text to token ids: bytes, or a Hugging Face tokenizer file on disk."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxpar.data.text import DataError


class Tokenizer(Protocol):
    """What the rest of jaxpar needs of a tokenizer. Ids are int32 arrays of shape [length]."""

    name: str
    vocab_size: int  # the largest id + 1: the rows that the embedding table needs
    eos_id: int  # ends every document
    fingerprint: str  # changes whenever the ids of some text would

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without any special token added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in order."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens left out."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, then end of document (256) and padding (257). Nothing to download."""

    name = "byte"
    vocab_size = 258
    eos_id = 256
    pad_id = 257
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        # A model's samples may stop within a character, so bytes that are no text are shown as U+FFFD.
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json` (https://huggingface.co/docs/tokenizers), end of document found beside it."""

    def __init__(self, file: Path):
        """Raises `DataError` if the file is no tokenizer, or if nothing says which token ends a document."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file}: not a tokenizer file of the Hugging Face tokenizers library ({error})") from error
        # A file may carry the truncation and padding of whoever saved it; here they would lose or add tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        eos = _eos_token(file, added)
        if eos not in vocab:
            raise DataError(f"{file}: the end-of-document token {eos!r} is not in its vocabulary")
        self.name = str(file)
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps, so the number of entries is not enough
        self.eos_id = vocab[eos]
        self.fingerprint = f"{hashlib.sha256(file.read_bytes()).hexdigest()} eos {self.eos_id}"

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])


def load_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer that `name` says.

    Args:
      name: None or "byte": `ByteTokenizer`. Else a tokenizer file, or a folder that holds a `tokenizer.json` (a model
        downloaded from Hugging Face). The token that ends a document is `eos_token` in `tokenizer_config.json` or
        `special_tokens_map.json` beside that file, else the only special token with one of the usual names.

    Raises:
      DataError: no such file or folder, not a tokenizer, or the token that ends a document is not known.
    """
    if name is None or name == "byte":
        return ByteTokenizer()
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = 'give "byte", a tokenizer.json, or a folder with one (jaxpar downloads nothing)'
        raise DataError(f"tokenizer {name!r}: there is no file {file.absolute()}; {hint}")
    return FileTokenizer(file)


_USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>")


def _eos_token(file: Path, special_tokens: set[str]) -> str:
    for config in (file.with_name("tokenizer_config.json"), file.with_name("special_tokens_map.json")):
        if not config.is_file():
            continue
        try:
            eos = json.loads(config.read_bytes()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config}: not a JSON object ({error})") from error
        if isinstance(eos, dict):  # an AddedToken with its options
            eos = eos.get("content")
        if isinstance(eos, str):
            return eos
    usual = [token for token in _USUAL_EOS if token in special_tokens]
    if len(usual) != 1:
        found = f"more than one of its special tokens could be it: {usual}" if usual else "none has a usual name"
        beside = file.with_name("tokenizer_config.json")
        raise DataError(f'{file}: which token ends a document? {found}; say "eos_token" in {beside}')
    return usual[0]
