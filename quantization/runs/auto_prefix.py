"""`--prefix auto`: PrefixQuant's discovery on a checkpoint, done once and kept.

A discovery lies beside the model's prefixes, modelzoo/prefixes/MODEL/auto-IDENTITY.json. Its identity is known before
anything runs: the dense checkpoint, the text's files and draw, the tokenizer and the threshold. Where it computes and
in which dtype is left out on purpose, so that all runs of a model agree on one prefix.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.catalog import CalibrationText, model_defaults
from corpora.errors import UserError
from corpora.json_files import Count, Hash, identity, read_json, with_sum, without_sum, write_json
from corpora.storage import sha256_of_tensor
from corpora.text import calibration_segments, corpus_label, start_token_id, text_identity
from intactkv.discover import discover
from intactkv.pivots import OUTLIER_RATIO
from quantization.runs.checkpoint import Checkpoint, dense_directory
from quantization.runs.prefixes import prefixes_of

__all__ = ["Found", "Search", "default_search", "find"]

PUBLISHED = CalibrationText("pile", 64, 512)  # PrefixQuant's; random pieces of it
SEED = 2  # PrefixQuant's

DISCOVER_AGAIN = "delete it to discover again"

log = logging.getLogger(__name__)


class _Drawn(TypedDict):
    corpus: str
    samples: Count
    length: Count
    seed: int


class _MadeOf(TypedDict):
    source: str
    start: Count
    threshold: float
    drawn: _Drawn


class _Kept(TypedDict):
    """A discovery's file."""

    prefix: Annotated[list[Count], Field(min_length=1)]
    number: Count
    position_0: Count
    counts: list[Annotated[list[Count], Field(min_length=2, max_length=2)]]
    ratios: list[float]
    behind: list[float] | None
    made_of: _MadeOf
    sha256: NotRequired[Hash]  # of the rest; files of before have none


@dataclass(frozen=True)
class Found:
    """A discovery as it is kept. number, position_0, counts: see intactkv.pivots.OutlierTokens; counts: (id, count),
    the most frequent first. ratios: per block, without a prefix; behind: the same text behind the prefix, None as long
    as nobody looked."""

    prefix: tuple[int, ...]
    number: int
    position_0: int
    counts: tuple[tuple[int, int], ...]
    ratios: tuple[float, ...]
    behind: tuple[float, ...] | None
    made_of: dict[str, Any]
    file: Path

    def write(self) -> None:
        """Keep it in its file."""
        content = {
            "prefix": list(self.prefix), "number": self.number, "position_0": self.position_0,
            "counts": [list(pair) for pair in self.counts], "ratios": list(self.ratios),
            "behind": None if self.behind is None else list(self.behind), "made_of": self.made_of,
        }  # fmt: skip
        write_json(self.file, with_sum(content))


@dataclass(frozen=True)
class Search:
    """What is looked at: pieces of a text, drawn with a seed, in a model. threshold: η."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: CalibrationText
    seed: int = SEED
    threshold: float = OUTLIER_RATIO

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """All that decides what is found. Raises UserError if the text is not there."""
        text = self.text
        return {
            "source": self.checkpoint.fingerprint,
            "text": text_identity(self.tokenizer, text.corpus, samples=text.samples, length=text.length),
            "samples": text.samples,
            "length": text.length,
            "seed": self.seed,
            "threshold": self.threshold,
        }

    @property
    def file(self) -> Path:
        """Where the discovery lies once it is made."""
        return prefixes_of(self.checkpoint.family_name) / f"auto-{identity(self.made_of)}.json"

    def pieces(self) -> Tensor:
        """The text that is looked at, (samples, length), without [BOS]. Raises UserError if it is not there."""
        text = self.text
        return calibration_segments(
            self.tokenizer, text.corpus, samples=text.samples, length=text.length, seed=self.seed, bos_first=False
        )


def default_search(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    corpus: str | None = None,
    threshold: float | None = None,
) -> Search:
    """What `auto` looks at for a model: 64 × 512 tokens of its own calibration corpus, or of the Pile.

    context: positions of the model; pieces take at most half of them. corpus, threshold: in the place of its own and of
    PrefixQuant's.
    """
    own = model_defaults(checkpoint.family_name).default_calibration or PUBLISHED
    length = PUBLISHED.length if context is None else min(PUBLISHED.length, context // 2)
    text = CalibrationText(corpus or own.corpus, PUBLISHED.samples, length)
    return Search(checkpoint, tokenizer, text, threshold=OUTLIER_RATIO if threshold is None else threshold)


def find(
    search: Search,
    open_dense: Callable[[Path], PreTrainedModel],
    advance: Callable[[int], Any] = lambda rows: None,
) -> Found:
    """The discovery that a search makes, from its file or made now.

    open_dense: loads a dense checkpoint; only called if there is no file. advance: told how many pieces are done.
    Raises UserError if the text is not there, or the dense checkpoint of a quantized one is not at hand.
    """
    if search.file.exists():
        return _read(search.file, search)
    ids, start = search.pieces(), start_token_id(search.tokenizer)
    by_tokens = {"source": search.checkpoint.fingerprint, "text": sha256_of_tensor(ids), "start": start,
                 "threshold": search.threshold}  # fmt: skip
    earlier = search.file.with_name(f"auto-{identity(by_tokens)}.json")  # discoveries were once named by their tokens
    if earlier.is_file():
        found = replace(_read(earlier, search), file=search.file)
        found.write()
        return found
    name = search.checkpoint.family_name
    log.info("discovering the prefix of %s on %d × %d tokens of %s", name, *ids.shape, search.text.corpus)
    model = open_dense(dense_directory(search.checkpoint, "--prefix auto looks for outlier tokens there"))
    outcome = discover(model, ids, start, threshold=search.threshold, advance=advance)
    drawn = {"corpus": corpus_label(search.text.corpus), "samples": len(ids), "length": ids.shape[1],
             "seed": search.seed}  # fmt: skip
    found = Found(
        prefix=outcome.prefix,
        number=outcome.outliers.number,
        position_0=outcome.outliers.first,
        counts=tuple(outcome.outliers.ids.items()),
        ratios=outcome.ratios,
        behind=None,
        made_of={**by_tokens, "drawn": drawn, "dtype": str(model.dtype).removeprefix("torch.")},
        file=search.file,
    )
    found.write()
    words = [search.tokenizer.decode([token]) for token in found.prefix]
    log.info("the prefix is %s %s: %s", list(found.prefix), words, found.file)
    return found


def _read(file: Path, search: Search) -> Found:
    """A discovery from its file. Raises UserError if it is damaged, was edited, or is of another search."""
    content = read_json(file, "the discovery", _Kept, mend=DISCOVER_AGAIN)
    content = without_sum(content, f"the discovery {file}", mend=DISCOVER_AGAIN)
    made_of, behind = content["made_of"], content["behind"]
    ours = (search.checkpoint.fingerprint, search.threshold, content["prefix"][-1], len(content["ratios"]))
    theirs = (made_of["source"], made_of["threshold"], made_of["start"], len(behind or content["ratios"]))
    if ours != theirs:
        raise UserError(f"the discovery {file} is not of this model and threshold; {DISCOVER_AGAIN}")
    return Found(
        prefix=tuple(content["prefix"]),
        number=content["number"],
        position_0=content["position_0"],
        counts=tuple((token, count) for token, count in content["counts"]),
        ratios=tuple(content["ratios"]),
        behind=None if behind is None else tuple(behind),
        made_of=made_of,
        file=file,
    )
