"""A quantized checkpoint of ours as a Hugging Face directory that other runtimes open, written block by block.

Read a block, pack its linears, put what is not quantized beside them as it is stored, forget it: memory holds one block
and the file that is being filled. The directory gets its name when it is whole, and says in its configuration
(`intactkv`) which full-precision model and basis it comes from, so that a prefix of another one is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corpora.errors import UserError
from corpora.json_files import read_json, write_json
from corpora.storage import write_tensors
from corpora.writing import directory_beside
from intactkv.architecture import architecture_of
from intactkv.layout import in_files, owner_of
from intactkv.prefix import Prefix
from quantization.export import awq, compressed_tensors, gptq
from quantization.export.fused import as_stored, check_packed, join_plain
from quantization.export.layout import Contents, Packed, Scheme
from quantization.export.readme import how_to
from quantization.grids.stored import StoredWeight, restore
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import (
    ENDS,
    MANIFEST,
    block_file,
    copy_companions,
    empty_quantized,
    is_quantized,
    read_block,
    read_manifest,
)
from quantization.runs.damage import check_finite
from quantization.runs.dense import empty_model
from quantization.runs.plan import plan_run
from quantization.runs.sums import CHECKSUMS, EARLIER_CHECKSUMS

__all__ = [
    "FORMATS",
    "PREFIX_FILE",
    "Export",
    "Format",
    "check_format",
    "check_weights_alone",
    "export_checkpoint",
    "read_source",
]

PREFIX_FILE = "intactkv-prefix.safetensors"
SHARD_BYTES = 1 << 28  # of a file, and so of what waits in memory; one block or embedding more goes in


@dataclass(frozen=True)
class Format:
    """pack: a linear and its name to its tensors. config: `quantization_config`. None, both, for plain weights.

    packages: what reads it. tolerance: for the relative difference of logits, as read by them against ours. Where the
    scales are rounded to float16, the kernels compute in half precision, too (measured: 5e-4 to 2e-3).
    """

    name: str
    pack: Callable[[StoredWeight, str], Packed] | None
    config: Callable[[Contents], dict[str, Any]] | None
    packages: tuple[str, ...]
    tolerance: float


EXACT, HALF = 1e-5, 2e-2
BASE = ("torch", "transformers")
GPTQMODEL = (*BASE, "gptqmodel", "optimum")
FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format(
            "compressed-tensors",
            compressed_tensors.pack,
            compressed_tensors.config,
            (*BASE, "compressed-tensors"),
            EXACT,
        ),
        Format("gptq", gptq.pack, gptq.config, GPTQMODEL, HALF),
        Format("gptq-v2", gptq.pack_v2, gptq.config_v2, GPTQMODEL, HALF),
        Format("awq", awq.pack, awq.config, (*BASE, "gptqmodel"), HALF),
        Format("dense", None, None, BASE, EXACT),
    )
}


@dataclass
class Export:
    """A directory, and what was found out while it was written.

    dtype: of what is not packed. schemes: of the packed linears. scale_change: the largest relative one, over all of
    them. prefix: that lies beside.
    """

    directory: Path
    format: Format
    dtype: torch.dtype
    schemes: dict[str, Scheme] = field(default_factory=dict)
    scale_change: float = 0.0
    prefix: Prefix | None = None

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(file.stat().st_size for file in self.directory.glob("model*.safetensors"))

    @property
    def facts(self) -> str:
        """Grids and scales in a sentence."""
        if not self.schemes:
            return f"Plain weights in {_word(self.dtype)}."
        kinds = list(dict.fromkeys(self.schemes.values()))
        grids, scale_dtype = "; ".join(map(str, kinds)), kinds[0].scale_dtype
        if self.scale_change:
            scales = (
                f"Scales are rounded to float16, by up to {self.scale_change:.1e} of their value (with --set "
                "weights.grid.scale_dtype=float16, quantizing takes that into account)."
            )
        elif self.format.tolerance == EXACT and self.dtype not in (scale_dtype, torch.float32):
            scales = f"Scales are {_word(scale_dtype)}; runtimes that keep them in {_word(self.dtype)} round them."
        else:
            scales = "Scales are exact."
        return f"{grids[0].upper()}{grids[1:]}. {scales}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_source(source: Path, out: Path) -> dict[str, Any]:
    """The manifest of what is exported. Raises UserError if it is no quantized checkpoint of ours, or `out` exists."""
    if not is_quantized(source):
        raise UserError(
            f"{source} is no quantized checkpoint of this project; make one with python -m quantization --model DIR "
            "--recipe rtn-w4 --out OUT"
        )
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it")
    return read_manifest(source)


def export_checkpoint(
    source: Path,
    out: Path,
    format_name: str = "compressed-tensors",
    *,
    prefix: str = "none",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Write the quantized checkpoint `source` to the new directory `out`, in a format of `FORMATS`.

    prefix: a word of --prefix; written by the full-precision twin, on `device`, and put beside as `PREFIX_FILE`.
    dtype: of what is not packed (with `dense`, of all weights); as stored by default. shard_bytes: a file is closed
    when it holds as much.
    Raises UserError for a format that cannot hold the checkpoint, a prefix of another model, none for a checkpoint that
    needs one, or an `out` that exists.
    """
    manifest = read_source(source, out)
    check_weights_alone(source)
    model, form = empty_model(source), FORMATS[format_name]
    if form.config is not None:
        check_packed(architecture_of(model.config))
    plan = plan_run(source, Recipe(prefix=prefix), device=torch.device(device))
    export = Export(out, form, dtype or model.dtype)
    if plan.choice.ids:
        export.prefix = plan.intact_prefix()
        _check_prefix(export.prefix, source, manifest)
    with directory_beside(out) as partial:
        copy_companions(source, partial)
        for ours in (MANIFEST, CHECKSUMS, EARLIER_CHECKSUMS):  # the result is no checkpoint of ours
            (partial / ours).unlink(missing_ok=True)
        shards = _Shards(partial, shard_bytes)
        for tensors in _packed_blocks(source, manifest, model, export, dtype):
            shards.add(tensors)
        shards.close()
        config = _write_config(partial, model, manifest, export, dtype)
        if export.prefix is not None:
            export.prefix.save(partial / PREFIX_FILE)
        unpacks = bool(config.get("quantization_config", {}).get("dequantize"))
        text = how_to(out.name, format_name, manifest, export.facts, unpacks, export.prefix, PREFIX_FILE)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return export


