"""What a model directory says of itself, at one boundary: its config, generation config, tokenizer files.

transformers checks some types and takes any value of them. What the project or a model of the architecture table relies
on has a form here; what is left, transformers refuses while it builds (`corpora.errors.built`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Hash, Size, fitted, read_json, refuse_code
from corpora.storage import MEND
from intactkv.architecture import ARCHITECTURES
from intactkv.parts import attention_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "CONFIG",
    "GENERATION",
    "check_ropes",
    "check_windows",
    "config_of",
    "generation_config_of",
    "tokenizer_config_of",
]

CONFIG, GENERATION = "config.json", "generation_config.json"
# Types of the architecture table whose models ask for a window even if no layer slides.
WINDOWED = ("cohere2", "gemma2", "gemma3_text", "ministral")

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]  # −1 says none in old files


def _ids(value: Any) -> Any:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int and -1 <= number < 2**31 for number in ids):
        raise ValueError("is no token id and no list of them")
    return value


Ids = Annotated[Any, AfterValidator(_ids)]


class _Exported(TypedDict):
    """What an export of ours says of its origin."""

    label: str
    fingerprint: Hash
    basis: str
    needs_prefix: NotRequired[list[Annotated[int, Field(ge=0)]] | None]
    needs_kv: NotRequired[Hash | None]


class _Config(TypedDict, total=False):
    """Of any model type."""

    model_type: Annotated[str, Field(pattern=r"^[\w-]+$")]
    intactkv: _Exported
    quantization_config: dict[str, Any] | None
    compression_config: dict[str, Any] | None


class _Rope(TypedDict, total=False):
    rope_type: str
    type: str
    rope_theta: Positive
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)]
    factor: Annotated[float, Field(ge=1, le=1e6)]
    attention_factor: Positive | None
    beta_fast: Positive
    beta_slow: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Size
    short_factor: list[Positive]
    long_factor: list[Positive]


class _Ropes(_Rope, total=False):
    """One for all blocks, or one for each kind of them."""

    full_attention: _Rope | None
    sliding_attention: _Rope | None


class _Known(_Config, total=False):
    """Of the types in the architecture table."""

    vocab_size: Size
    hidden_size: Annotated[int, Field(ge=1, le=2**24)]
    intermediate_size: Annotated[int, Field(ge=1, le=2**24)]
    ffn_dim: Annotated[int, Field(ge=1, le=2**24)]
    word_embed_proj_dim: Annotated[int, Field(ge=1, le=2**24)] | None
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)]
    num_attention_heads: Annotated[int, Field(ge=1, le=2**16)]
    num_key_value_heads: Annotated[int, Field(ge=1, le=2**16)] | None
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)] | None  # RoPE turns pairs
    max_position_embeddings: Size
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None
    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None
    final_logit_softcapping: Positive | None
    logit_scale: Positive | None
    logits_scaling: Positive
    embedding_multiplier: Positive
    residual_multiplier: Positive
    attention_multiplier: Positive
    no_rope_layers: list[Literal[0, 1]] | None
    layer_types: list[str] | None
    rope_theta: Positive
    rope_parameters: _Ropes | None
    rope_scaling: _Rope | None
    num_experts: Annotated[int, Field(ge=1, le=2**16)]
    num_local_experts: Annotated[int, Field(ge=1, le=2**16)]
    num_experts_per_tok: Annotated[int, Field(ge=1, le=2**16)]
    moe_intermediate_size: Annotated[int, Field(ge=1, le=2**24)]
    shared_expert_intermediate_size: Annotated[int, Field(ge=1, le=2**24)]
    decoder_sparse_step: Annotated[int, Field(ge=1)]
    mlp_only_layers: list[Annotated[int, Field(ge=0)]] | None
    sliding_window: Annotated[int, Field(ge=0, lt=2**31)] | None
    max_window_layers: Annotated[int, Field(ge=0)]
    attention_dropout: Share | None
    dropout: Share
    layerdrop: Share
    pretraining_tp: Size | None
    bos_token_id: TokenId | None
    eos_token_id: Ids
    pad_token_id: TokenId | None
    dtype: str | None
    torch_dtype: str | None
    architectures: list[str] | None
    is_encoder_decoder: Literal[False]
    chunk_size_feed_forward: Literal[0]
    output_hidden_states: Literal[False] | None
    output_attentions: Literal[False] | None
    return_dict: Literal[True] | None


class _Generation(TypedDict, total=False):
    bos_token_id: TokenId | None
    eos_token_id: Ids
    pad_token_id: TokenId | None


class _Token(TypedDict):
    content: str
    lstrip: NotRequired[bool]
    normalized: NotRequired[bool]
    rstrip: NotRequired[bool]
    single_word: NotRequired[bool]
    special: NotRequired[bool]


_Special = str | _Token | list[str | _Token] | dict[str, str | _Token]
_Added = Annotated[int, Field(ge=0, lt=2**31)]


class _Tokenizer(TypedDict, total=False):
    tokenizer_class: Annotated[str, Field(pattern=r"^\w+$")] | None
    chat_template: str | list[dict[str, str]] | dict[str, str] | None
    model_max_length: Annotated[float, Field(gt=0)] | None
    padding_side: Literal["left", "right"]
    truncation_side: Literal["left", "right"]
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], _Token]
    bos_token: str | _Token | None
    eos_token: str | _Token | None
    unk_token: str | _Token | None
    pad_token: str | _Token | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    clean_up_tokenization_spaces: bool | None
    model_input_names: list[str]


def config_of(directory: Path) -> dict[str, Any]:
    """config.json. Raises UserError for what is damaged, beyond every model, or asks for code of the directory."""
    file = directory / CONFIG
    config: dict[str, Any] = read_json(file, "the model configuration", _Config, mend=MEND)
    refuse_code(config, file)
    if config.get("model_type") not in ARCHITECTURES:
        return config
    fitted(config, _Known, f"the model configuration {file}", mend=MEND)
    for name in ("text_config", "decoder", "generator"):
        if name in config:
            raise UserError(
                f"{file} nests another configuration in {name!r}, where {config['model_type']} has none; {MEND}"
            )
    for name in ("rope_parameters", "rope_scaling"):
        for rope in _ropes_in(config.get(name)):
            if not rope.get("rope_type", rope.get("type")) and rope.keys() - {"rope_theta", "partial_rotary_factor"}:
                raise UserError(f"{file}: {name} {dict(rope)} does not say its rope_type, so it has no meaning; {MEND}")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise UserError(
            f"{file}: num_attention_heads {heads} are no multiple of num_key_value_heads {kv_heads}; {MEND}"
        )
    experts, chosen = config.get("num_local_experts", config.get("num_experts")), config.get("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        raise UserError(f"{file}: a token goes to num_experts_per_tok {chosen} of only {experts} experts; {MEND}")
    if config.get("sliding_window") == 0 and config.get("use_sliding_window", True):  # else 0 says that none slides
        raise UserError(f"{file} is damaged: its sliding_window 0 lets no token see another; {MEND}")
    return config


def _ropes_in(told: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """RoPE's parameters: of each kind of blocks, or of all."""
    nested = [of_kind for of_kind in (told or {}).values() if isinstance(of_kind, Mapping)]
    return nested or [told or {}]


