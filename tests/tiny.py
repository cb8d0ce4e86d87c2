"""Tiny random models of every family: sizes that its configuration has, and parameters that all matter.

A default initialisation hides faults: norms that multiply by one, biases of zero, caps that nothing reaches. So every
parameter gets noise around what transformers starts it with, and multipliers, caps and windows are far from one.

    python -m tests.tiny MODEL_TYPE DIR        writes such a model and its tokenizer, for programs that take a directory
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

PAD, BOS, EOS = 0, 1, 2
LAYERS = 3
WINDOW = 48  # of the layers that slide

# What a configuration has of these is set. Families whose layers slide in turns get windows; the others see all.
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.35,
    "logits_scaling": 2.0,
    "logit_scale": 0.3,
    "query_pre_attn_scalar": 12,
    "sliding_window": None,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
OF_TYPE: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW},
    "qwen3_moe": {"norm_topk_prob": True},
}

# Configurations of a type that is more than one model: its name, the type, and what differs from the tiny one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt projected": ("opt", {"word_embed_proj_dim": 32}),
    "mistral sliding": ("mistral", {"sliding_window": 6, "head_dim": 32}),  # shorter than the texts
    "falcon grouped": ("falcon", {"new_decoder_architecture": True, "multi_query": False}),
    "falcon alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True,
                                "num_kv_heads": 4}),
    "qwen3_moe of one": ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 1}),
    "cohere norms": ("cohere", {"use_qk_norm": True}),
    "olmoe clipped": ("olmoe", {"clip_qkv": 2.0}),
    "qwen3_moe mixed": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "gemma2 both ways": ("gemma2", {"use_bidirectional_attention": True}),
    "opt gelu": ("opt", {"activation_function": "gelu"}),  # Galactica
}  # fmt: skip


@cache
def _fields(model_type: str) -> frozenset[str]:
    """The names that a configuration of this type can be given."""
    kind = CONFIG_MAPPING[model_type]
    return frozenset({*kind().to_dict(), *kind.attribute_map})


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """3 layers, hidden 64, 4 heads over 2 KV heads where the family has groups, 101 tokens, float32."""
    fields = _fields(model_type)
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    sizes |= {name: 0.0 for name in fields if "drop" in name}
    sizes |= {"tie_word_embeddings": False, "dtype": torch.float32, **OF_TYPE.get(model_type, {})}
    layers = overrides.get("num_hidden_layers", LAYERS)
    if sizes.get("sliding_window") is not None and "layer_types" in fields:
        sizes["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    if "no_rope_layers" in fields:  # SmolLM3 turns the layers of a 1
        sizes["no_rope_layers"] = [(i + 1) % 2 for i in range(layers)]
    return CONFIG_MAPPING[model_type](**{**sizes, **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model in evaluation mode whose activations and logits spread widely; `overrides` go to its config."""
    return random_model(tiny_config(model_type, **overrides), seed)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The same, of a configuration."""
    dtype = config.dtype  # from_config overwrites it
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    turned = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}  # (in, out)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 or "norm" in name:
            parameter.add_(0.3 * noise)  # to a scale of 1 (Gemma's: 0), to a bias of 0
        elif any(word in name for word in ("embed", "lm_head", "wte", "wpe")):
            parameter.copy_(0.4 * noise)
        else:
            inputs = parameter.shape[0] if id(parameter) in turned else parameter.shape[-1]
            parameter.copy_(1.5 * noise / inputs**0.5)
    model.tie_weights()
    model.config.dtype = dtype
    return model.to(dtype)


def main() -> None:
    """Write a tiny model and its tokenizer to a directory."""
    parser = argparse.ArgumentParser(prog="python -m tests.tiny", description=__doc__)
    parser.add_argument("model_type", choices=CONFIG_MAPPING, metavar="MODEL_TYPE", help="that transformers knows")
    parser.add_argument("directory", metavar="DIR")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # as pytest does
    from conftest import _tiny_tokenizer

    tiny_model(options.model_type).save_pretrained(options.directory)
    _tiny_tokenizer().save_pretrained(options.directory)


if __name__ == "__main__":
    main()
