"""Where each model family keeps its parts: the only file that knows.

The key is the configuration's `model_type`. A new family is a row; it gets no fork of its modeling code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from corpora.errors import UserError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of"]


@dataclass(frozen=True)
class Architecture:
    """Dotted names within the model.

    decoder: everything but the head; returns the hidden states that the head reads.
    blocks: the list of decoder blocks. head: the vocabulary projection.
    linears: within a block, in the order of computation; linears of one inner tuple read the same input.
    """

    decoder: str
    blocks: str
    head: str
    linears: tuple[tuple[str, ...], ...]

    def block_name(self, index: int) -> str:
        """Dotted name of a block, as in the checkpoint: `model.layers.3`."""
        return f"{self.blocks}.{index}"

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """The decoder blocks, first to last."""
        return list(model.get_submodule(self.blocks).children())

    def linears_of(self, block: nn.Module, name: str) -> dict[str, nn.Linear]:
        """The block's linears in the order of computation, by their name within the block.

        Raises UserError if the block holds other linears than this table says: then the row is wrong for this model.
        """
        known = [linear for group in self.linears for linear in group]
        found = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        if set(found) != set(known):
            raise UserError(
                f"{name} holds the linears {sorted(found)}, the architecture table expects "
                f"{sorted(known)}; this variant of the model type is not supported"
            )
        return {linear: found[linear] for linear in known}


LLAMA = Architecture(
    decoder="model",
    blocks="model.layers",
    head="lm_head",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
)
OPT = Architecture(
    decoder="model.decoder",
    blocks="model.decoder.layers",
    head="lm_head",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,  # LLaMA 1 to 3, Vicuna, SmolLM2
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "opt": OPT,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The row of a model's type. Raises UserError, with the types there are, for an unknown one."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type {config.model_type!r} is not in the architecture table; quantization supports "
            f"{', '.join(ARCHITECTURES)}. A new type is a row in quantization/architecture.py"
        )
    return ARCHITECTURES[config.model_type]
