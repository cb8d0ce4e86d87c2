"""What a figure looks at: a model, a text, and, with a prefix, the same text without it and behind it.

Two ways to take text. `opening`: the beginning of the evaluation text (or of ShareGPT conversations in Vicuna's format)
behind [BOS], as IntactKV's figures do. `scattered`: random pieces of the calibration text, as PrefixQuant's do.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from corpora.catalog import CalibrationText, model_defaults
from corpora.errors import UserError
from corpora.sharegpt import VICUNA_SYSTEM, sharegpt_samples
from corpora.text import calibration_segments, encode, evaluation_stream, protocol
from intactkv.attach import IntactModel, attach
from quantization.architecture import Architecture, architecture_of
from quantization.checkpoint import read_config
from quantization.loading import Plan

__all__ = ["Arm", "Subject", "Text", "chosen_layers", "figure_name", "load_subject", "opening", "scattered",
           "token_name"]  # fmt: skip

SHAREGPT = "sharegpt"
LONGEST_CHAT = 4096  # tokens of a conversation that are looked at for the assistant's turns
PUBLISHED_PIECES = CalibrationText("pile", 64, 1024)  # PrefixQuant's


@dataclass(frozen=True, eq=False)
class Text:
    """ids: (N, T) int64. caption: how much of what. prompt: tokens up to the end of the system prompt, if any."""

    ids: Tensor
    caption: str
    prompt: int | None = None


@dataclass(frozen=True, eq=False)
class Arm:
    """A model and the tokens it is fed. label: in CSV. title: "" for the only arm. ids: (N, T) without the prefix.
    start: position of the first of them. prompt: position behind the system prompt, None if the text has none."""

    label: str
    title: str
    model: IntactModel
    ids: Tensor
    start: int
    prompt: int | None


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model with its text. arms: one, or without and behind the prefix. caption: model and text in words."""

    caption: str
    tokenizer: Any
    architecture: Architecture
    arms: tuple[Arm, ...]

    @property
    def rows(self) -> int:
        """Sequences to run in all."""
        return sum(len(arm.ids) for arm in self.arms)

    def progress(self, what: str, steps: int = 0) -> tqdm:
        """The command's bar on stderr: one step for every sequence that runs, and as many more."""
        return tqdm(total=self.rows + steps, desc=what, unit="step")


def chosen_layers(text: str, plan: Plan) -> list[int]:
    """`0,8,16` or `step:8` (0, 8, 16, …) as layers of the model. Raises UserError for others."""
    count = int(read_config(plan.checkpoint.directory).get_text_config(decoder=True).num_hidden_layers)
    try:
        if text.startswith("step:"):
            layers = list(range(0, count, int(text.removeprefix("step:"))))
        else:
            layers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text}: give a comma list such as 0,8,16, or step:8 for every eighth") from None
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(f"--layers {text}: {plan.checkpoint.name} has the layers 0 to {count - 1}, but no {layer}")
    return list(dict.fromkeys(layers))


def opening(
    plan: Plan, corpus: str | None, samples: int, tokens: int, seed: int, *, conversation: bool = False
) -> Text:
    """[BOS] and the beginning of a text: (samples, tokens), one window or conversation after the other.

    corpus: None takes the model's first; with `conversation` ShareGPT, as published, unless the model declares a single
    corpus of its own. seed: of the order of the conversations. Raises UserError if the text is absent or too short.
    """
    _check_size(plan, samples, tokens)
    own = model_defaults(plan.checkpoint.family_name).default_corpora
    corpus = corpus or (SHAREGPT if conversation and len(own) > 1 else own[0])
    if corpus == SHAREGPT:
        found = sharegpt_samples(
            plan.tokenizer,
            samples=samples,
            max_length=max(LONGEST_CHAT, 2 * tokens),
            min_assistant=tokens - 1,
            seed=seed,
        )
        ids = torch.stack([chat.ids[:tokens] for chat in found.chats])
        prompt = 1 + len(encode(plan.tokenizer, VICUNA_SYSTEM))
        what = "a ShareGPT conversation" if samples == 1 else "ShareGPT conversations"
        return Text(ids, _first(samples, tokens, what), prompt if prompt < tokens else None)
    stream = evaluation_stream(plan.tokenizer, corpus, window=max(tokens, 3), protocol=protocol("intactkv"))
    if len(stream.ids) < samples * max(tokens, 3):
        raise UserError(
            f"{corpus} has {len(stream.ids)} tokens, but --samples {samples} × --tokens {tokens} are asked for; give a "
            "longer text or ask for less"
        )
    return Text(stream.windows(samples)[:, :tokens], _first(samples, tokens, _name(corpus)))


