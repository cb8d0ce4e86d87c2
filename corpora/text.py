"""Token streams, evaluation windows and calibration segments: the same ids for every program and every method.

Evaluation (the protocol of IntactKV's published perplexities):
    stream = [BOS] + tokens of the joined documents, tokenized once; W = floor(N / S) windows without overlap;
    position 0 of every window is overwritten with BOS; the predictions of positions 2 .. S - 1 count.
Calibration (GPTQ's loaders): Python's `random`, seeded once, draws the starts of segments of S tokens.

Departs from the published loaders: BOS stands at the start of the stream (and of every document that calibration draws
from) also where the tokenizer's own template has none; a document must be longer than a segment (published: not
shorter, which fails when the lengths are equal), and draws are bounded.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corpora.catalog import CORPORA, TEXT_FILE, Corpus, corpus_directory, corpus_files
from corpora.errors import UserError
from corpora.files import data_files, plain_file, sha256_of_data
from corpora.readers import folder_files, is_plain_text, read_documents
from corpora.tokens import cached_ids, encode, start_token_id, text_hash, tokenizer_fingerprint

__all__ = ["CORPUS_NAMES", "PROTOCOLS", "Protocol", "TokenStream", "calibration_segments", "corpus_label", "documents",
           "encode", "evaluation_stream", "packed_documents", "protocol", "split_windows", "start_token_id",
           "text_identity"]  # fmt: skip

C4_OLD = "c4-old"  # GPTQ's first C4 test: 256 random segments of the validation file instead of its first documents
CORPUS_NAMES = (*(name for name, corpus in CORPORA.items() if corpus.calibration_text), C4_OLD)
BLANK_LINES = re.compile(r"\n\s*\n")
MOST_DRAWS = 10_000  # in a row without a document that is long enough; in C4 one in about 70 is


@dataclass(frozen=True)
class Protocol:
    """How a stream becomes a perplexity. Numbers of different protocols never share a table."""

    name: str
    bos_in_every_window: bool  # else only the first window has it, from the stream
    skip_first_prediction: bool  # the one made from BOS alone: behind an IntactKV prefix, full precision makes it

    @property
    def first_target(self) -> int:
        """First position of a window whose token is counted as a prediction."""
        return 2 if self.skip_first_prediction else 1


PROTOCOLS = {
    "intactkv": Protocol("intactkv", bos_in_every_window=True, skip_first_prediction=True),
    "gptq": Protocol("gptq", bos_in_every_window=False, skip_first_prediction=False),
}


def protocol(name: str) -> Protocol:
    """The protocol of that name. Raises UserError, with the names, for an unknown one."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True, eq=False)
class TokenStream:
    """The ids that perplexity is measured on, and what they are: both go into the record of a run."""

    ids: Tensor  # (N,) int64
    corpus: str
    text_sha256: str  # of the joined documents before tokenizing
    n_documents: int
    window: int
    protocol: Protocol
    start_id: int

    def windows(self, limit: int | None = None) -> Tensor:
        """The stream in windows, (W, window); see `split_windows`."""
        return self.split(self.ids, limit)

    def split(self, ids: Tensor, limit: int | None) -> Tensor:
        """The same of other ids of this stream."""
        what = corpus_label(self.corpus)
        return split_windows(ids, self.window, limit, self.protocol, self.start_id, what)


def evaluation_stream(tokenizer: Any, corpus: str, *, window: int, protocol: Protocol) -> TokenStream:
    """Tokens of a corpus' evaluation text, ready for windows of `window` tokens.

    corpus: a name of CORPUS_NAMES, or a file (plain text as it is; .json, .jsonl, .parquet: the field "text").
    Raises UserError if the corpus is unknown or not there, or `window` is below 3.
    """
    _check_window(window)
    start_id = start_token_id(tokenizer)
    if corpus == C4_OLD:
        texts = documents("c4", "evaluation")
        drawn = _draw_segments(tokenizer, texts, samples=256, length=window, seed=0, what=f"{corpus}, evaluation")
        text = "\n\n".join(texts[index] for index, _ in drawn)
        ids = torch.cat([segment for _, segment in drawn])
        return TokenStream(ids, corpus, text_hash(text), len(drawn), window, protocol, start_id)
    entry = _entry(corpus)
    texts = documents(corpus, "evaluation", entry.documents)
    if entry.stripped:
        texts = [text.strip() for text in texts]
    text = entry.joiner.join(texts)
    if not text.strip():
        raise UserError(f"{corpus} holds no text; give a file that does")
    ids = _stream_ids(tokenizer, text)
    if entry.windows is not None:
        ids = ids[: entry.windows * window]
    return TokenStream(ids, corpus, text_hash(text), len(texts), window, protocol, start_id)


