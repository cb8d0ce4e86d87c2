"""Text to token ids: the one call of the tokenizer, the one rule for BOS, and the cache of what was tokenized.

The tokenizer call never adds special tokens; who needs the start token puts `start_token_id` there.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.files import refuse_half_characters
from corpora.json_files import Hash
from corpora.paths import outputs_dir
from corpora.storage import identity, read_artefact, write_artefact

__all__ = ["cached_ids", "encode", "start_token_id", "text_hash", "tokenizer_fingerprint"]

log = logging.getLogger(__name__)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of `text` as it stands: no BOS, no EOS, no truncation, whatever the tokenizer's own template says.

    Raises UserError for half of a character, which the readers refuse in files with the place: here it was typed.
    """
    refuse_half_characters(text, f"the text {text[:20]!r}…")
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def start_token_id(tokenizer: Any) -> int:
    """Id of the token that every sequence starts with: BOS, or EOS for the tokenizers that have no BOS (Qwen2).

    Those models were trained on documents parted by EOS, so it is what a text starts with there.
    Raises UserError if the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path!r} has neither a BOS nor an EOS token, so nothing can open a sequence; "
        "set bos_token in its tokenizer_config.json"
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identity of what a tokenizer does to text: 16 hexadecimal digits. Its path and its settings do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return identity({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}, 16)
    return _fingerprint(backend.to_str())


@lru_cache(maxsize=4)  # a fifth of a second for a usual vocabulary, asked for several times a run
def _fingerprint(backend: str) -> str:
    content = json.loads(backend)
    content.pop("truncation", None)  # the state that the last call left
    content.pop("padding", None)
    return identity(content, 16)


class _Header(TypedDict):
    key: Hash  # identity of what the ids are made of


def cached_ids(made_of: Mapping[str, Any], make: Callable[[], list[int] | torch.Tensor]) -> torch.Tensor:
    """The ids that `make` gives, int64, read back from the cache if the same ones were made before.

    made_of: all that the ids depend on (hash of the text, tokenizer fingerprint, sizes, seed): the key of the file.
    A file that is damaged, was changed or belongs to something else is made again; a cache that cannot be read or
    written is none.
    """
    key = identity(made_of, 64)
    path = outputs_dir() / "cache" / "tokens" / f"{key[:24]}.safetensors"
    try:
        if path.exists():
            return _read(path, key)
    except (UserError, OSError) as error:
        log.warning("tokens are made anew: %s", error)
    ids = torch.as_tensor(make(), dtype=torch.int64)
    try:
        write_artefact(path, "ids", {"key": key}, {"ids": ids})
    except (UserError, OSError) as error:
        log.warning("tokens were not cached: %s", error)
    return ids


def _read(path: Path, key: str) -> torch.Tensor:
    """The ids of a cache file. Raises UserError for one that is not whole or not of this key."""
    header, tensors = read_artefact(path, "ids", _Header, "token cache", "nothing need be done")
    ids = tensors.get("ids")
    if header["key"] != key or tensors.keys() != {"ids"} or ids is None or ids.dtype != torch.int64:
        raise UserError(f"token cache {path} holds something else")
    return ids


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal. A lone surrogate (JSON can hold one) counts as it stands."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