def scattered(
    plan: Plan, corpus: str | None, samples: int | None, tokens: int | None, seed: int, bos_first: bool
) -> Text:
    """Random pieces of a calibration text: (samples, tokens). None takes the model's own, or PrefixQuant's.

    bos_first: position 0 of each is overwritten with [BOS]. Raises UserError if the text is absent or too short.
    """
    own = model_defaults(plan.checkpoint.family_name).default_calibration or PUBLISHED_PIECES
    corpus, samples = corpus or own.corpus, own.samples if samples is None else samples
    tokens = own.length if tokens is None else tokens
    _check_size(plan, samples, tokens)
    ids = calibration_segments(plan.tokenizer, corpus, samples=samples, length=tokens, seed=seed, bos_first=bos_first)
    start = ", [BOS] in front of each" if bos_first else ""
    return Text(ids, f"{samples} × {tokens} tokens of {_name(corpus)}{start}")


def _name(corpus: str) -> str:
    """A corpus' name, or a file's without its directory."""
    return Path(corpus).name if Path(corpus).exists() else corpus


def _first(samples: int, tokens: int, what: str) -> str:
    """How much of the beginning of a text, in words."""
    return f"first {tokens} tokens of {what}" if samples == 1 else f"first {samples} × {tokens} tokens of {what}"


def _check_size(plan: Plan, samples: int, tokens: int) -> None:
    """Raises UserError for numbers that give no picture or do not fit the model."""
    if samples < 1:
        raise UserError(f"--samples {samples}: a picture needs at least 1")
    if tokens < 2:
        raise UserError(f"--tokens {tokens}: a picture needs at least 2")
    length = tokens + len(plan.choice.ids)
    if plan.context is not None and length > plan.context:
        raise UserError(
            f"--tokens {tokens}: {length} tokens with the prefix do not fit the {plan.context} positions of "
            f"{plan.checkpoint.name}; use fewer"
        )


def figure_name(plan: Plan, kind: str) -> str:
    """`<model>__<kind>[__<prefix>]`: what a command's files are called in a directory."""
    choice = plan.choice
    parts = [_model_name(plan).replace("/", "-").replace(" ", "-"), kind]
    if choice.ids:
        parts.append(choice.file.stem if choice.file else choice.word if choice.word in ("bos", "prompt") else "text")
    return "__".join(parts)


def _model_name(plan: Plan) -> str:
    """The model, and what a recipe makes of it."""
    recipe = plan.recipe
    kv = (
        []
        if recipe.kv_cache is None
        else [f"KV {type(recipe.kv_cache).__name__} {getattr(recipe.kv_cache, 'bits', '')}"]
    )
    return " ".join([plan.checkpoint.name, *([recipe.label()] if recipe.changes_weights else []), *kv]).strip()


def load_subject(plan: Plan, text: Text) -> Subject:
    """Load the model of a plan, once, and feed it the text without the prefix and behind it.

    A text that starts with the prefix loses it; of others only a [BOS] goes that the prefix brings, too. A model that
    was calibrated behind the prefix has no arm without it.
    Raises UserError if nothing of the text is left, or the model's architecture is not in the table.
    """
    architecture = architecture_of(read_config(plan.checkpoint.directory))
    lead = torch.tensor(plan.choice.ids, dtype=text.ids.dtype)
    ids = text.ids
    if len(lead) and bool((ids[:, : len(lead)] == lead).all()):
        ids = ids[:, len(lead) :]
    elif len(lead) and bool((ids[:, 0] == lead[0]).all()):
        ids = ids[:, 1:]
    if ids.shape[1] < 2:
        raise UserError(
            f"the prefix has {len(lead)} tokens and leaves {ids.shape[1]} of the text; give more with --tokens"
        )
    model = plan.load()
    caption = f"{_model_name(plan)}, {text.caption}"
    if model.prefix is None:
        arms = [Arm("none", "", model, ids, 0, text.prompt)]
    else:
        prompt = None if text.prompt is None else text.prompt + ids.shape[1] - text.ids.shape[1] + len(lead)
        title = f"behind the intact prefix {plan.choice.label}"
        behind = Arm(plan.choice.label, title, model, ids, len(lead), prompt)
        arms = [behind]
        if plan.checkpoint.manifest is None or plan.checkpoint.manifest["needs_prefix"] is None:
            plain = attach(model.model, None, model.kv)
            arms.insert(0, Arm("none", "without an intact prefix", plain, text.ids, 0, text.prompt))
    return Subject(caption, plan.tokenizer, architecture, tuple(arms))


def token_name(tokenizer: Any, token: int) -> str:
    """A token as it can stand on an axis: decoded, line ends and tabs spelled out, never empty."""
    text = str(tokenizer.decode([token])).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return text.replace("$", r"\$") or "?"  # a dollar would start a formula
