"""Needle in a haystack: is one line of a long text found again behind a quantized cache?

    prompt = [lead] instruction, filler lines, the needle line, filler lines, question      (pass-key task, 2305.16300)
    depth d of n filler lines: the needle stands behind round(d · n) of them

The answer is greedy. Its score is whether the exact key stands in it; beside it log p(key | prompt), which is smoother.
A prompt of a wanted length ends its filler within a line: as many words as fit. The sentences are this project's own;
only what they tell of (grass, sky, sun, a pass key said twice) is that of the published task.
"""

import random
import re
import string
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from corpora.errors import UserError
from corpora.json_files import Hash, identity
from corpora.tokens import encode
from eval.generation import Generation
from eval.mtbench.json_lines import Lines
from eval.record_forms import NeedleResult
from eval.tasks.scoring import score_continuations
from intactkv.attach import IntactModel

__all__ = [
    "PUBLISHED_DEPTH",
    "PUBLISHED_KEYS",
    "RESULTS",
    "Cell",
    "Grid",
    "drawn_keys",
    "found",
    "look_for",
    "prompt_ids",
    "published_length",
    "texts_identity",
]

INSTRUCTION = (
    "Most of the text below does not matter, but one line of it tells a pass key. "
    "Find that line and note the pass key; you will be asked for it at the end.\n"
)
FILLER = "Green is the grass. Blue is the sky. Yellow is the sun. On we walk. Then home again.\n"
NEEDLE = "The pass key you need is {key}. Note it well. Once more, the pass key you need is {key}.\n"
QUESTION = "Now the text is over, and you are asked for the key. The pass key you need is"
WORDS = FILLER.split()

PUBLISHED_KEYS = ("47x291", "8a3605", "1294k8", "590p37", "68v423")
PUBLISHED_DEPTH = 50  # per cent


@dataclass(frozen=True)
class Cell:
    """One question. length: of the prompt, in tokens, at most; depth: of the needle, in per cent."""

    length: int
    depth: int
    key: str


@dataclass(frozen=True)
class Grid:
    """All questions of a run. lines: of filler, in place of a length that is filled up; then the prompt ends in a
    space, as published."""

    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    keys: tuple[str, ...]
    lines: int | None = None

    def cells(self) -> list[Cell]:
        """Every question, short prompts first."""
        return [Cell(*cell) for cell in product(sorted(self.lengths), self.depths, self.keys)]


def drawn_keys(count: int, seed: int) -> tuple[str, ...]:
    """So many different keys in the pattern of the published ones: five digits and a small letter within."""
    rng, keys = random.Random(f"needle/{seed}"), dict[str, None]()
    while len(keys) < count:
        signs = [rng.choice("123456789"), *rng.choices(string.digits, k=4)]
        signs.insert(rng.randint(1, 4), rng.choice(string.ascii_lowercase))
        keys["".join(signs)] = None
    return tuple(keys)


def found(key: str, answer: str) -> bool:
    """Whether an answer holds the exact key, not as a part of a longer word or number."""
    return re.search(rf"(?<![0-9A-Za-z]){re.escape(key)}(?![0-9A-Za-z])", answer) is not None


def texts_identity() -> str:
    """What identifies the sentences in a run's settings."""
    return identity({"texts": [INSTRUCTION, FILLER, NEEDLE, QUESTION]})


def prompt_text(key: str, depth: int, lines: Sequence[str], space: bool = False) -> str:
    """The prompt's text. space: it ends in one."""
    before = round(depth / 100 * len(lines))
    parts = (INSTRUCTION, *lines[:before], NEEDLE.format(key=key), *lines[before:], QUESTION)
    return "".join(parts) + " " * space


def filler(words: int) -> list[str]:
    """So many words of filler, in lines; the last one may be a part of a line."""
    whole, rest = divmod(words, len(WORDS))
    return [FILLER] * whole + [" ".join(WORDS[:rest]) + "\n"] * bool(rest)


def prompt_ids(tokenizer: Any, lead: Sequence[int], grid: Grid, cell: Cell) -> tuple[list[int], list[int]]:
    """The prompt and the key as token ids. lead: in front of the text, counted in the length.

    Raises UserError for a length that the prompt exceeds without any filler.
    """
    if grid.lines is not None:
        text = prompt_text(cell.key, cell.depth, [FILLER] * grid.lines, space=True)
        ids = encode(tokenizer, text)
    else:

        def ids_of(words: int) -> list[int]:
            return encode(tokenizer, prompt_text(cell.key, cell.depth, filler(words)))

        room = cell.length - len(lead)
        fitting = bisect_right(range(room), room, key=lambda words: len(ids_of(words))) - 1
        if fitting < 0:
            least = len(lead) + len(ids_of(0))
            raise UserError(
                f"--lengths {cell.length}: the needle with its question takes {least} tokens without any other text; "
                f"give at least {least}"
            )
        text = prompt_text(cell.key, cell.depth, filler(fitting))
        ids = ids_of(fitting)
    after = cell.key if grid.lines is not None else f" {cell.key}"
    whole = encode(tokenizer, text + after)
    # Where the tokens of both together are not those of the prompt and more, the key stands for itself.
    key = whole[len(ids) :] if whole[: len(ids)] == ids else encode(tokenizer, after)
    return [*lead, *ids], key


def published_length(tokenizer: Any, lead: Sequence[int], lines: int) -> int:
    """Tokens of the longest published prompt with so many lines of filler."""
    grid = Grid((0,), (PUBLISHED_DEPTH,), PUBLISHED_KEYS, lines)
    return max(len(prompt_ids(tokenizer, lead, grid, cell)[0]) for cell in grid.cells())


class _Line(NeedleResult):
    grid: Hash  # of the run that it belongs to
    sha256: Hash


RESULTS = Lines(
    "a file of needles that `python -m eval needle` looked for",
    _Line,
    lambda row: Cell(row["length"], row["depth"], row["key"]),
    beginning=b'{"grid": "',
)


@torch.inference_mode()
def look_for(
    model: IntactModel,
    tokenizer: Any,
    generation: Generation,
    lead: Sequence[int],
    grid: Grid,
    cells: Sequence[Cell],
    max_new_tokens: int | None,
) -> Iterator[dict[str, Any]]:
    """The result of every question, one after the other; none shares a batch, so nothing is padded.

    max_new_tokens: of an answer; None takes one more than the key has, as published.
    """
    generation.rule(model.model)
    for cell in cells:
        ids, key = prompt_ids(tokenizer, lead, grid, cell)
        (scores,) = score_continuations(model, [[*ids, *key[:-1]]], [[key]])
        output = model.generate(
            torch.tensor([ids]),
            max_new_tokens=max_new_tokens or len(key) + 1,
            do_sample=False,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, len(ids) :].tolist()
        end = next((i for i, token in enumerate(new) if token in generation.stops), None)
        kv = model.kv_figures(len(ids) - model.prefix_length)
        answer = tokenizer.decode(new[:end], clean_up_tokenization_spaces=False)
        yield {
            "length": cell.length,
            "depth": cell.depth,
            "key": cell.key,
            "tokens": len(ids),
            "found": found(cell.key, answer),
            "log_likelihood": scores[0].log_likelihood,
            "answer": answer,
            "quantized": output.past_key_values.rounded_share,
            "bits_per_element": None if kv is None else kv["bits_per_element"],
        }
