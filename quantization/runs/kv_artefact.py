"""What a KV policy calibrates to (ranges, shares, levels), as an artefact of its own beside the checkpoints.

    modelzoo/kv/MODEL/LABEL-IDENTITY.safetensors    layers.0.keys_scale, …; the header says whose they are

It is made by streaming calibration text through the blocks of a dense or a quantized checkpoint, as they compute when
the model runs; the cache in front of the block that is fitted has full precision. Weights are never rewritten. Memory
holds the embeddings, one block and the text's hidden states; a policy that asks for gradients
(`Policy.needs_gradients`) needs the whole model for these, once. A killed run goes on at the layer where it died and
ends with the same bytes: finished layers wait in a directory NAME.partial.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from corpora.errors import UserError
from corpora.json_files import Count, Hash, identity
from corpora.storage import open_tensors, read_artefact, write_artefact
from corpora.writing import drop_dead_lock, locked, refuse_special
from intactkv.prefix import ModelIdentity, Owner, Prefix
from quantization.kv_cache import KV_POLICIES, Policy, fisher, kv_bits
from quantization.recipes.protocols import restored
from quantization.recipes.recipe import describe
from quantization.runs.identities import KV_FORMAT
from quantization.runs.manifest import PARTS
from quantization.runs.one_by_one import Blocks
from quantization.runs.opening import load_model
from quantization.runs.pipeline import return_memory

__all__ = ["AGAIN", "KVArtefact", "calibrate_kv", "label_of", "tidy"]

log = logging.getLogger(__name__)

KIND, LAYER_KIND = "intactkv_kv", "intactkv_kv_layer"  # of the headers
WHAT, AGAIN = "KV artefact", "make it again with `python -m quantization kv`"
# What the directory of a half-finished artefact holds: layers, gradients of the loss, and what a killed write left.
UNFINISHED = re.compile(r"layer-\d{3,}\.safetensors|gradients-[0-9a-f]{8}(\.begun)?|\..*")


class _MadeOf(TypedDict):
    kv: dict[str, Any]
    weights: dict[str, Any]


class _Header(TypedDict):
    format: int
    identity: Hash
    made_of: _MadeOf
    model: Owner
    weights: str
    prefix: str
    needs_prefix: list[Count] | None
    needs_kv: Hash | None


class _Layer(TypedDict):
    identity: Hash


def label_of(policy: Policy, weights: str) -> str:
    """The readable name of an artefact: the policy's word and bits, and the weights, if they are no dense model's."""
    word = {kind: word for word, kind in KV_POLICIES.items()}.get(type(policy), type(policy).__name__.lower())
    bits = kv_bits(describe(policy)).replace(",", "v")
    return "-".join([f"{word}-kv{bits}", *([weights] if weights != "full" else [])])


@dataclass(frozen=True, eq=False)
class KVArtefact:
    """What made it, whose it is, and the tensors of every layer.

    owner: the model, by its full-precision checkpoint and basis; weights: label of those that the text went through.
    prefix: the word of the prefix that it ran behind; needs_prefix: its ids, needs_kv: the digest of a trained one's
    keys and values; None if it ran without.
    """

    policy: Policy
    made_of: Mapping[str, Any]
    owner: ModelIdentity
    weights: str
    prefix: str = "none"
    needs_prefix: tuple[int, ...] | None = None
    needs_kv: str | None = None
    tensors: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """Eight hexadecimal digits."""
        return identity(dict(self.made_of))

    def save(self, path: Path) -> None:
        """Write a safetensors file with a sum, atomically."""
        header = {
            "format": KV_FORMAT, "identity": self.identity, "made_of": self.made_of, "model": self.owner.stored(),
            "weights": self.weights, "prefix": self.prefix,
            "needs_prefix": None if self.needs_prefix is None else list(self.needs_prefix), "needs_kv": self.needs_kv,
        }  # fmt: skip
        tensors = {f"layers.{i}.{name}": x for i, layer in self.tensors.items() for name, x in layer.items()}
        write_artefact(path, KIND, header, tensors)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises UserError if the file is missing, truncated, of another kind, has changed
        since it was written, or holds other tensors than its policy keeps for its model."""
        header, tensors = read_artefact(path, KIND, _Header, WHAT, AGAIN, summed=True)
        if header["format"] != KV_FORMAT:
            raise UserError(f"{WHAT} {path} has format {header['format']}, this version reads {KV_FORMAT}; {AGAIN}")
        made_of = header["made_of"]
        policy = restored(made_of["kv"], PARTS, f"{WHAT} {path}")
        if header["identity"] != identity(dict(made_of)):
            _refuse(path, "its identity is not that of what made it")
        owner, needs = ModelIdentity.restore(header["model"]), header["needs_prefix"]
        return cls(
            policy, made_of, owner, header["weights"], header["prefix"], None if needs is None else tuple(needs),
            header["needs_kv"], _by_layer(path, policy, owner, tensors),
        )  # fmt: skip

    def check_front(self, ids: Sequence[int], prefix: Prefix | None = None) -> None:
        """Raise UserError unless it may run with those tokens in front, intact. prefix: with their keys and values,
        where they are known."""
        if self.needs_prefix is None:
            return
        if tuple(ids) != self.needs_prefix:
            raise UserError(
                f"the KV artefact {self} is calibrated behind a prefix of {len(self.needs_prefix)} tokens, and only "
                f"fits behind it; run it with --prefix {self.prefix} and without --vanilla, or calibrate it anew"
            )
        if self.needs_kv is not None and prefix is not None and prefix.digest() != self.needs_kv:
            raise UserError(
                f"the KV artefact {self} is calibrated behind a trained prefix, and the given one has other keys and "
                "values for its tokens; give that prefix, or calibrate it anew"
            )

    def __str__(self) -> str:
        return f"{label_of(self.policy, self.weights)}-{self.identity}"


