"""What quantized checkpoints are called: by all that decides their bits, and nothing else.

No KV policy that the weights were not trained with, and no prefix that only the run time uses, is part of a name. What
a KV policy calibrates to has a name of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from corpora.storage import identity, sha256_of_tensor
from corpora.text import text_identity
from intactkv.policy import KVPolicy
from intactkv.prefix import PLAIN_BASIS, Prefix
from quantization.recipes.recipe import Calibration, Recipe, describe
from quantization.runs.checkpoint import FORMAT

__all__ = [
    "KV_FORMAT",
    "Artefact",
    "artefact_of",
    "by_tokens",
    "identity_of_prefix",
    "identity_of_text",
    "kv_made_of",
]

KV_FORMAT = 1  # of an artefact of a KV policy's tensors


@dataclass(frozen=True)
class Artefact:
    """What a quantized checkpoint is: made_of decides its bits, and names it; basis is that of its keys and values."""

    made_of: dict[str, Any]
    basis: str

    @property
    def identity(self) -> str:
        """Eight hexadecimal digits."""
        return identity(self.made_of)


def artefact_of(
    fingerprint: str,
    recipe: Recipe,
    text: Mapping[str, Any] | None = None,
    behind: Mapping[str, Any] | None = None,
) -> Artefact:
    """Identity of the checkpoint that a recipe makes of the dense one with that fingerprint.

    text, behind: what identifies the calibration text and the prefix that it runs behind, for recipes that have them: a
    plan names files and draws, which it need not read; `by_tokens` names the ids themselves.
    """

    def made_of(recipe: Recipe) -> dict[str, Any]:
        parts: dict[str, Any] = {"format": FORMAT, "source": fingerprint, **recipe.weights_identity()}
        if recipe.calibrates:
            assert text is not None
            parts |= text
            if recipe.calibrate_behind_prefix:
                assert behind is not None
                parts |= behind
        return parts

    recipe = recipe.checkpoint_part
    if not recipe.changes_kv:
        basis = PLAIN_BASIS
    elif recipe.rescales:  # by what was found on the way
        basis = identity(made_of(recipe))
    else:
        basis = identity(made_of(recipe.twin))
    return Artefact(made_of(recipe), basis)


def kv_made_of(
    policy: KVPolicy, weights: Mapping[str, Any], text: Mapping[str, Any], behind: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that decides what a KV policy calibrates to. weights: what made those of the model whose blocks the text goes
    through; text, behind: as in `artefact_of`."""
    return {"format": KV_FORMAT, "kv": describe(policy), "weights": dict(weights), **text, **(behind or {})}


def by_tokens(
    fingerprint: str, recipe: Recipe, segments: Tensor | None = None, behind: Tensor | Prefix | None = None
) -> Artefact:
    """The same by the tokens of the text and the prefix, for calls without a plan, and for checkpoints that were made
    when plans still read the text."""
    text = None if segments is None else {"segments": sha256_of_tensor(segments)}
    return artefact_of(fingerprint, recipe, text, None if behind is None else identity_of_prefix(behind))


def identity_of_prefix(prefix: Tensor | Prefix) -> dict[str, Any]:
    """What identifies a prefix: its ids (P,), and the keys and values of a trained one."""
    if isinstance(prefix, Prefix):
        return {"prefix": prefix.ids.tolist(), "prefix_kv": prefix.digest()}
    return {"prefix": prefix.tolist()}


def identity_of_text(calibration: Calibration, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What identifies a calibration text in a checkpoint: its files, not where they lie, and how it is drawn."""
    c = calibration
    text = text_identity(tokenizer, c.corpus, samples=c.samples, length=c.length)
    return {"text": text, "calibration": {**describe(c), "corpus": text["corpus"]}}
