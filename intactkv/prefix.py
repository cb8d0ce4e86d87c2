"""The IntactKV prefix: keys and values of the leading tokens, as the full-precision model wrote them.

Built once by the *full-precision twin* of a quantized model: the same function with every exact weight transform
already applied and every quantizer off. Only then are K and V in the basis that the quantized model reads (IntactKV,
arXiv 2403.01241, section 3; the table of bases is the contract of every method here).

Per layer K and V of shape (1, KV heads, P, D), keys after RoPE at positions 0…P − 1; the logits at the P tokens are
kept as well, because what the last prefix token predicts comes from the full-precision model.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import torch
from pydantic import ConfigDict
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Size
from corpora.storage import checkpoint_fingerprint, is_finite, read_artefact, sha256_of_tensor, write_artefact
from intactkv.architecture import ARCHITECTURES, heads_of
from intactkv.cache import IntactCache
from intactkv.copies import Copies
from intactkv.policy import KVPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ModelIdentity", "Owner", "Prefix", "build_prefix", "check_owner", "identity_of", "input_embeddings"]

FORMAT = 1
KIND = "intactkv"  # of the file's header
BUILD_AGAIN = "build it again with `python -m intactkv build`"
PLAIN_BASIS = "plain"  # no weight transform: K and V as the original checkpoint computes them
# A quantized or half-precision embedding differs by a few per cent from the full-precision one; another model's
# embedding of the same token by about 100 %.
SAME_EMBEDDING = 0.2


class Owner(TypedDict):
    """A `ModelIdentity` as the headers of files hold it."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic's own way to say it

    model_type: str
    layers: Size
    kv_heads: Size
    head_dim: Size
    vocabulary: Size
    rope: str
    fingerprint: str | None
    basis: str


class _TrainedFor(TypedDict):
    weights: str
    made_of: dict[str, Any]
    kv: NotRequired[dict[str, Any] | None]


_Trained = TypedDict("_Trained", {"for": NotRequired[_TrainedFor]})


class _Header(TypedDict):
    format: int
    model: Owner
    calibrated: NotRequired[_Trained | None]


@dataclass(frozen=True)
class ModelIdentity:
    """What must agree between the model that wrote a prefix and the model that reads it.

    fingerprint: of the full-precision checkpoint's content; None when the model did not come from a local directory.
    basis: the exact transforms between that checkpoint and the model, `PLAIN_BASIS` for none.
    """

    model_type: str
    n_layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope: str
    fingerprint: str | None
    basis: str

    def stored(self) -> dict[str, Any]:
        """As files keep it: the number of layers is called `layers` there."""
        return {"layers" if name == "n_layers" else name: value for name, value in asdict(self).items()}

    @classmethod
    def restore(cls, stored: dict[str, Any]) -> "ModelIdentity":
        """Undo `stored`."""
        return cls(**{"n_layers" if name == "layers" else name: value for name, value in stored.items()})