def _by_layer(
    path: Path, policy: Policy, owner: ModelIdentity, tensors: Mapping[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """The tensors of a file by layer. Raises UserError unless they are what the policy keeps for such a model."""
    layers: dict[int, dict[str, Tensor]] = {}
    for index in range(owner.n_layers):
        front = f"layers.{index}."
        mine = layers[index] = {name[len(front) :]: x for name, x in tensors.items() if name.startswith(front)}
        shapes = policy.shapes(owner.head_dim, owner.kv_heads, mine) if policy.calibrates else {}
        if found := sorted(shapes.keys() ^ mine.keys()):
            more = found[0] in mine
            _refuse(
                path, f"it {'has a' if more else 'lacks the'} tensor {front + found[0]!r}" + " beyond its own" * more
            )
        for name, shape in shapes.items():
            if mine[name].shape != shape or not mine[name].is_floating_point():
                held = f"{str(mine[name].dtype).removeprefix('torch.')} of shape {tuple(mine[name].shape)}"
                _refuse(path, f"its {front + name!r} is {held}, expected floats of {shape}")
    if strange := sorted(tensors.keys() - {f"layers.{i}.{name}" for i, layer in layers.items() for name in layer}):
        _refuse(path, f"it has a tensor {strange[0]!r} beyond its own")
    return layers


def _refuse(path: Path, what: str) -> NoReturn:
    raise UserError(f"{WHAT} {path} is damaged: {what}; {AGAIN}")


def calibrate_kv(
    directory: Path,
    wanted: KVArtefact,
    path: Path,
    segments: Tensor,
    behind: Tensor | Prefix | None = None,
    device: torch.device | str = "cpu",
) -> KVArtefact:
    """Make an artefact for the checkpoint in a directory and write it to `path`; a half-finished one is gone on with.

    wanted: the artefact without tensors. segments: (N, T) calibration ids. behind: the intact prefix that the text runs
    behind; ids (P,) only in front of a dense checkpoint, whose blocks write their keys and values themselves.
    Raises UserError if something else lies where the work would go, or the checkpoint is damaged.
    """
    device = torch.device(device)
    with locked(path):
        if path.exists() and KVArtefact.load(path).identity == wanted.identity:  # made by another process meanwhile
            return KVArtefact.load(path)
        blocks, work = Blocks(directory, device), path.with_suffix(".partial")
        _clear(work)
        layers = [work / f"layer-{index:03d}.safetensors" for index in range(len(blocks))]
        done = [_read_layer(layer, wanted) for layer in layers]
        if None in done:
            _fit(blocks, wanted, layers, done, segments, behind)
        made = replace(wanted, tensors={i: layer for i, layer in enumerate(done) if layer is not None})
        made.save(path)
        shutil.rmtree(work)
    return made


def tidy(path: Path) -> None:
    """Remove what a killed run left beside a finished artefact, if the system lets it."""
    drop_dead_lock(path)
    work = path.with_suffix(".partial")
    if work.exists():
        with suppress(OSError, UserError), locked(path, wait=False):  # another user's, held, or a stranger's
            _clear(work)
            shutil.rmtree(work)


def _fit(
    blocks: Blocks,
    wanted: KVArtefact,
    layers: Sequence[Path],
    done: list[dict[str, Tensor] | None],
    segments: Tensor,
    behind: Tensor | Prefix | None,
) -> None:
    """Fit and write every layer that is not done."""
    policy = wanted.policy
    gradients = None
    if policy.needs_gradients:
        gradients = _gradients(blocks, segments, behind, layers[0].with_name(f"gradients-{wanted.identity}"))
    stream = blocks.stream(segments, behind)
    last = max(index for index, layer in enumerate(done) if layer is None)
    for index in tqdm(range(last + 1), desc=f"calibrate {label_of(policy, wanted.weights)}", unit="block"):
        with blocks.block(index, stream) as block:
            if done[index] is None:
                if gradients is not None:
                    block = replace(block, squared_gradients=_read(gradients[index]))
                tensors = {name: x.detach().cpu() for name, x in policy.fit_block(block).items()}
                write_artefact(layers[index], LAYER_KIND, {"identity": wanted.identity}, tensors)
                done[index] = tensors
            if index < last:
                stream.advance(block)
        return_memory()


def _gradients(blocks: Blocks, segments: Tensor, behind: Tensor | Prefix | None, finished: Path) -> list[Path]:
    """The files of the squared gradients, one a layer, in a directory that has its name once they are whole; the whole
    model is in memory while they are made."""
    begun = finished.with_name(f"{finished.name}.begun")
    if not finished.is_dir():
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        model = load_model(blocks.directory, blocks.dtype, blocks.device)
        fisher.squared_gradients(model, segments, behind, begun)
        del model
        begun.rename(finished)
    files = sorted(finished.iterdir())
    assert len(files) == len(blocks), files
    return files


def _read(file: Path) -> dict[str, Tensor]:
    with open_tensors(file) as tensors:
        return {name: tensors.get_tensor(name) for name in ("keys", "values")}


def _read_layer(file: Path, wanted: KVArtefact) -> dict[str, Tensor] | None:
    """The tensors of a finished layer; None if it is to be made, which is told of one that is damaged."""
    if not os.path.lexists(file):
        return None
    refuse_special(file, "the layer of a KV artefact")
    try:
        header, tensors = read_artefact(file, LAYER_KIND, _Layer, "layer of a KV artefact", "", summed=True)
        return tensors if header["identity"] == wanted.identity else None
    except UserError as error:
        log.warning("%s is made again: %s", file, str(error).removesuffix("; "))
        return None


def _clear(work: Path) -> None:
    """Make the directory of a half-finished artefact. Raises UserError if it holds what no run of ours left."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise UserError(f"{work} is there, where the work would go; move it away, or choose another --out")
    if work.is_dir() and any(not UNFINISHED.fullmatch(path.name) for path in work.iterdir()):
        raise UserError(
            f"{work} exists and is no half-finished KV artefact of ours; the work would go there, so move it away or "
            "choose another --out"
        )
    work.mkdir(parents=True, exist_ok=True)
