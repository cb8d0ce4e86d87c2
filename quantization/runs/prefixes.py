"""Which tokens a prefix word stands for, and the prefix file that belongs to a model and a recipe.

    none | bos | prompt | auto[:CORPUS][@THRESHOLD] | FILE.safetensors | ADAPTER_DIR | "any text" | text:"like/a/path"

The same words in every program; `auto` is what PrefixQuant discovers on the full-precision model
(`quantization.runs.auto_prefix`). A prefix is written by the recipe's full-precision twin, kept under
modelzoo/prefixes/ by the identity of all that made it, and read back from there by every later run.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from corpora.chat import rendered, template_source
from corpora.errors import UserError
from corpora.paths import modelzoo_dir
from corpora.sharegpt import VICUNA_PROMPT
from corpora.storage import identity
from corpora.text import encode, start_token_id
from corpora.values import LONGEST_NAME
from corpora.writing import refuse_special
from intactkv.peft import CONFIG, PREFIX_FILE, is_adapter, read_adapter
from intactkv.prefix import ModelIdentity, Prefix, build_prefix

__all__ = ["AUTO", "PrefixChoice", "auto_search", "choose_prefix", "keep_prefix", "prefix_file",
           "prefixes_of", "searched_in", "stored_prefix"]  # fmt: skip

log = logging.getLogger(__name__)

AUTO = "auto"
AUTO_WORD = re.compile(rf"{AUTO}(?::(?P<corpus>.+?))?(?:@(?P<threshold>[-+\d.e]+))?")
TEXT = "text:"  # in front of a text that looks like another word
LIKE_A_PATH = re.compile(r"[^\s<>]*/[^\s<>]*|[^\s<>]+\.(safetensors|txt|jsonl?|pt|bin)")  # "</s>" is a text
WORDS = (
    "none, bos, prompt, auto (discovered outlier tokens; auto:CORPUS names the text, auto@64 or auto:CORPUS@64 the "
    "ratio to the median that makes an outlier), a FILE.safetensors made by "
    "`python -m intactkv build`, the directory of a PEFT adapter made by `python -m intactkv export`, or a text "
    "(text:… for one that looks like a path)"
)


@dataclass(frozen=True)
class PrefixChoice:
    """A prefix word made concrete. label: for tables, [B], [P], [A], …; ids: empty for none; file: if it was given;
    owner: whose keys and values these are, as the run calls it (`quantization.runs.fitting`)."""

    word: str
    label: str
    ids: tuple[int, ...]
    file: Path | None = None
    owner: ModelIdentity | None = None


def auto_search(word: str) -> tuple[str | None, float | None] | None:
    """The corpus and the outlier threshold that `auto`, `auto:CORPUS`, `auto@THRESHOLD` or both name, None where it
    leaves them open; None for any other word. Raises UserError for one that begins like it and cannot be meant."""
    if not re.match(rf"{AUTO}(?:[:@]|$)", word, re.IGNORECASE):
        return None
    with suppress(ValueError):
        found = AUTO_WORD.fullmatch(word)
        threshold = float(found["threshold"]) if found and found["threshold"] else None
        if found and (threshold is None or 1 < threshold < math.inf):
            return found["corpus"], threshold
    raise UserError(f"--prefix {word} is no form of auto; a ratio is a number above 1, as in auto@64; choose {WORDS}")


def searched_in(word: str, corpus: str) -> str:
    """`auto` on this text, unless the word names one; any other word as it is."""
    search = auto_search(word)
    if search is None or search[0] is not None:
        return word
    return f"{AUTO}:{corpus}" + ("" if search[1] is None else f"@{search[1]:g}")


def choose_prefix(word: str, tokenizer: PreTrainedTokenizerBase, model_name: str) -> PrefixChoice:
    """Turn a prefix word into token ids; what `auto` stands for must be searched (`quantization.runs.auto_prefix`).

    Raises UserError if the model has no such prefix, or the file is broken.
    """
    if not word.removeprefix(TEXT).strip():
        raise UserError(f"--prefix is empty; choose {WORDS}")
    if word == "none":
        return PrefixChoice(word, "none", ())
    if word == "bos":
        return PrefixChoice(word, "[B]", (start_token_id(tokenizer),))
    if word == "prompt":
        return PrefixChoice(word, "[P]", tuple(_prompt_ids(tokenizer, model_name)))
    if word.endswith(".safetensors"):
        return PrefixChoice(word, f"[{Path(word).stem}]", tuple(Prefix.load(word).ids.tolist()), Path(word))
    if os.path.isdir(word):  # unlike Path's, it takes texts that are too long for a name
        if not is_adapter(word):
            raise UserError(f"--prefix {word} is a directory without {CONFIG}, so no PEFT adapter; choose {WORDS}")
        # The file beside the adapter's own holds the same K and V, which reading the adapter checks.
        ids = read_adapter(word).ids.tolist()
        return PrefixChoice(word, f"[{Path(os.path.abspath(word)).name}]", tuple(ids), Path(word) / PREFIX_FILE)
    if not word.startswith(TEXT) and _looks_like_a_path(word):
        raise UserError(f"--prefix {word} looks like a path, but prefix files end in .safetensors; choose {WORDS}")
    if word.lower() in ("none", "bos", "prompt"):
        raise UserError(f"--prefix {word} is written {word.lower()}; choose {WORDS}")
    ids = _behind_start(encode(tokenizer, word.removeprefix(TEXT)), tokenizer)
    log.info("the prefix is the text %r: %d tokens", word.removeprefix(TEXT), len(ids))
    return PrefixChoice(word, "[T]", tuple(ids))


def _looks_like_a_path(word: str) -> bool:
    """Whether nobody means it as a text: the name of something that is there, or written as one."""
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in word.split(os.sep)):
        return False
    there = os.path.lexists(word) or (os.sep in word and os.path.isdir(os.path.dirname(word) or os.sep))
    return there or LIKE_A_PATH.fullmatch(word) is not None


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, model_name: str) -> list[int]:
    """[BOS] + system prompt + the opening of the user's turn: what every conversation of the model starts with."""
    if template_source(tokenizer) is not None:
        # The tokens that two conversations share are the part that does not depend on what the user says.
        first, second = (
            encode(tokenizer, rendered(tokenizer, [text], opened=False, way_out='give the text itself: --prefix "…"'))
            for text in ("apples", "Zebras")
        )
        same = [a == b for a, b in zip(first, second, strict=False)]
        shared = first[: same.index(False)] if False in same else first[: len(same)]
        return _behind_start(shared, tokenizer)
    if "vicuna" in model_name.lower():  # published without a chat template in the tokenizer
        return _behind_start(encode(tokenizer, VICUNA_PROMPT), tokenizer)
    raise UserError(
        f"--prefix prompt: the tokenizer of {model_name} has no chat template, so there is no prompt that "
        'every conversation starts with; give the text itself: --prefix "…"'
    )