def check_weights_alone(source: Path) -> None:
    """Raise UserError, by what its manifest says, for a quantized checkpoint that is more than other weights."""
    model = empty_model(source)
    manifest, own = empty_quantized(source)
    if [type(module) for module in own.modules()] != [type(module) for module in model.modules()]:
        raise UserError(
            f"{source} has norms that a plain {model.config.model_type} does not have ({manifest['label']}), so no "
            "other runtime could compute it; export a recipe that does not rotate"
        )
    if manifest["recipe"].get("activations") or manifest["recipe"].get("attention"):
        raise _more(source, manifest)


def check_format(source: Path, form: Format) -> None:
    """Raise UserError for a quantized checkpoint that a format cannot hold, by all of its first block."""
    block, model = read_block(block_file(source, 0)), empty_model(source)
    if block.kv:
        raise _more(source, read_manifest(source))
    if form.pack is None or form.config is None:
        return
    names = architecture_of(model.config)
    weights = {name: restore(*parts) for name, parts in block.linears.items()}
    schemes = {name: form.pack(weight, name).scheme for name, weight in as_stored(names, names.block_name(0), weights)}
    if schemes:
        form.config(_contents(model, schemes, model.dtype))


def _more(source: Path, manifest: Mapping[str, Any]) -> UserError:
    return UserError(
        f"{source} quantizes or rotates more than weights ({manifest['label']}): inputs, attention or the KV cache, "
        "which no format here can say; export a recipe that quantizes weights only"
    )


def _check_prefix(prefix: Prefix, source: Path, manifest: Mapping[str, Any]) -> None:
    """Raise UserError unless the prefix belongs to the checkpoint: identity, basis and embeddings."""
    model = empty_model(source)
    model.__dict__["intactkv_source"] = (manifest["source"]["fingerprint"], manifest["basis"])
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    embedding.weight = nn.Parameter(read_block(source / ENDS).parameters[f"{name}.weight"], requires_grad=False)
    prefix.check(model)