def split_windows(
    stream_ids: Tensor, window: int, limit: int | None, protocol: Protocol, start_id: int, what: str = "the text"
) -> Tensor:
    """Cut a stream into windows without overlap and drop the remainder: (N,) to (W, window), always a copy.

    limit: at most so many windows, None for all. what: the text's name. In the intactkv protocol position 0 of each
    is overwritten with `start_id`. Raises UserError if the stream is shorter than one window, or a number is out of
    range.
    """
    _check_window(window)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit} windows; give 1 or more, or leave it away to take all")
    count = len(stream_ids) // window
    if count == 0:
        raise UserError(
            f"{what} has {len(stream_ids)} tokens, which is less than one window of {window}; give a longer text or "
            "a smaller --window"
        )
    count = count if limit is None else min(count, limit)
    windows = stream_ids[: count * window].reshape(count, window).clone()
    if protocol.bos_in_every_window:
        windows[:, 0] = start_id
    return windows


def text_identity(tokenizer: Any, corpus: str, *, samples: int, length: int) -> dict[str, Any]:
    """What identifies a corpus' calibration text to a tokenizer, without reading or tokenizing it: the hashes of its
    files, how they are read, the tokenizer and its start token. A draw adds its own numbers and its seed.

    Raises UserError if the corpus is unknown or not there, or a number is out of range.
    """
    _check_pieces(corpus, samples, length)
    hashes = {file: sha256_of_data(file) for path in _files(corpus, "calibration") for file in _within(path)}
    _seen.update(hashes)
    return {
        "corpus": corpus if corpus in CORPUS_NAMES else Path(corpus).suffix,
        "files": list(hashes.values()),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "start": start_token_id(tokenizer),
    }


def _within(path: Path) -> list[Path]:
    """A file, or the files of a folder of `save_to_disk`."""
    if not path.is_dir():
        return [path]
    return data_files(path, "**/*")


_seen: dict[Path, str] = {}  # hashes that this process has named its artefacts after


def _refuse_changed(files: Iterable[Path]) -> None:
    """Raise UserError for a file of another content than when its hash was taken: the hash would name another text."""
    for file in files:
        if file in _seen and _seen[file] != sha256_of_data(file):
            raise UserError(f"{file} has changed since this run began; run the command again")


def corpus_label(corpus: str) -> str:
    """A corpus' name, or a file's without its directory."""
    return Path(corpus).name if Path(corpus).exists() else corpus


def calibration_segments(
    tokenizer: Any, corpus: str, *, samples: int, length: int, seed: int, bos_first: bool = False
) -> Tensor:
    """Random pieces of a corpus' calibration text: (samples, length) int64.

    wikitext2, ptb, sample and files: segments of one stream, [BOS] + all documents joined. c4, pile: a document is
    drawn until it is longer than a segment, then a start inside it. Segments begin in the middle of the text, without
    BOS; bos_first overwrites position 0 of each with it. The draws do not depend on bos_first.
    Raises UserError if the corpus is unknown, not there or too short, or a number is out of range.
    """
    _check_pieces(corpus, samples, length)
    entry = _entry(corpus)
    if entry.per_document:
        made_of = text_identity(tokenizer, corpus, samples=samples, length=length)
        made_of |= {"samples": samples, "length": length, "seed": seed}

        def draw() -> Tensor:
            texts, what = documents(corpus, "calibration"), f"{corpus}, calibration"
            drawn = _draw_segments(tokenizer, texts, samples=samples, length=length, seed=seed, what=what)
            return torch.stack([segment for _, segment in drawn])

        segments = cached_ids(made_of, draw)
    else:
        ids = _stream_ids(tokenizer, entry.joiner.join(documents(corpus, "calibration")))
        if len(ids) <= length:
            raise UserError(
                f"{corpus} has {len(ids)} tokens for calibration, but a segment takes {length} and one more; give a "
                "longer text or use shorter segments"
            )
        generator = random.Random(seed)
        starts = [generator.randint(0, len(ids) - length - 1) for _ in range(samples)]
        segments = torch.stack([ids[start : start + length] for start in starts])
    if bos_first:
        segments = segments.clone()
        segments[:, 0] = start_token_id(tokenizer)
    return segments