def check_ropes(config: "PreTrainedConfig", file: Path) -> None:
    """Raise UserError for RoPE that transformers takes with no more than a warning, or makes another model of.

    config: as transformers made it, which moves what old files say elsewhere (rotary_pct, partial_rotary_factor)
    into rope_parameters.
    """
    kinds = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    for rope in _ropes_in(getattr(config, "rope_parameters", None)):
        if rope and (kind := rope.get("rope_type")) not in kinds:
            raise UserError(f"{file} has the rope_type {kind!r}; known are {', '.join(kinds)}; {MEND}")
        pairs = int(attention_heads(config)[1] * rope.get("partial_rotary_factor", 1)) // 2
        for name in ("short_factor", "long_factor"):
            if name in rope and len(rope[name]) != pairs:
                raise UserError(f"{file} has {len(rope[name])} numbers in {name}, not one for each of {pairs} pairs")


def check_windows(config: "PreTrainedConfig", file: Path) -> None:
    """Raise UserError for kinds of layers that transformers would break on in the first pass.

    config: as transformers made it, which has a window of its own where the file has none.
    """
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"{file}: layer_types holds {', '.join(sorted(strange))}, which a {config.model_type} does not have; known "
            f"are full_attention and sliding_attention; {MEND}"
        )
    if not window and ("sliding_attention" in kinds or config.model_type in WINDOWED):
        why = (
            "its layer_types hold sliding_attention" if "sliding_attention" in kinds else "its model_type asks for one"
        )
        unused = " (use_sliding_window=false)" if getattr(config, "use_sliding_window", True) is False else ""
        raise UserError(f"{file} has no sliding_window{unused}, but {why}; {MEND}")


def generation_config_of(directory: Path) -> None:
    """Look at generation_config.json. Raises UserError for what is damaged."""
    file = directory / GENERATION
    refuse_code(read_json(file, "the generation configuration", _Generation, mend="mend it, or remove it"), file)


def tokenizer_config_of(directory: Path) -> None:
    """Look at the small files of a tokenizer that are there. Raises UserError for what is damaged, or asks for code."""
    file = directory / "tokenizer_config.json"
    if file.is_file():
        refuse_code(read_json(file, "the tokenizer configuration", _Tokenizer, mend=MEND), file)
    forms = {"special_tokens_map.json": dict[str, _Special], "added_tokens.json": dict[str, _Added]}
    for name, form in forms.items():
        if (directory / name).is_file():
            read_json(directory / name, "the tokenizer's file", form, mend=MEND)
