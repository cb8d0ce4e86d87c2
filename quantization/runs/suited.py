"""Whether a method runs on a model, and if not, why: from the model without weights, by the checks that runs make."""

from transformers import PreTrainedModel

from corpora.errors import UserError, one_line
from intactkv.architecture import heads_of
from quantization.kv_cache import Policy
from quantization.recipes.recipe import Recipe
from quantization.runs.fitting import check_length
from quantization.runs.kept import check_layers
from quantization.runs.pipeline import check_recipe

__all__ = ["check_suited", "refusal"]


def check_suited(model: PreTrainedModel, recipe: Recipe, prefix: int = 0) -> None:
    """Raise UserError, before any work, for what this model cannot have of a recipe, or in front of it.

    model: without weights, laid out if it has a row. prefix: how many tokens stand in front of every text.
    """
    if recipe.makes_checkpoint:
        check_recipe(model, recipe)
    text = model.config.get_text_config(decoder=True)
    if (kv := recipe.kv_cache) is not None:
        check_layers(kv.in_heads(heads_of(text)[1]) if isinstance(kv, Policy) else kv, text)
    if prefix:
        context = getattr(text, "max_position_embeddings", None)
        check_length(model.config, prefix, context, f"a prefix of {prefix} tokens", f"this {model.config.model_type}")


def refusal(model: PreTrainedModel, recipe: Recipe, prefix: int = 0) -> str | None:
    """What `check_suited` says against it, in one line; None for what runs."""
    try:
        check_suited(model, recipe, prefix)
    except UserError as error:
        return one_line(str(error))
    return None