def _packed_blocks(
    source: Path, manifest: Mapping[str, Any], model: PreTrainedModel, export: Export, dtype: torch.dtype | None
) -> Iterator[dict[str, Tensor]]:
    """The exported tensors of one file of the source after the other; `export` learns schemes and scale changes."""
    names = architecture_of(model.config)
    files = {names.block_name(i): block_file(source, i) for i in range(model.config.num_hidden_layers)}
    for place, file in (*files.items(), ("", source / ENDS)):
        block = read_block(file)
        if block.paths or block.kv:
            raise _more(source, manifest)
        tensors = {
            name: _narrowed(tensor, dtype, name) if dtype is not None and tensor.is_floating_point() else tensor
            for name, tensor in block.parameters.items()
        }
        weights = {name: restore(*parts) for name, parts in block.linears.items()}
        if (pack := export.format.pack) is None:
            for name, weight in weights.items():
                tensors[f"{name}.weight"] = _narrowed(weight.dequantize(), export.dtype, f"{name}.weight")
        else:
            for name, weight in as_stored(names, place, weights):
                packed = pack(weight, name)
                tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
                export.schemes[name] = packed.scheme
                export.scale_change = max(export.scale_change, packed.scale_change)
        join_plain(names, place, tensors)
        yield {in_files(names, name): tensor for name, tensor in tensors.items()}


def _narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in the export's dtype. Raises UserError if a value becomes infinite there, or all of them 0."""
    check_finite(tensor, name, dtype)
    narrow = tensor.to(dtype)
    if bool(tensor.any()) and not bool(narrow.any()):
        raise UserError(
            f"{name}: all of its values become 0 in {_word(dtype)} (the largest is {float(tensor.abs().max()):.1e}); "
            "choose --dtype bfloat16 or float32"
        )
    return narrow


class _Shards:
    """Tensors to safetensors files of a limited size, in the Hugging Face naming, with an index.

    The index is there for a single file, too: some runtimes read every *.safetensors that no index leaves out, and the
    prefix lies beside.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._open: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take more tensors; write a file when enough have come."""
        # Copies: what was read as it is stored is a view of its file, which would stay in memory as a whole.
        self._open |= {name: tensor.clone() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._open.values()) >= self._limit:
            self._flush()

    def _flush(self) -> None:
        write_tensors(self._directory / f"{len(self._names)}.partial", self._open, {"format": "pt"})
        self._names.append(list(self._open))
        self._total += sum(tensor.nbytes for tensor in self._open.values())
        self._open = {}

    def close(self) -> None:
        """Write what is left, and the index; only now is the number of files known, which is part of their names."""
        if self._open:
            self._flush()
        count = len(self._names)
        file_of: dict[str, str] = {}
        for i, names in enumerate(self._names):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self._directory / f"{i}.partial").rename(self._directory / file)
            file_of |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(file_of.items()))}
        write_json(self._directory / "model.safetensors.index.json", index)


def _contents(model: PreTrainedModel, schemes: Mapping[str, Scheme], dtype: torch.dtype) -> Contents:
    """What a format's configuration says of a model whose linears of `schemes` are packed."""
    names = architecture_of(model.config)
    linears = [owner_of(names, name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plain = [name for name in dict.fromkeys(linears) if name not in schemes]
    blocks = [module for block in names.blocks_of(model) for module in block.modules()]
    unpacked = any(isinstance(x, nn.Linear) and type(x).forward is not nn.Linear.forward for x in blocks)
    return Contents(schemes, plain, names.blocks, dtype, unpacked)


def _write_config(
    directory: Path, model: PreTrainedModel, manifest: Mapping[str, Any], export: Export, dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json: the model's own, with what the format asks for and whose the weights are."""
    config = read_json(directory / "config.json", "the model configuration")
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = _word(dtype)
    if export.format.config is not None:
        if not export.schemes:
            raise UserError(
                f"no weight of this checkpoint ({manifest['label']}) is quantized, so there is nothing to pack; use "
                "--format dense"
            )
        config["quantization_config"] = export.format.config(_contents(model, export.schemes, export.dtype))
    config["intactkv"] = {
        "fingerprint": manifest["source"]["fingerprint"],
        "basis": manifest["basis"],
        "needs_prefix": manifest["needs_prefix"],
        "needs_kv": manifest.get("needs_kv"),
        "label": manifest["label"],
    }
    write_json(directory / "config.json", config)
    return config
