"""What a figure looks at: a model, a text, and, with a prefix, the same text without it and behind it.

Two ways to take text. `opening`: the beginning of the evaluation text (or of ShareGPT conversations in Vicuna's format)
behind [BOS], as IntactKV's figures do. `scattered`: random pieces of the calibration text, as PrefixQuant's do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from corpora.catalog import CORPORA, CalibrationText, model_defaults
from corpora.errors import UserError
from corpora.files import sha256_of_data, sha256_of_file
from corpora.sharegpt import VICUNA_SYSTEM, sharegpt_samples
from corpora.storage import identity
from corpora.text import calibration_segments, corpus_label, encode, evaluation_stream, protocol, start_token_id
from eval.plots.canvas import file_name
from intactkv.architecture import Architecture, architecture_of
from intactkv.attach import IntactModel, attach
from quantization.labels import full_label
from quantization.recipes.recipe import describe
from quantization.runs.dense import read_config
from quantization.runs.plan import Plan
from quantization.runs.prefixes import PrefixChoice

__all__ = [
    "Arm",
    "Subject",
    "Text",
    "check_size",
    "chosen_layers",
    "default_opening",
    "default_pieces",
    "figure_name",
    "load_subject",
    "opening",
    "scattered",
    "token_name",
    "with_given",
]

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
            step = int(text.removeprefix("step:"))
            if step < 1:
                raise UserError(f"--layers {text}: every how many blocks? give step:1 or more, step:8 for every eighth")
            layers = list(range(0, count, step))
        else:
            layers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text}: give a comma list such as 0,8,16, or step:8 for every eighth") from None
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(f"--layers {text}: {plan.checkpoint.name} has the layers 0 to {count - 1}, but no {layer}")
    return list(dict.fromkeys(layers))


def default_opening(plan: Plan, tokens: int, *, conversation: bool) -> CalibrationText:
    """One beginning of the model's first corpus; with `conversation` of ShareGPT, as published, unless the model
    declares a single corpus of its own."""
    own = model_defaults(plan.checkpoint.family_name).default_corpora
    return CalibrationText(SHAREGPT if conversation and len(own) > 1 else own[0], 1, tokens)


def default_pieces(plan: Plan, published: CalibrationText = PUBLISHED_PIECES) -> CalibrationText:
    """The model's own calibration text, or the published one."""
    return model_defaults(plan.checkpoint.family_name).default_calibration or published


def with_given(text: CalibrationText, corpus: str | None, samples: int | None, length: int | None) -> CalibrationText:
    """A text with everything that is not None in the place of its own."""
    return CalibrationText(
        text.corpus if corpus is None else corpus,
        text.samples if samples is None else samples,
        text.length if length is None else length,
    )


def opening(plan: Plan, text: CalibrationText, seed: int) -> Text:
    """[BOS] and the beginning of a text: (samples, length), one window or conversation after the other.

    seed: of the order of the conversations. Raises UserError if the text is absent or too short.
    """
    check_size(plan, text)
    corpus, samples, tokens = text.corpus, text.samples, text.length
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
    return Text(stream.windows(samples)[:, :tokens], _first(samples, tokens, corpus_label(corpus)))


def scattered(plan: Plan, text: CalibrationText, seed: int, bos_first: bool) -> Text:
    """Random pieces of a calibration text: (samples, length).

    bos_first: position 0 of each is overwritten with [BOS]. Raises UserError if the text is absent or too short.
    """
    check_size(plan, text)
    ids = calibration_segments(
        plan.tokenizer, text.corpus, samples=text.samples, length=text.length, seed=seed, bos_first=bos_first
    )
    start = ", [BOS] in front of each" if bos_first else ""
    return Text(ids, f"{text.samples} × {text.length} tokens of {corpus_label(text.corpus)}{start}")


def _first(samples: int, tokens: int, what: str) -> str:
    """How much of the beginning of a text, in words."""
    return f"first {tokens} tokens of {what}" if samples == 1 else f"first {samples} × {tokens} tokens of {what}"


def check_size(plan: Plan, text: CalibrationText, options: tuple[str, str] = ("--samples", "--tokens")) -> None:
    """Raises UserError for numbers that give no picture or do not fit the model. options: where they come from."""
    for option, value, least in zip(options, (text.samples, text.length), (1, 2), strict=True):
        if value < least:
            raise UserError(f"{option} {value}: a picture needs at least {least}")
    plan.check_fits(options[1], text.length + len(plan.choice.ids), text.length)


def figure_name(
    plan: Plan, kind: str, text: CalibrationText, default: CalibrationText, options: Sequence[str] = ()
) -> str:
    """`<model>__<kind>[__<prefix>][__<text>][__<option>…]`: what a command's files are called in a directory.

    Two commands that differ in more than the device or the resolution have different names. The text stands there as
    far as it is not the kind's default, as in `wikitext2-64x1024`; options: those that are not as by default.
    """
    recipe = plan.recipe
    model = [plan.checkpoint.name]
    if recipe.makes_checkpoint:  # as the checkpoint is called that the recipe makes
        model.append(plan.directory_of(recipe).name)
    corpus = "" if text.corpus == default.corpus else _corpus_part(text.corpus)
    changed = (text.samples, text.length) != (default.samples, default.length)
    size = f"{text.samples}x{text.length}" if changed else ""
    return file_name(
        "-".join([*model, *_kv_words(plan)]), kind, _prefix_part(plan.choice),
        "-".join(word for word in (corpus, size) if word), *options,
    )  # fmt: skip


def _corpus_part(corpus: str) -> str:
    """A corpus' name; a file's with digits of its content's hash, since another may be called the same."""
    file = Path(corpus)
    known = corpus in CORPORA or not file.is_file()
    return corpus if known else f"{file.stem}-{sha256_of_data(file)[:8]}"


def _prefix_part(choice: PrefixChoice) -> str:
    """A prefix in a word, with digits of a hash where the word does not settle it."""
    if not choice.ids or choice.word in ("bos", "prompt"):
        return choice.word if choice.ids else ""
    if choice.file is not None:
        return f"{choice.label.strip('[]')}-{sha256_of_file(choice.file)[:8]}"
    word = "auto" if choice.word.startswith("auto") else "text"
    return f"{word}-{identity({'ids': list(choice.ids)})}"


def _kv_words(plan: Plan) -> list[str]:
    """The policy of the KV cache, if there is one; with digits of a hash where its bits do not settle it: of what it
    was calibrated to, or of its fields."""
    kv = plan.recipe.kv_cache
    if kv is None:
        return []
    kind: Any = type(kv)
    bits = getattr(kv, "bits", None)
    words = f"KV {kind.__name__}" if bits is None else f"KV {kind.__name__} {bits}"
    if (calibrated := plan.kv_made_of) is not None:
        return [f"{words} {identity(dict(calibrated))}"]
    plain = bits is not None and describe(kv) == describe(kind(bits=bits))
    return [words if plain else f"{words} {identity(describe(kv))}"]


def _model_name(plan: Plan) -> str:
    """The model, and what a recipe makes of it."""
    recipe = plan.recipe
    return " ".join(
        [plan.checkpoint.name, *([full_label(recipe)] if recipe.makes_checkpoint else []), *_kv_words(plan)]
    )


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
    elif (start := start_token_id(plan.tokenizer)) in plan.choice.ids and bool((ids[:, 0] == start).all()):
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
    """A token in words: decoded, line ends and tabs spelled out, never empty."""
    return str(tokenizer.decode([token])).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") or "?"
