"""Whether runs fit a model, by its configuration: groups, windows, needles, heads, template. Nothing loads torch."""

import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from corpora.catalog import ModelDefaults, model_defaults
from eval.doctor.recipe_facts import group_of
from eval.tables.asked import NEEDLE, UNITS, Run
from eval.tables.departures import WINDOW

__all__ = ["misfits", "said", "told", "uneven"]

POSITIONS = ("max_position_embeddings", "n_positions")
OWN_HEADS = ("kv_lora_rank", "global_head_dim")  # of families whose keys have another size than the configuration says
LINES = 127  # of a unit of the published needles, where no run says how many
LEAST = 20  # tokens of a line of filler: it has 18 words and 5 full stops
TALKS = ("chat", "mtbench")


def uneven(runs: Iterable[Run]) -> list[str]:
    """Models whose channels are no multiple of the groups that runs ask for; a line for each size."""
    found: dict[tuple[Path, int], int] = {}
    for run in runs:
        group = group_of(said(run, "--recipe"))
        if group == ModelDefaults().default_group_size:
            group = model_defaults(run.model.name).default_group_size
        group = int(said(run, "--group-size") or group)
        if group > 0 and (run.model, group) not in found:
            found[run.model, group] = math.gcd(*_channels(run.model)) % group
    return [
        f"groups of {group} do not divide the {' and '.join(map(str, _channels(directory)))} channels of "
        f'{directory.name}; name a size that does: --options "--group-size {math.gcd(128, *_channels(directory))}"'
        for (directory, group), rest in found.items()
        if rest
    ]


def misfits(runs: Iterable[Run]) -> list[str]:
    """What else of runs does not fit their models, each once: texts that are longer than its positions, groups of the
    cache that do not divide a head, conversations without a chat template."""
    lines = {line: None for run in runs for check in (_text, _heads, _talk) for line in check(run)}
    return list(lines)


def _text(run: Run) -> Iterator[str]:
    """Each program also counts what stands in front, so the largest size that fits may be a little smaller."""
    name, positions = run.model.name, _whole(run.model, *POSITIONS)
    if not positions:
        return
    room = f"do not fit the {positions} positions of {name}"
    if run.program == "ppl" and (window := int(said(run, "--window") or WINDOW)) > positions:
        yield f"windows of {window} tokens {room}; --window {positions} or fewer"
    if (length := int(said(run, "--calibration-length") or 0)) > positions:
        yield f"pieces of {length} tokens for calibration {room}; --calibration-length {positions} or fewer"
    if run.program == "needle" and (tokens := UNITS * int(said(run, "--lines") or LINES) * LEAST) > positions:
        fits = positions - NEEDLE >= UNITS * LEAST
        way_out = f"--window {positions} or fewer" if fits else "no --window does; choose a model of more positions"
        yield f"needles in more than {tokens} tokens {room}; {way_out}"


def _heads(run: Run) -> Iterator[str]:
    size = said(run, "--kv-group-size")
    channels = _whole(run.model, "head_dim")
    if not channels and (heads := _whole(run.model, "num_attention_heads")):
        channels = _whole(run.model, "hidden_size") // heads
    if size.isdecimal() and int(size) and channels % int(size) and not _told_of(run.model).keys() & set(OWN_HEADS):
        yield (
            f"groups of {size} of the KV cache do not divide the {channels} channels of a head of {run.model.name}; "
            f'name a size that does: --options "--kv-group-size {channels}"'
        )


def _talk(run: Run) -> Iterator[str]:
    name = run.model.name
    own = said(run, "--template") in ("", "auto", "tokenizer")
    needed = (run.program in TALKS and own) or said(run, "--prefix") == "prompt"
    if needed and "vicuna" not in name.lower() and not _has_template(run.model):
        yield (
            f"{name} has no chat template, which conversations and the prefix [P] need; put chat_template.jinja of its "
            "chat model beside its tokenizer"
        )


def _has_template(model: Path) -> bool:
    """Whether a tokenizer has a chat template. One that cannot be read counts: who reads it says what is wrong."""
    if not (model / "tokenizer_config.json").is_file() or any(model.glob("*chat_template*")):
        return True
    found = _read(model / "tokenizer_config.json")
    return not found or bool(found.get("chat_template"))


def said(run: Run, option: str) -> str:
    """The last value of an option among a run's words, as argparse takes it; empty if it is not there."""
    values = [word.partition("=")[2] if "=" in word else following
              for word, following in pairwise((*run.words, "")) if word.partition("=")[0] == option]  # fmt: skip
    return values[-1] if values else ""


@lru_cache(maxsize=1000)
def told(model: Path) -> dict[str, Any]:
    """A model's configuration; nothing where it cannot be read: the program that reads it will say what is wrong."""
    return _read(model / "config.json")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _told_of(model: Path) -> dict[str, Any]:
    """The configuration of the part that reads text."""
    part = told(model).get("text_config")
    return part if isinstance(part, dict) else told(model)


def _whole(model: Path, *names: str) -> int:
    """The first of some fields that says a whole number; 0 if none does."""
    found = (value for name in names if type(value := _told_of(model).get(name)) is int and value > 0)
    return next(found, 0)


@lru_cache(maxsize=1000)
def _channels(model: Path) -> tuple[int, ...]:
    """What a model's linears read, by its configuration: hidden and inner size. Nothing where it does not say."""
    found = told(model)
    try:
        sizes = (found["hidden_size"], found.get("intermediate_size") or found["ffn_dim"])
    except KeyError:
        return ()
    return tuple(dict.fromkeys(size for size in sizes if isinstance(size, int)))
