"""What of a model's generation_config shapes its answers here, and nothing else: where they end, how they are drawn.

    tasks (`eval.tasks.lm`)     greedy, or as the task says; then the model's own top-k, top-p and min-p
    MT-bench (`eval.mtbench`)   greedy, or at the category's temperature; then the model's own, too

How long an answer may be, its temperature, penalties, beams and stop words are the task's or the protocol's to say. A
model's file that names them changes nothing. Read from generation_config.json, or config.json where there is none, as
transformers does; the identity of a run that generates holds `Generation.describe`.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from corpora.errors import UserError
from quantization.runs.dense import read_config, read_generation_config

__all__ = ["Generation", "own_generation"]

DEFAULT_TOP_K = 50  # what transformers takes when a generation_config names none
RANGES: dict[str, tuple[tuple[type, ...], float, str]] = {  # types, highest, in words
    "top_k": ((int,), math.inf, "a whole number, 0 for all tokens"),
    "top_p": ((int, float), 1, "a number from 0 to 1"),
    "min_p": ((int, float), 1, "a number from 0 to 1"),
}


@dataclass(frozen=True)
class Generation:
    """stops: ids that end an answer. pad: what fills rows of a batch, decides nothing. top_k: 0 for all tokens; top_p,
    min_p: None for none."""

    stops: tuple[int, ...]
    pad: int
    top_k: int = DEFAULT_TOP_K
    top_p: float | None = None
    min_p: float | None = None

    def describe(self) -> dict[str, Any]:
        """All that can change an answer, for records."""
        return {name: value for name, value in asdict(self).items() if name != "pad"} | {"stops": list(self.stops)}

    def sampling(self) -> dict[str, Any]:
        """What shapes the distribution that a token is drawn from, as options of `generate`."""
        return {name: getattr(self, name) for name in ("top_k", "top_p", "min_p")}

    def rule(self, model: PreTrainedModel) -> None:
        """Put this in the place of the model's own generation_config, which `generate` reads behind every option."""
        model.generation_config = GenerationConfig(eos_token_id=list(self.stops) or None, pad_token_id=self.pad)


def own_generation(directory: Path, tokenizer: Any) -> Generation:
    """A checkpoint's own settings. Ids that its embedding does not have are left out: no answer can hold them.

    Raises UserError for a file that transformers refuses, or a value that cannot be meant.
    """
    vocabulary = read_config(directory).get_text_config(decoder=True).vocab_size
    file, own = directory / "generation_config.json", read_generation_config(directory)
    file = file if file.is_file() else directory / "config.json"
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    if not all(end is None or type(end) is int for end in ends):
        raise UserError(f"{file}: eos_token_id {own.eos_token_id!r} is no token id and no list of them; mend it")
    found: dict[str, Any] = {name: value for name in RANGES if (value := getattr(own, name)) is not None}
    for name, value in found.items():
        kinds, highest, allowed = RANGES[name]
        if type(value) not in kinds or not 0 <= value <= highest:
            raise UserError(f"{file}: {name} is {value!r}; give {allowed}")

    def valid(tokens: Iterable[int | None]) -> list[int]:
        return [int(token) for token in tokens if token is not None and 0 <= token < vocabulary]

    stops = tuple(sorted(set(valid([*ends, tokenizer.eos_token_id]))))
    return Generation(stops, pad=valid([tokenizer.pad_token_id, *stops, 0])[0], **found)
