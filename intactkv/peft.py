"""An intact prefix as a PEFT prefix-tuning adapter, and back.

Prefix tuning (Li & Liang, arXiv 2101.00190) without its projection puts stored keys and values in front of every
layer's cache, which is what IntactKV does: any program that loads PEFT adapters can run a quantized model behind an
intact prefix, with no code of this project.

    one row a token = [K of layer 0 | V of layer 0 | K of layer 1 | …], each its KV heads × D

PEFT itself is not needed, on neither way. An adapter holds K and V alone; the prefix's own file lies beside them, with
the token ids, the full-precision logits at them and whose they are. That file has the sum: K and V of the adapter, in
PEFT's own layout, must be the same numbers. Of the configuration only the sizes count; no name in it is followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Size, fitted, read_json, refuse_code, write_json
from corpora.storage import is_finite, open_tensors, write_tensors
from corpora.writing import directory_beside
from intactkv.prefix import Prefix, build_prefix

__all__ = ["CONFIG", "PREFIX_FILE", "is_adapter", "read_adapter", "write_adapter"]

CONFIG = "adapter_config.json"  # these three names and the tensor's are PEFT's
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MATRIX = "prompt_embeddings"
PREFIX_FILE = "intactkv-prefix.safetensors"
EXPORT_AGAIN = "export the prefix again"


class _Config(TypedDict):
    """What an adapter's configuration must say to be read; PEFT writes more."""

    num_virtual_tokens: Size
    num_layers: Size
    num_attention_heads: Size
    token_dim: Size


README = """# An intact prefix as a PEFT adapter

Keys and values of the leading tokens {ids} as the full-precision model wrote them (IntactKV, arXiv 2403.01241).
It belongs to one model and its quantized forms:
{model}.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(quantized_model, "{name}")
model.generate(**tokenizer(text, add_special_tokens=False, return_tensors="pt"), max_new_tokens=64)
```

    lm_eval --model hf --model_args pretrained=QUANTIZED_DIR,peft={name},add_bos_token=False --tasks …

- Texts must not contain the prefix's tokens: these are in the adapter. A tokenizer that puts [BOS] in front must be
  told not to, or the model reads it twice.
- lm-eval puts a start token of its own in front of texts without a context (rolling perplexity), does not count the
  positions of the prefix in the model's context, and with an adapter cuts the model's vocabulary to the tokenizer's:
  where the model has more rows than the tokenizer tokens, probabilities rise a little.
- `generate` counts positions right under left padding. A direct forward pass over a left-padded batch needs
  `position_ids`, counted from 0 at each row's first real token; without them its logits are wrong.
- Models with a sliding window: padding on the left counts as text, so a padded batch that is longer than the window
  loses the prefix without a word. Use rows of equal length there, or a batch of one.

`{file}` holds the same keys and values with what PEFT has no place for: token ids, logits, the
model's identity. IntactKV's programs take this directory as `--prefix`.
"""


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter, of whatever kind."""
    return (Path(directory) / CONFIG).is_file()


# Writing --------------------------------------------------------------------------------------------------------------


def write_adapter(prefix: Prefix, directory: str | Path, base_model: str | Path | None = None) -> None:
    """Write the prefix to a new directory that `PeftModel.from_pretrained` loads on any form of the prefix's model.

    base_model: name or path of a model that it fits, for `AutoPeftModelForCausalLM`; everything else ignores it.
    Raises UserError if the directory exists, or for layers of different shapes, which PEFT would cut to one.
    """
    directory, owner = Path(directory), prefix.model
    if directory.exists():
        raise UserError(f"{directory} exists already; choose another directory or remove it")
    expected = (1, owner.kv_heads, len(prefix), owner.head_dim)
    for layer, pair in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        for name, state in zip("KV", pair, strict=True):
            if state.shape != expected:
                raise UserError(
                    f"layer {layer} has {name} of shape {tuple(state.shape)}, but a prefix-tuning adapter holds one "
                    f"shape for all layers, here {expected}; this {owner.model_type} model cannot be served by PEFT"
                )
    width = owner.kv_heads * owner.head_dim
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base_model is None else str(base_model),
        "inference_mode": True,
        "num_virtual_tokens": len(prefix),
        "num_layers": owner.n_layers,
        "num_attention_heads": owner.kv_heads,  # PEFT's name for the heads that K and V have
        "token_dim": width,
        "encoder_hidden_size": width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
    text = README.format(
        ids=prefix.ids.tolist(),
        model=", ".join(f"{name} {value}" for name, value in owner.stored().items() if name != "rope"),
        name=directory.name,
        file=PREFIX_FILE,
    )
    trained = (prefix.calibrated or {}).get("for")
    if trained is not None:
        text += f"\nKeys and values were trained for the weights {trained['weights']}; others read them less well.\n"
    with directory_beside(directory) as partial:
        write_tensors(partial / WEIGHTS, {MATRIX: _rows(prefix)}, {"format": "pt"})
        prefix.save(partial / PREFIX_FILE)
        write_json(partial / CONFIG, config)
        (partial / "README.md").write_text(text, encoding="utf-8")


def _rows(prefix: Prefix) -> Tensor:
    """One row a token: K and V of layer 0, of layer 1, …, each with its heads one after the other: (P, 2·L·H·D)."""
    states = [state[0] for layer in zip(prefix.keys, prefix.values, strict=True) for state in layer]  # (H, P, D) each
    return torch.stack(states).permute(2, 0, 1, 3).reshape(len(prefix), -1)


# Reading --------------------------------------------------------------------------------------------------------------


def read_adapter(
    directory: str | Path, *, ids: Sequence[int] | Tensor | None = None, model: PreTrainedModel | None = None
) -> Prefix:
    """The prefix of a directory that `write_adapter` wrote, bit for bit; also after PEFT saved it again in float32.

    ids, model: for an adapter of elsewhere, which has no file of ours: the P tokens that its rows stand for, and the
        full-precision model it belongs to. K and V are then the adapter's, logits and identity the model's at these
        ids; a file of ours that lies beside is not read.
    Raises UserError if it is missing, truncated, no prefix-tuning adapter, one with a projection, one that fits no
    prefix of the model, one whose K and V are not those of the file beside, or if the token ids are not known.
    """
    directory = Path(directory)
    adapter = _read(directory)
    if (ids is None) != (model is None):
        raise UserError(f"{directory}: give both, the token ids and the full-precision model, or none of them")
    if ids is not None and model is not None:
        prefix = build_prefix(model, ids)
        adapter.check_fits(prefix, "the given model and ids")
        return replace(prefix, keys=adapter.keys, values=adapter.values)
    if not (directory / PREFIX_FILE).is_file():
        raise UserError(
            f"{directory} has no {PREFIX_FILE}, so the token ids of its {adapter.tokens} rows and the full-precision "
            "logits at them are not known; in Python, intactkv.peft.read_adapter(DIR, ids=…, model=…) takes both from "
            "you, and save() of what it returns makes a prefix file"
        )
    prefix = Prefix.load(directory / PREFIX_FILE)
    adapter.check_fits(prefix, f"the {PREFIX_FILE} beside it")
    ours, theirs = (*prefix.keys, *prefix.values), (*adapter.keys, *adapter.values)
    if not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, theirs, strict=True)):
        raise UserError(
            f"the keys and values in {directory / WEIGHTS} are not those of the {PREFIX_FILE} beside it: one of the "
            "two was trained or replaced; export the prefix again, or remove the file that is not meant"
        )
    return prefix


@dataclass(frozen=True, eq=False)
class _Adapter:
    """What an adapter's own files say. keys, values: per layer (1, H, P, D)."""

    directory: Path
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """P, the number of its rows."""
        return self.keys[0].shape[2]

    def check_fits(self, prefix: Prefix, whose: str) -> None:
        """Raise UserError unless it has the shape of a prefix."""
        ours = (len(self.keys), *self.keys[0].shape[1:])
        theirs = (prefix.model.n_layers, prefix.model.kv_heads, len(prefix), prefix.model.head_dim)
        if ours != theirs:
            names = "layers, KV heads, tokens, head dimension"
            raise UserError(f"{self.directory} does not fit {whose}: its {names} are {ours}, there {theirs}")


