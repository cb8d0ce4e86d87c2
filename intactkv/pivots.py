"""Find pivot tokens: the few positions whose hidden state is hundreds of times larger than everybody else's.

Massive activations (Sun et al. 2024, 2402.17762): a value counts as massive if it exceeds 100 in magnitude and 1000
times the median magnitude of its layer's hidden state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Magnitudes", "hidden_magnitudes"]

MASSIVE = 100.0  # smallest magnitude that counts (2402.17762, section 2)
MASSIVE_RATIO = 1000.0  # times the median magnitude of the layer


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Activation magnitudes of one text. largest: (L + 1, T), max over channels of |hidden state|, row 0 the
    embeddings, row l the output of block l. median: (L + 1,), over all tokens and channels."""

    largest: Tensor
    median: Tensor

    def pivots(self) -> list[int]:
        """Positions that hold a massive activation in any layer, in ascending order."""
        massive = (self.largest > MASSIVE) & (self.largest > MASSIVE_RATIO * self.median[:, None])
        return massive.any(dim=0).nonzero().flatten().tolist()


@torch.inference_mode()
def hidden_magnitudes(model: PreTrainedModel, ids: Tensor) -> Magnitudes:
    """Run a model over (T,) ids and measure its residual stream.

    The last row is the output of the last block before the final norm: transformers reports it after the norm, which
    would hide the pivots, so it is taken from the norm's input.
    """
    decoder = model.base_model.decoder if hasattr(model.base_model, "decoder") else model.base_model
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None)
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0])) if norm is not None else None
    try:
        output = model(input_ids=ids[None].to(model.device), output_hidden_states=True, use_cache=False)
    finally:
        if handle is not None:
            handle.remove()
    states = [*output.hidden_states[:-1], seen[-1] if seen else output.hidden_states[-1]]
    magnitudes = [state[0].float().abs().cpu() for state in states]
    return Magnitudes(
        torch.stack([m.amax(dim=-1) for m in magnitudes]), torch.stack([m.flatten().median() for m in magnitudes])
    )