def input_embeddings(model: PreTrainedModel) -> Tensor:
    """The token embedding matrix, (vocabulary, hidden size)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def identity_of(model: PreTrainedModel, stored: str | None = None) -> ModelIdentity:
    """Identity of a loaded model.

    The project's loaders leave `intactkv_source` (fingerprint, basis) on the model, its exports the same in the
    configuration; any other model is taken to be in the plain basis, with the fingerprint of the local directory that
    it was loaded from, if there is one. stored: the fingerprint that a file names (`checkpoint_fingerprint`).
    """
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    source = getattr(model, "intactkv_source", None)
    if source is None and (exported := getattr(model.config, "intactkv", None)) is not None:
        source = (exported["fingerprint"], exported["basis"])
    if source is None:
        directory = Path(model.name_or_path or "")
        quantized = getattr(model.config, "quantization_config", None) is not None
        local = bool(model.name_or_path) and (directory / "config.json").is_file() and not quantized
        source = (checkpoint_fingerprint(directory, stored) if local else None, PLAIN_BASIS)
    kv_heads, head_dim = heads_of(config)
    return ModelIdentity(
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        rope=json.dumps(getattr(config, "rope_parameters", None), sort_keys=True, default=str),
        fingerprint=source[0],
        basis=source[1],
    )


def check_owner(owner: ModelIdentity, model: PreTrainedModel, what: str, way_out: str) -> None:
    """Raise UserError unless what was made for one model is read by it, or by one of the same keys and values. what:
    was made, as `prefix`; way_out: what to do instead."""
    reader = identity_of(model, owner.fingerprint).stored()
    for name, ours in owner.stored().items():
        theirs = reader[name]
        if ours != theirs and None not in (ours, theirs):
            raise UserError(
                f"this {what} belongs to another model or basis: {name} is {ours!r} in the {what} and {theirs!r} in "
                f"the model; {way_out}"
            )


@dataclass(frozen=True, eq=False)
class Prefix:
    """Token ids (P,), K and V per layer (1, KV heads, P, D), logits (P, vocabulary), and whose they are.

    embeddings: (P, hidden) float32, the input embeddings of the ids: tells models apart that have no fingerprint.
    calibrated: for which quantized model and how its K and V were trained, as JSON; None as full precision wrote them.
    """

    ids: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor
    embeddings: Tensor
    model: ModelIdentity
    calibrated: dict[str, Any] | None = None
    copies: Copies = field(default_factory=Copies, init=False, repr=False)

    def __len__(self) -> int:
        """P, the number of prefix tokens."""
        return self.ids.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the full-precision model computed in."""
        return self.keys[0].dtype

    def digest(self) -> str:
        """SHA-256 of K and V in float32: what a model that was calibrated behind them remembers."""
        return sha256_of_tensor(torch.cat([x.float().flatten() for x in (*self.keys, *self.values)]))

    def first(self, count: int) -> "Prefix":
        """The prefix of the first `count` tokens. Attention is causal, so this is a slice, not another run."""
        if not 1 <= count <= len(self):
            raise UserError(f"a prefix of {len(self)} tokens has no first {count}; choose 1 to {len(self)}")
        return replace(
            self,
            ids=self.ids[:count],
            keys=tuple(k[:, :, :count] for k in self.keys),
            values=tuple(v[:, :, :count] for v in self.values),
            logits=self.logits[:count],
            embeddings=self.embeddings[:count],
        )

    def cache(
        self, config: "PreTrainedConfig", policy: KVPolicy | None = None, single_pass: bool = False
    ) -> IntactCache:
        """A fresh cache that starts with this prefix; a forward pass grows it, so make one per call."""
        return IntactCache(config, self.keys, self.values, policy, single_pass, self.copies)

    def check(self, model: PreTrainedModel) -> None:
        """Raise UserError unless this prefix was written by the full-precision twin of `model`."""
        check_owner(self.model, model, "prefix", "build the prefix with this model's full-precision twin")
        weight = input_embeddings(model)
        if weight.is_floating_point() and not weight.is_meta:
            rows = weight[self.ids.to(weight.device)].detach().float().cpu()
            error = float((rows - self.embeddings).norm() / self.embeddings.norm().clamp_min(1e-12))
            if rows.shape != self.embeddings.shape or not error < SAME_EMBEDDING:
                raise UserError(
                    f"this prefix belongs to another model: its tokens' embeddings differ by {error:.0%}; "
                    "build the prefix with this model's full-precision twin"
                )

    def check_finite(self, whose: str) -> None:
        """Raise UserError for keys, values or logits that are not finite. whose: for the message."""
        parts = {"embeddings": (self.embeddings,), "keys": self.keys, "values": self.values, "logits": (self.logits,)}
        for name, tensors in parts.items():
            for layer, tensor in enumerate(tensors):
                if not is_finite(tensor):
                    where = f" of layer {layer}" if len(tensors) > 1 else ""
                    raise UserError(
                        f"{whose} has {name}{where} that are not finite: the weights behind it are damaged, or its "
                        f"dtype {str(self.dtype).removeprefix('torch.')} is too narrow; check the checkpoint, or build "
                        "it in float32"
                    )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a sum, atomically; the model's identity is in its header. Raises UserError if
        the prefix is not finite."""
        tensors = {"ids": self.ids, "logits": self.logits, "embeddings": self.embeddings}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"layers.{layer}.key"], tensors[f"layers.{layer}.value"] = key, value
        header = {"format": FORMAT, "model": self.model.stored(), "calibrated": self.calibrated}
        write_artefact(Path(path), KIND, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Prefix":
        """Read what `save` wrote. Raises UserError if the file is missing, truncated, no prefix, not finite, or has
        changed since it was written."""
        path = Path(path)
        if not path.exists():
            raise UserError(
                f"prefix file {path} is missing; make it with "
                "`python -m intactkv build --model DIR --prefix bos --out FILE`"
            )
        header, tensors = read_artefact(path, KIND, _Header, "prefix file", BUILD_AGAIN)
        if header["format"] != FORMAT:
            raise UserError(
                f"prefix file {path} has format {header['format']}, this version reads {FORMAT}; build it again"
            )
        model = ModelIdentity.restore(header["model"])
        _check_tensors(path, model, tensors)
        return cls(
            ids=tensors["ids"],
            keys=tuple(tensors[f"layers.{i}.key"] for i in range(model.n_layers)),
            values=tuple(tensors[f"layers.{i}.value"] for i in range(model.n_layers)),
            logits=tensors["logits"],
            embeddings=tensors["embeddings"],
            model=model,
            calibrated=header.get("calibrated"),
        )


def _check_tensors(path: Path, owner: ModelIdentity, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless a prefix file holds what its header says: files of before have no sum."""

    def refuse(what: str) -> None:
        raise UserError(f"prefix file {path} is damaged: {what}; {BUILD_AGAIN}")

    states = [f"layers.{i}.{part}" for i in range(owner.n_layers) for part in ("key", "value")]
    names = {"ids", "logits", "embeddings", *states}
    if names != tensors.keys():
        lacks, more = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
        refuse(f"it has no tensor {lacks[0]!r}" if lacks else f"it has a tensor {more[0]!r} that no prefix has")
    ids = tensors["ids"]
    if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
        refuse(f"its 'ids' are {ids.dtype} of shape {tuple(ids.shape)}, not a list of integers")
    if int(ids.min()) < 0 or int(ids.max()) >= owner.vocabulary:
        refuse(f"its 'ids' {ids.tolist()[:8]} lie outside the vocabulary of {owner.vocabulary}")
    # Of the types that are quantized here the header knows the shape of keys and values; others have layers of several.
    known = owner.model_type in ARCHITECTURES
    sizes: dict[str, tuple[int | None, ...]] = {
        "logits": (len(ids), owner.vocabulary),
        "embeddings": (len(ids), None),
        **dict.fromkeys(states, (1, owner.kv_heads, len(ids), owner.head_dim) if known else (1, None, len(ids), None)),
    }
    for name, expected in sizes.items():
        tensor = tensors[name]
        dtype = {"logits": tensor.dtype, "embeddings": torch.float32}.get(name, tensors[states[0]].dtype)
        fits = tensor.ndim == len(expected) and all(b in (None, a) for a, b in zip(tensor.shape, expected, strict=True))
        if not fits or tensor.dtype != dtype or not tensor.is_floating_point():
            shape = ", ".join("any" if size is None else str(size) for size in expected)
            refuse(f"its {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats of ({shape})")