def _read(directory: Path) -> _Adapter:
    """An adapter's configuration and matrix, checked. Raises UserError for all but plain prefix tuning."""
    if not directory.is_dir():
        raise UserError(f"adapter directory {directory} is missing; make it with `python -m intactkv export`")
    if not is_adapter(directory):
        raise UserError(
            f"{directory} has no {CONFIG}, so it is no PEFT adapter; make one with `python -m intactkv export`"
        )
    file, what = directory / CONFIG, "the adapter's configuration"
    config = read_json(file, what, dict, mend=EXPORT_AGAIN)
    if (kind := config.get("peft_type")) != "PREFIX_TUNING":
        raise UserError(
            f"{directory} holds {f'a {kind}' if kind else 'no known'} adapter; a prefix is one of PREFIX_TUNING"
        )
    if config.get("prefix_projection"):
        raise UserError(
            f"{directory} is an adapter with a projection (prefix_projection), trained rather than written by a "
            "full-precision model; a prefix has none"
        )
    refuse_code(config, file)
    fitted(config, _Config, f"{what} {file}", mend=EXPORT_AGAIN)
    tokens, layers = config["num_virtual_tokens"], config["num_layers"]
    heads, width = config["num_attention_heads"], config["token_dim"]
    if width % heads:
        raise UserError(f"{file}: token_dim {width} is no multiple of its num_attention_heads {heads}")
    matrix = _matrix(directory)
    if matrix.shape != (tokens, 2 * layers * width) or not matrix.is_floating_point():
        raise UserError(
            f"{directory / WEIGHTS}: {MATRIX} is {matrix.dtype} and has shape {tuple(matrix.shape)}; {CONFIG} says "
            f"{tokens} tokens and {layers} layers of {width} channels, which makes floats of "
            f"({tokens}, {2 * layers * width})"
        )
    if not is_finite(matrix):
        raise UserError(f"{directory / WEIGHTS}: {MATRIX} holds values that are not finite; {EXPORT_AGAIN}")
    states = matrix.view(tokens, 2 * layers, heads, width // heads).permute(1, 2, 0, 3)  # (2·L, H, P, D)
    parts = [state[None].contiguous() for state in states]
    return _Adapter(directory, tuple(parts[0::2]), tuple(parts[1::2]))


def _matrix(directory: Path) -> Tensor:
    """The stored matrix, (P, 2·L·H·D)."""
    file = directory / WEIGHTS
    if not file.exists():
        pickled = (
            f"; {PICKLE} is a pickle and not read, save it as safetensors" if (directory / PICKLE).exists() else ""
        )
        raise UserError(f"{file} is missing{pickled}")
    with open_tensors(file, "the adapter's file", EXPORT_AGAIN) as tensors:
        if (names := sorted(tensors.keys())) != [MATRIX]:
            held = ", ".join(names[:3]) or "nothing"
            raise UserError(
                f"the adapter's file {file} holds {held}, but prefix tuning has {MATRIX} alone; {EXPORT_AGAIN}"
            )
        return tensors.get_tensor(MATRIX)