def packed_documents(tokenizer: Any, corpus: str, *, samples: int, length: int, seed: int) -> Tensor:
    """Whole short documents packed into pieces: (pieces, length) int64, the way AWQ calibrates (2306.00978).

    The corpus' calibration documents in a random order; each stripped and opened by [BOS]; those longer than `length`
    tokens and empty ones are left out; the first `samples` that remain are joined and cut, the rest is dropped.
    The order is that of `datasets.Dataset.shuffle` with the same seed. The documents of a file of plain text are its
    paragraphs, parted by blank lines.
    Raises UserError if the corpus is unknown, not there, or its documents do not fill one piece.
    """
    _check_pieces(corpus, samples, length)
    texts, what = documents(corpus, "calibration"), "documents"
    if corpus not in CORPUS_NAMES and is_plain_text(Path(corpus)):
        texts, what = BLANK_LINES.split("".join(texts)), "paragraphs, parted by blank lines,"
    start, kept = start_token_id(tokenizer), []
    for i in np.random.default_rng(seed).permutation(len(texts)):
        ids = [start, *encode(tokenizer, texts[i].strip())]
        if 1 < len(ids) <= length:
            kept.append(torch.tensor(ids))
            if len(kept) == samples:
                break
    stream = torch.cat(kept) if kept else torch.empty(0, dtype=torch.long)
    if len(stream) < length:
        raise UserError(
            f"{corpus} has {len(kept)} {what} of at most {length} tokens for calibration, {len(stream)} tokens in all, "
            f"which fill no piece of {length}; take random pieces instead (--set calibration.draw=segments)"
        )
    return stream[: len(stream) // length * length].view(-1, length)


def documents(corpus: str, role: str, limit: int | None = None) -> list[str]:
    """The documents of a corpus or file as they stand, for methods with their own way to choose among them.

    role: "calibration" or "evaluation". Raises UserError if the corpus is unknown or not there.
    """
    line, files = _entry(corpus).line if corpus in CORPUS_NAMES else None, _files(corpus, role)
    found = list(islice(read_documents(files, _entry(corpus).field, line=line), limit))
    if role == "calibration":  # its identity was settled before, by the files' hashes; of a test its text is hashed
        _refuse_changed(part for file in files for part in _within(file))
    return found


def _draw_segments(
    tokenizer: Any, texts: Sequence[str], *, samples: int, length: int, seed: int, what: str
) -> list[tuple[int, Tensor]]:
    """Index of the document and segment, `samples` times: the sequence of draws of the published C4 loader."""
    start_id = start_token_id(tokenizer)
    generator = random.Random(seed)
    too_short: set[int] = set()
    drawn: list[tuple[int, Tensor]] = []
    while len(drawn) < samples:
        for _ in range(MOST_DRAWS):
            index = generator.randint(0, len(texts) - 1) if texts else 0
            ids = [] if index in too_short or not texts else [start_id, *encode(tokenizer, texts[index])]
            if len(ids) > length:
                break
            too_short.add(index)
            if len(too_short) >= len(texts):
                raise UserError(
                    f"{what}: none of the {len(texts)} documents is longer than {length} tokens; use shorter segments"
                )
        else:
            raise UserError(
                f"{what}: {MOST_DRAWS} draws in a row gave no document longer than {length} tokens; use shorter "
                "segments"
            )
        start = generator.randint(0, len(ids) - length - 1)
        drawn.append((index, torch.tensor(ids[start : start + length])))
    return drawn


def _stream_ids(tokenizer: Any, text: str) -> Tensor:
    """[BOS] + tokens of `text`, (N,), tokenized once and cached."""
    start_id = start_token_id(tokenizer)
    made_of = {"text": text_hash(text), "tokenizer": tokenizer_fingerprint(tokenizer), "start": start_id}
    return cached_ids(made_of, lambda: [start_id, *encode(tokenizer, text)])


def _entry(corpus: str) -> Corpus:
    """What the catalogue says of a corpus."""
    return CORPORA["c4" if corpus == C4_OLD else corpus] if corpus in CORPUS_NAMES else TEXT_FILE


def _files(corpus: str, role: str) -> list[Path]:
    """Files of a corpus, or the file that `corpus` is. Raises UserError if there are none."""
    if corpus not in CORPUS_NAMES:
        if Path(corpus).is_dir():
            folder_files(Path(corpus))
            return [Path(corpus)]
        if Path(corpus).exists():
            return [plain_file(Path(corpus))]
        why = " holds conversations, not text" if corpus in CORPORA else " is neither a file nor a known corpus"
        raise UserError(f"{corpus!r}{why}; give a text file or one of {', '.join(CORPUS_NAMES)}")
    files = corpus_files(corpus, role)
    if not files:
        example = (CORPORA[corpus].calibration if role == "calibration" else CORPORA[corpus].evaluation)[0]
        raise UserError(
            f"the {role} text of {corpus} is missing from {corpus_directory(corpus)}; run "
            f"'bash scripts/prepare/data.sh {corpus}', or put it there, for example as {example}; "
            "datasets/README.md has all the names"
        )
    return files


def _check_pieces(corpus: str, samples: int, length: int) -> None:
    if corpus == C4_OLD:
        raise UserError(f"{C4_OLD} is a way to evaluate; calibrate with c4, or one of {', '.join(CORPUS_NAMES[:-1])}")
    for option, value, least in (("samples", samples, 1), ("length", length, 2)):
        if value < least:
            raise UserError(f"calibration {option} is {value}; give {least} or more")


def _check_window(window: int) -> None:
    if window < 3:
        raise UserError(f"window is {window} tokens; give 3 or more: BOS, one token to start from, one to predict")
