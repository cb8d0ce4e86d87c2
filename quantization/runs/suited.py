"""Whether a method runs on a model, and if not, why: from the model without weights, by the checks that runs make."""

from collections.abc import Collection

from transformers import PreTrainedModel

from corpora.errors import UserError, one_line
from intactkv.architecture import ARCHITECTURES, architecture_of, heads_of
from quantization.kv_cache import Policy
from quantization.recipes.recipe import Recipe
from quantization.runs.fitting import check_calibration, check_length
from quantization.runs.kept import check_layers
from quantization.runs.pipeline import check_recipe

__all__ = ["check_suited", "refusal", "unlike_blocks"]


def check_suited(
    model: PreTrainedModel,
    recipe: Recipe,
    prefix: int = 0,
    blocks: Collection[int] | None = None,
    reads_text: bool = True,
) -> None:
    """Raise UserError, before any work, for what this model cannot have of a recipe, or in front of it.

    model: without weights, laid out if it has a row. prefix: how many tokens stand in front of every text. blocks: as
    in `check_recipe`.
    """
    if recipe.makes_checkpoint:
        check_recipe(model, recipe, blocks)
    text = model.config.get_text_config(decoder=True)
    if (kv := recipe.kv_cache) is not None:
        check_layers(kv.in_heads(heads_of(text)[1]) if isinstance(kv, Policy) else kv, text)
    context, name = getattr(text, "max_position_embeddings", None), f"this {model.config.model_type}"
    if prefix:
        check_length(model.config, prefix, context, f"a prefix of {prefix} tokens", name)
    if recipe.calibrates and reads_text:
        check_calibration(recipe, prefix, name, context)


def refusal(
    model: PreTrainedModel, recipe: Recipe, prefix: int = 0, blocks: Collection[int] | None = None
) -> str | None:
    """What `check_suited` says against it, in one line; None for what runs."""
    try:
        check_suited(model, recipe, prefix, blocks)
    except UserError as error:
        return one_line(str(error))
    return None


def unlike_blocks(model: PreTrainedModel) -> list[int]:
    """The first of each kind of block: of other modules, other shapes, or other positions. Empty without a row."""
    if model.config.model_type not in ARCHITECTURES:
        return []
    architecture, kinds = architecture_of(model.config), dict[object, int]()
    for index, block in enumerate(architecture.blocks_of(model)):
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        kinds.setdefault((type(block), shapes, index in architecture.unturned), index)
    return list(kinds.values())
