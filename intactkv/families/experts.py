"""Families whose feed-forward part is a mixture of experts: `intactkv.layout` takes the stacks of their matrices apart.

A router reads what the experts read, and is never rounded; its columns take over the scales of the norm in front.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from corpora.errors import UserError
from intactkv.families.llama import LLAMA, QWEN3
from intactkv.parts import Architecture, Experts, Feed, Row, divided_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ROWS", "with_experts"]

# What the files of Mixtral call its parts.
MIXTRAL = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}


def with_experts(row: Architecture, experts: Experts, shared: tuple[str, ...] = ()) -> Architecture:
    """A row whose feed-forward part is experts. shared: of an expert that every token sees, with its gate, if there is
    one: (module, gate)."""
    attention, feeds = row.linears[:2], row.feeds[:2]
    one_each = ([shared[0]] if shared else []) + [experts.of(i) for i in range(experts.count)]
    linears: list[tuple[str, ...]] = []
    pairs: list[Feed] = []
    readers: list[str] = []
    for name in one_each:
        inputs, output = tuple(f"{name}.{part}" for part in experts.inputs), f"{name}.{experts.output}"
        linears += [inputs, (output,)]
        readers += inputs
        pairs.append(Feed(inputs[1], (output,), output))
    norm = Feed(row.feeds[2].producer, tuple(readers), row.feeds[2].inside, (experts.router, *shared[1:]))
    down = f"{shared[0]}.{experts.output}" if shared else ""
    return replace(row, linears=(*attention, *linears), feeds=(*feeds, norm, *pairs), experts=experts, down=down)


def _mixtral(config: "PreTrainedConfig") -> Architecture:
    """Mixtral: all blocks have experts; its files hold each of them alone."""
    experts = Experts(
        "mlp.experts", config.num_local_experts, "mlp.gate", config.intermediate_size, config.num_experts_per_tok
    )
    return replace(with_experts(LLAMA, experts), stored=(MIXTRAL,), exported=MIXTRAL)


def _qwen3_moe(config: "PreTrainedConfig") -> Architecture:
    """Qwen3 with experts in all blocks."""
    return with_experts(QWEN3, _qwen_experts(config))


def _qwen2_moe(config: "PreTrainedConfig") -> Architecture:
    """Qwen 1.5 and 2 with experts in all blocks, and one that every token sees, behind a gate of its own."""
    return with_experts(LLAMA, _qwen_experts(config), ("mlp.shared_expert", "mlp.shared_expert_gate"))


def _qwen_experts(config: "PreTrainedConfig") -> Experts:
    """The same in all blocks. Raises UserError where some have none."""
    plain = [
        i
        for i in range(config.num_hidden_layers)
        if i in (config.mlp_only_layers or ()) or not config.num_experts or (i + 1) % config.decoder_sparse_step
    ]
    if plain:
        raise UserError(
            f"this {config.model_type} has blocks without experts ({', '.join(map(str, plain[:5]))}"
            f"{', …' if len(plain) > 5 else ''}: mlp_only_layers={config.mlp_only_layers}, "
            f"decoder_sparse_step={config.decoder_sparse_step}), and the architecture table knows only models whose "
            "blocks are alike; run it in full precision with other programs, or take a model with experts in all blocks"
        )
    return Experts(
        "mlp.experts", config.num_experts, "mlp.gate", config.moe_intermediate_size, config.num_experts_per_tok
    )


def _olmoe(config: "PreTrainedConfig") -> Architecture:
    """OLMoE: norms over all heads' queries and keys; clip_qkv cuts them and the values."""
    divided_heads(config)
    experts = Experts(
        "mlp.experts", config.num_experts, "mlp.gate", config.intermediate_size, config.num_experts_per_tok
    )
    why = None
    if config.clip_qkv is not None:
        why = (
            f"cuts queries, keys and values at clip_qkv={config.clip_qkv:g}, which scales and rotations would move "
            "out of their place"
        )
    return replace(with_experts(QWEN3, experts), unscaled=why, unrotated=why)


ROWS: Mapping[str, Row] = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "olmoe": _olmoe,
}
