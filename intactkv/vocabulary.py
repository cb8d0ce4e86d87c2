"""Token ids meet a model here: one that its embedding does not have is told before it is looked up.

Tokenizers often have tokens that were added later, such as [PAD], and that the model never got.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from corpora.errors import UserError

__all__ = ["known_ids"]


def known_ids(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """The ids as they are. Raises UserError for one that the model's embedding has no row for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    if not ids.numel():
        return ids
    lowest, highest = torch.stack(ids.aminmax()).tolist()  # one look: on a GPU each one waits for all that runs there
    if lowest < 0 or highest >= rows:
        unknown = sorted(set(ids[(ids < 0) | (ids >= rows)].tolist()))
        raise UserError(
            f"the text holds the token ids {', '.join(map(str, unknown[:5]))}, but the embedding of "
            f"{model.name_or_path or model.config.model_type} has {rows} rows; the tokenizer has tokens that the model "
            "never got: take them out of the text, or out of the tokenizer's added tokens"
        )
    return ids
