"""What a plan would read and make, and about how much memory that takes: what `--plan` prints.

Nothing is run: sizes of what is there come from the disk, of what is missing from the shapes of the empty model.
    to run       the model's weights in the computation's dtype (packed ones at their bits)
    to quantize  the ends, two copies of one block in float32 and four of its largest Hessian; the calibration text's
                 hidden states as often as the method keeps them, but for those that a GPU leaves to the host; what one
                 batch of the text leaves in a block; on a GPU also the block that is being written, with its codes
    to calibrate the ends, one block and the text's hidden states; all weights, if the KV policy needs gradients
What a method that trains keeps for its gradients is not in it. On a CPU the libraries take LIBRARIES besides.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from corpora.storage import weight_files
from intactkv.architecture import ARCHITECTURES, architecture_of
from quantization.kv_cache import Policy
from quantization.model.text import fits, left_by_token, samples_at_once, to_spare
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import block_file, is_quantized
from quantization.runs.dense import empty_model_of, read_config, tied_names
from quantization.runs.pipeline import identity_at, partial_of
from quantization.runs.plan import Plan

__all__ = ["Line", "preview", "table"]

LIBRARIES = {"cpu": 900e6}  # bytes of a process that has imported torch and transformers and read nothing


@dataclass(frozen=True)
class Line:
    """what: an artefact. state: whether it is there. size: in bytes, None if unknown. path: where it lies or will."""

    what: str
    state: str
    size: float | None
    path: str


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model. ends: outside the blocks. block: of the largest one. linears: of all blocks, quantized.
    inputs: of the widest linear. widths: (in, out) of a block's linears. width: of the residual stream. blocks: how
    many. dtype: of a stored number."""

    all: int
    ends: int
    block: int
    linears: int
    inputs: int
    widths: list[tuple[int, int]]
    width: int
    blocks: int
    dtype: torch.dtype

    @property
    def item(self) -> int:
        """Bytes of a stored number."""
        return self.dtype.itemsize


def sizes_of(directory: Path, unties: bool) -> Sizes:
    """Counted on the model without weights; of a family without a row only all parameters, which it runs with.

    unties: a tied head becomes a matrix of its own.
    """
    model = empty_model_of(read_config(directory))
    blocks, linears = [], []
    if model.config.model_type in ARCHITECTURES:  # else it runs as it is
        architecture = architecture_of(model.config)
        blocks = architecture.blocks_of(model)
        linears = [architecture.linears_of(block, architecture.block_name(i)) for i, block in enumerate(blocks)]
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    tied = {} if unties else tied_names(model)
    total = sum(p.numel() for name, p in model.named_parameters() if name not in tied)
    return Sizes(
        all=total,
        ends=total - sum(counts),
        block=max(counts, default=0),
        linears=sum(linear.weight.numel() for mine in linears for linear in mine.values()),
        inputs=max((linear.in_features for mine in linears for linear in mine.values()), default=0),
        widths=[(linear.in_features, linear.out_features) for mine in linears[:1] for linear in mine.values()],
        width=int(model.config.get_text_config(decoder=True).hidden_size),
        blocks=len(blocks),
        dtype=model.dtype,
    )


def preview(plan: Plan, makes: str = "run", out: Path | None = None) -> list[Line]:
    """Every artefact that a program needs, in the order in which it needs them, then the memory that it takes, about.

    makes: what the program makes of the plan: a "run", the "checkpoint" or what a "kv" policy calibrates to alone (at
    `out`, if that is given), the "prefix", the "twin" or the "discovery" of a prefix alone.
    """
    recipe = plan.recipe
    sizes = sizes_of(plan.checkpoint.directory, any(step.unties for step in recipe.transforms))
    lines = [Line("model", "present", _bytes(_weights(plan.checkpoint.directory)), str(plan.checkpoint.directory))]
    if plan.search is not None:
        found = plan.search.file
        lines.append(Line("discovery of the prefix", _state(found.is_file()), None, str(found)))
    dense = plan.checkpoint.manifest is None
    intact = plan.has_prefix and not plan.vanilla and makes not in ("checkpoint", "discovery")
    if makes == "kv":  # a dense model's blocks write the prefix themselves
        intact = recipe.calibrate_behind_prefix and (recipe.makes_checkpoint or not dense)
    file = None
    if intact and (plan.search is None or plan.search.file.is_file()):
        file = plan.prefix_file(plan.basis)
    builds = makes == "twin" or (intact and not (file is not None and file.is_file()))
    quantizes = (
        dense and recipe.makes_checkpoint and (makes in ("run", "checkpoint", "kv") or (builds and recipe.rescales))
    )
    fits = plan.makes_kv and makes in ("run", "kv")
    if (fits or (quantizes and plan.makes_weights_of_text)) and plan.text is not None:
        c = recipe.calibration
        state = f"present, {c.samples} × {c.length} tokens by {c.draw}, seed {c.seed}"
        lines.append(Line("calibration text", state, None, c.corpus))
    if quantizes:
        lines.append(_checkpoint("quantized checkpoint", plan, recipe, sizes, out if makes == "checkpoint" else None))
    if dense and builds and recipe.twin.makes_checkpoint:
        lines.append(_checkpoint("full-precision twin", plan, recipe.twin, sizes))
    if intact and makes != "twin":
        there = file is not None and file.is_file()
        lines.append(Line("prefix", _state(there), None, str(file or "known once discovered")))
    if fits:
        path = out if makes == "kv" and out is not None else plan.kv_file
        size = path.stat().st_size if path.is_file() else None
        lines.append(Line("KV artefact", _state(size is not None), size, str(path)))
    libraries = LIBRARIES.get(plan.device.type, 0.0)
    if makes not in ("checkpoint", "kv"):
        running = max(
            _running(plan, sizes, plan.kernel is not None and makes == "run"), _running(plan, sizes) if builds else 0
        )
        lines.append(Line("memory to run", "about", libraries + running, str(plan.device)))
    if any(line.what == "quantized checkpoint" and line.state != "present" for line in lines):
        lines.append(Line("memory to quantize", "about", libraries + _quantizing(plan, sizes), str(plan.device)))
    if any(line.what == "KV artefact" and line.state != "present" for line in lines):
        lines.append(Line("memory to calibrate", "about", libraries + _calibrating(plan, sizes), str(plan.device)))
    return lines