@torch.inference_mode(mode=False)  # a caller's inference mode would make tensors that can never be trained
@torch.no_grad()
def build_prefix(model: PreTrainedModel, ids: Sequence[int] | Tensor, *, embeddings: Tensor | None = None) -> Prefix:
    """Run the full-precision twin on the prefix tokens and keep its K, V and logits.

    ids: P token ids, at positions 0…P − 1, usually starting with [BOS]. `model` must be unquantized, with every exact
    transform of the quantized model applied. embeddings: (P, width of the embedding table), what the model reads in the
    place of the tokens' own embeddings (trained ones). Raises UserError for no ids, ids outside the vocabulary, a model
    in training mode, a prefix that a sliding-window layer could not hold, or keys and values that are not finite.
    """
    ids = torch.as_tensor(ids, dtype=torch.long).flatten().cpu().clone()  # the caller may go on writing to its own
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if ids.numel() == 0:
        raise UserError("a prefix needs at least one token; for no prefix, leave it out")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise UserError(f"prefix token ids {ids.tolist()} lie outside the vocabulary of {vocabulary}")
    if model.training:
        raise UserError("the model is in training mode, where dropout would make the prefix random; call model.eval()")
    cache = IntactCache(model.config)
    window = cache.smallest_window
    if window is not None and ids.numel() >= window:
        raise UserError(
            f"a prefix of {ids.numel()} tokens does not fit the model's sliding window of {window}; use a "
            f"prefix of at most {window - 1} tokens"
        )
    if getattr(model.config, "intactkv", None) is not None:
        raise UserError(
            "this model is an export of quantized weights, so the prefix would not be intact; take the one that lies "
            "beside it, or build it with the full-precision twin"
        )
    embedding = input_embeddings(model)
    read = {"input_ids": ids[None]} if embeddings is None else {"inputs_embeds": embeddings[None].to(embedding.dtype)}
    output = model(**{name: x.to(embedding.device) for name, x in read.items()}, past_key_values=cache, use_cache=True)
    prefix = Prefix(
        ids=ids,
        keys=tuple(layer.held[0].cpu().clone() for layer in cache.intact_layers),
        values=tuple(layer.held[1].cpu().clone() for layer in cache.intact_layers),
        logits=output.logits[0].cpu().clone(),
        embeddings=embedding[ids.to(embedding.device)].float().cpu().clone(),
        model=identity_of(model),
    )
    prefix.check_finite(f"the prefix {ids.tolist()} of {prefix.model.model_type}")
    return prefix
