"""What calibration sees: how much of every Hessian belongs to a few tokens, such as the first one or the pivots."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.architecture import architecture_of
from intactkv.finite import finite
from intactkv.observe import hooked, on_input
from intactkv.vocabulary import known_ids

__all__ = ["first_token_share", "position_share"]


def first_token_share(model: PreTrainedModel, segments: Tensor) -> dict[str, Tensor]:
    """Share of tr H that position 0 owns, per block, for every set of linears that read one input.

    segments: (N, T) ids. Returns shares in 0…1, (blocks,), by the name of the set's first linear; an even share is 1/T.
    """
    return position_share(model, segments, [[0]] * len(segments))


@torch.no_grad()
def position_share(model: PreTrainedModel, segments: Tensor, positions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Share of tr H that some positions own together, per block, for every set of linears that read one input.

    H = Σ x xᵀ over all tokens, so tr H = Σ ‖x‖² and the share of a token is its ‖x‖². An even share is 1/T a token.
    segments: (N, T) ids; positions: those of each segment. Returns shares in 0…1, (blocks,), by the name of the set's
    first linear. Raises UserError for numbers that are none.
    """
    architecture = architecture_of(model.config)
    blocks = architecture.blocks_of(model)
    names = [linears[0] for linears in architecture.everywhere]
    energy = {name: torch.zeros(len(blocks), segments.shape[1], dtype=torch.float64) for name in names}
    owned = {name: torch.zeros(len(blocks), dtype=torch.float64) for name in names}
    chosen: list[int] = []  # of the segment that is running

    def look(name: str, index: int, x: Tensor) -> None:
        per_token = x.reshape(-1, x.shape[-1]).double().square().sum(-1).cpu()
        energy[name][index] += per_token
        owned[name][index] += per_token[chosen].sum()

    watched = [(name, index, block.get_submodule(name)) for index, block in enumerate(blocks) for name in names]
    decoder: nn.Module = model.get_submodule(architecture.decoder)
    with hooked(on_input(linear, partial(look, name, index)) for name, index, linear in watched):
        for segment, of_segment in zip(segments, positions, strict=True):
            chosen[:] = of_segment
            decoder(input_ids=known_ids(segment, model)[None].to(model.device), use_cache=False)
    for name, per_token in energy.items():
        finite(per_token, f"inputs of {name} in {model.name_or_path or model.config.model_type}, by block and token")
    return {name: (owned[name] / per_token.sum(-1)).float() for name, per_token in energy.items()}