def _behind_start(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Exactly one start token in front: some templates spell it out themselves."""
    start = start_token_id(tokenizer)
    return ids if ids[:1] == [start] else [start, *ids]


def prefix_file(choice: PrefixChoice, model_name: str, made_of: Mapping[str, Any], dtype: torch.dtype) -> Path:
    """Where a choice's prefix lies: its own file, or modelzoo/prefixes/{model}/{word}-{identity}.safetensors.

    made_of: what identifies the twin (fingerprint of the checkpoint, basis). dtype: what it computes in.
    """
    if choice.file is not None:
        return choice.file
    key = identity({**made_of, "ids": list(choice.ids), "dtype": str(dtype)})
    name = {"[B]": "bos", "[P]": "prompt", "[A]": AUTO}.get(choice.label, "text")
    return prefixes_of(model_name) / f"{name}-{key}.safetensors"


def prefixes_of(model_name: str) -> Path:
    """Where a model's prefixes and discoveries lie."""
    return modelzoo_dir() / "prefixes" / model_name


def stored_prefix(
    choice: PrefixChoice,
    path: Path,
    made_of: Mapping[str, Any],
    dtype: torch.dtype,
    twin: Callable[[], PreTrainedModel],
) -> tuple[Prefix, bool]:
    """The prefix of a choice, read from its file (`prefix_file`) or built now; and whether it was built, to be kept
    there by `keep_prefix` once the model takes it.

    made_of, dtype: as there. twin: loads the full-precision twin; only called if there is no such file. One that is
    damaged, changed or of something else is built again, and that is told.
    """
    if choice.file is not None:
        prefix = Prefix.load(choice.file)
        return replace(prefix, model=choice.owner or prefix.model), False
    damage = None
    if path.exists():
        try:
            prefix = Prefix.load(path)
            same = prefix.ids.tolist() == list(choice.ids) and prefix.dtype == dtype and prefix.calibrated is None
            if (
                same
                and prefix.model.fingerprint in (None, made_of["source"])
                and prefix.model.basis == made_of["basis"]
            ):
                return prefix, False
            raise UserError(f"prefix file {path} holds another prefix than its name says")
        except UserError as error:
            damage = error
    refuse_special(path, "the kept prefix")  # now, and not where it is kept
    if damage is not None:
        log.warning("the prefix %s is built again: %s", choice.label, damage)
    return build_prefix(twin(), choice.ids), True


def keep_prefix(prefix: Prefix, choice: PrefixChoice, path: Path) -> None:
    """Write a prefix that was built where `stored_prefix` finds it."""
    prefix.save(path)
    log.info("built the prefix %s of %d tokens: %s", choice.label, len(prefix), path)