def table(lines: Iterable[Line]) -> str:
    """The lines as text: what, state, size, where."""
    lines = list(lines)
    what, state = (max(len(getattr(line, name)) for line in lines) for name in ("what", "state"))
    return "\n".join(
        f"{line.what:<{what}}  {line.state:<{state}}  {_megabytes(line.size):>10}  {line.path}" for line in lines
    )


def _checkpoint(what: str, plan: Plan, recipe: Recipe, sizes: Sizes, out: Path | None = None) -> Line:
    directory, wanted = out or plan.directory_of(recipe), plan.artefact_of(recipe).identity
    if identity_at(directory) == wanted:
        return Line(what, "present", _bytes(directory.glob("*.safetensors")), str(directory))
    if directory.exists():
        return Line(what, "something else is there", None, str(directory))
    partial = partial_of(directory)
    done = sum(block_file(partial, index).is_file() for index in range(sizes.blocks))
    state = f"{done} of {sizes.blocks} blocks" if done else "missing"
    item = sizes.item
    size = (sizes.all - sizes.linears) * item + sizes.linears * (_bits(recipe) or 8 * item) / 8
    return Line(what, state, size, str(directory))


def _bits(recipe: Recipe) -> float | None:
    """Bits of a quantized weight with its scale and zero point, about; None if weights stay as they are."""
    if recipe.weights is None:
        return None
    grid = recipe.weights.grid
    per_group = 0.0 if grid.group_size <= 0 else (32 + grid.bits) / grid.group_size
    return getattr(recipe.weights, "average_bits", None) or grid.bits + per_group


def _running(plan: Plan, sizes: Sizes, packed: bool = False) -> float:
    """Bytes of the model that runs."""
    item = torch.finfo(plan.dtype).bits / 8
    bits = _bits(plan.recipe) if packed else None
    return (sizes.all - sizes.linears) * item + sizes.linears * (bits / 8 if bits else item)


def _quantizing(plan: Plan, sizes: Sizes) -> float:
    """Bytes that quantizing takes: one block at a time, and the text on its way through it."""
    size = float(sizes.ends * sizes.item + 2 * sizes.block * 4)
    if plan.device.type == "cuda":
        size += 1.5 * sizes.block * sizes.item  # is being written; the one that is read ahead lies on the host
    if plan.text is not None:
        size += 4 * sizes.inputs**2 * 4 + _text(plan, sizes)
    return size


def _text(plan: Plan, sizes: Sizes) -> float:
    """Bytes of the calibration text while a block is quantized, and of what one batch of it leaves there."""
    c, method = plan.recipe.calibration, plan.recipe.tuning or plan.recipe.weights
    reads = "quantized" if method is None else method.reads
    channels = (4 if reads == "both" else 2) * [sizes.width]  # of each copy: in front of the block and behind it
    channels += getattr(method, "keeps", 0) * [sizes.width]
    copy = c.samples * c.length * sizes.item
    known = (
        plan.device.type == "cpu" or (plan.device.index or 0) < torch.cuda.device_count()
    )  # elsewhere all is counted
    if getattr(method, "true_sequential", False) and (not known or to_spare(copy * sizes.inputs, plan.device)):
        channels.append(sizes.inputs)
    size = 8 * c.samples * c.length  # token ids
    size += sum(copy * wide for wide in channels if not known or fits(copy * wide, plan.device))
    if known:
        batch = min(c.samples, samples_at_once(sizes.widths, c.length, sizes.dtype, plan.device))
        size += batch * c.length * left_by_token(sizes.widths, sizes.dtype)
    return size


def _calibrating(plan: Plan, sizes: Sizes) -> float:
    """Bytes that calibrating a KV policy takes, in the checkpoint's dtype."""
    c, kv = plan.recipe.calibration, plan.recipe.kv_cache
    numbers = sizes.ends + sizes.block + c.samples * c.length * sizes.width
    return max(numbers, sizes.all if isinstance(kv, Policy) and kv.needs_gradients else 0) * sizes.item


def _weights(directory: Path) -> Iterable[Path]:
    return directory.glob("*.safetensors") if is_quantized(directory) else weight_files(directory)


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _state(there: bool) -> str:
    return "present" if there else "missing"


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f} MB"
