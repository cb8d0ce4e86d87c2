"""AWQ (Lin et al., MLSys 2024, arXiv:2306.00978): enlarge the weights of the channels that matter, then round.

    s = a^r, a_c = mean |x_c|,  normalized to √(max s · min s) = 1                  Eq. 5; the norm: repository
    r = argmin ‖f(Q(W diag(s)) diag(1/s), x) − f(W, x)‖²,  r in {0, 0.05, …, 0.95}  Eq. 4
    m = argmin ‖(Q(clamp(w, ±m)) − w) x‖² per row and group,  m = max|w| · (1 − i/20), i in {0, …, 9}   repository

`channel_scales` is s, `search_scales` finds r, `clip_limits` finds m; s moves into the layer in front, so the function
stays the same. f is one linear, or the attention or feed-forward module where several linears read the same input.
Every block is searched on what full-precision blocks pass on, before any of its own scales is applied.

Departs from the reference: losses and rounding in float32 (fp16 there); groups of one sign get a range that contains 0
(they are destroyed there, and by the grid convention `awq-asym`, which is the same otherwise); the error of one linear,
and of one group, comes from the second moment of its inputs, tr(ΔW Σxxᵀ ΔWᵀ), which is the sum over all tokens without
another pass over them; `grouped_values` is an addition.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from intactkv.architecture import Feed
from intactkv.cache import IntactCache
from intactkv.observe import after, hooked
from quantization.grids.uniform import (
    QuantizedTensor,
    UniformGrid,
    fake_quantize,
    finite,
    merge_groups,
    quantize,
    split_groups,
)
from quantization.model.blocks import DecoderBlock
from quantization.model.rescale import Rescaling, per_column
from quantization.model.text import TextWriter
from quantization.weights.awq_inputs import Inputs, inputs_of_block, with_moment
from quantization.weights.awq_zoo import ZooBlock, read_zoo
from quantization.weights.base import GridQuantizer

__all__ = ["AWQ", "channel_scales", "clip_candidates", "clip_limits", "clipped", "is_clipped", "search_scales"]

RATIOS = 20  # candidates r = i/20, i < 20
SMALLEST = 1e-4  # of a^r, before the normalization
CLIP_STEPS = 20  # candidates 1 − i/20 …
CLIP_SHRINK = 0.5  # … for i < 10
AT_ONCE = {"cpu": 2**17, "cuda": 2**25}  # weights that are rounded together: on a CPU those that its cache holds
HIDDEN = "hidden_states"  # argument of a module
# Share of a file's clip limits that no search over these weights gives (give or take 2% for half precision).
STRANGE_LIMITS = 0.01


def channel_scales(magnitude: Tensor, ratio: float) -> Tensor:
    """s = max(a^r, 1e-4) with √(max s · min s) = 1 (Eq. 5). magnitude: a, (channels,). Returns (channels,) float32."""
    scale = magnitude.float().pow(ratio).clamp_min(SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()


def rounded_behind(weight: Tensor, scale: Tensor, grid: UniformGrid) -> Tensor:
    """Q(W diag(s)) diag(1/s) in float32 (Eq. 4). weight: (out, in). scale: (in,).

    The product is rounded to the weights' dtype first, as it will be when the scale is applied.
    """
    result = torch.empty(weight.shape, device=weight.device)
    for rows, of_rows in zip(_by_rows(weight), _by_rows(result), strict=True):
        rounded = fake_quantize((rows.float() * scale).to(weight.dtype).float(), grid)
        torch.div(rounded, scale, out=of_rows)
    return result


def _by_rows(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, AT_ONCE[weight.device.type] // weight.shape[1]))


def search_scales(magnitude: Tensor, loss: Callable[[Tensor], Tensor], name: str) -> tuple[Tensor, float]:
    """The s of the ratio with the smallest loss, and that loss; of equal ones the smaller ratio.

    loss: s to a tensor of one number, which is looked at once all candidates have one.
    Raises UserError if no loss is finite.
    """
    scales = [channel_scales(magnitude, i / RATIOS) for i in range(RATIOS)]
    losses = torch.stack([loss(scale).double() for scale in scales]).tolist()
    finite_ones = [error for error in losses if error < torch.inf]  # no NaN is
    if not finite_ones:
        raise UserError(
            f"{name}: no scale gives a finite error on the calibration text; the checkpoint's dtype is too narrow for "
            "its activations, convert it to bfloat16 or float32"
        )
    smallest = min(finite_ones)
    return scales[losses.index(smallest)], smallest


def clip_candidates(groups: Tensor) -> list[Tensor]:
    """The limits m to choose from, largest first. groups: (..., S); each (..., 1)."""
    largest = groups.abs().amax(dim=-1, keepdim=True)
    return [largest * (1 - i / CLIP_STEPS) for i in range(int(CLIP_SHRINK * CLIP_STEPS))]


def clip_limits(weight: Tensor, tokens: Tensor, grid: UniformGrid) -> Tensor:
    """m of every row and group: (out, groups, 1) float32. weight: (out, in). tokens: (T, in), inputs of the linear.

    The error of one group alone, Σ_t ((ŵ − w)·x_t)² = (ŵ − w)ᵀ (Σ_t x_t x_tᵀ) (ŵ − w); of equal ones the largest m.
    """
    x = split_groups(tokens.float(), grid.group_size).transpose(0, 1)  # (G, T, S)
    moment = x.transpose(1, 2) @ x  # (G, S, S)
    found = []
    for rows in _by_rows(weight):
        groups = split_groups(rows.float(), grid.group_size)  # (rows, G, S)
        candidates = clip_candidates(groups)
        limit, smallest = candidates[0], torch.full_like(candidates[0], float("inf"))
        for candidate in candidates:
            within = torch.maximum(groups, -candidate)
            delta = fake_quantize(torch.minimum(within, candidate, out=within), grid).sub_(groups)
            delta = delta.transpose(0, 1)  # (G, rows, S)
            error = (delta @ moment).mul_(delta).sum(-1).T[..., None]  # (rows, G, 1)
            limit = torch.where(error < smallest, candidate, limit)
            smallest = torch.minimum(error, smallest)
        found.append(limit)
    return torch.cat(found)


def clipped(weight: Tensor, limits: Tensor) -> Tensor:
    """Clamp every group to ±m, in float32. weight: (out, in). limits: (out, groups, 1)."""
    groups = split_groups(weight.float(), weight.shape[1] // limits.shape[1])
    return merge_groups(groups.clamp(-limits, limits))


def is_clipped(block: DecoderBlock, linear: str) -> bool:
    """Queries and keys are not: only their product matters, not their own errors."""
    return linear not in (block.architecture.query, block.architecture.key)


class Calls:
    """A module's calls in full precision, of all samples, to be repeated with other weights.

    What it read and returned lies where the text does (`Text`); others hold for as many samples. cache: one of them.
    """

    def __init__(self, samples: int, device: torch.device, cache: str):
        self._read, self._returned = (TextWriter(samples, device) for _ in range(2))
        self._batches: list[int] = []  # samples of each call
        self._arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # by samples of a call
        self._cache = cache
        self.numbers = 0  # that it returned in all

    def note(self, positional: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        """One call, as a hook sees it."""
        given, made = positional[0] if positional else keywords[HIDDEN], _output(output)
        self._read.add(given)
        self._returned.add(made)
        self._batches.append(len(given))
        self.numbers += made.numel()
        # Not the cache: it holds this call's keys and values.
        keywords = {n: None if n == self._cache else x for n, x in keywords.items() if n != HIDDEN}
        self._arguments[len(given)] = (positional[1:], keywords)

    def again(
        self, module: nn.Module, weights: dict[str, Tensor], new_cache: Callable[[], IntactCache | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the module returns with these weights, and what it did return, call by call. new_cache: for each one,
        because a call leaves its keys and values there."""
        start = 0
        for samples in self._batches:
            stop = start + samples
            positional, keywords = self._arguments[samples]
            keywords = keywords | ({self._cache: new_cache()} if self._cache in keywords else {})
            read = self._read.text.batch(start, stop)
            made = torch.func.functional_call(module, weights, (read, *positional), keywords)
            yield _output(made), self._returned.text.batch(start, stop)
            start = stop


def _output(of_module: Any) -> Tensor:
    """Attention returns its weights, too."""
    return of_module[0] if isinstance(of_module, tuple) else of_module


def _fresh_cache(block: DecoderBlock) -> IntactCache | None:
    """A cache with the keys and values of the prefix alone. Only v → o changes them, and that is not measured here."""
    assert block.stream is not None
    if not block.stream.prefix_length:
        return None
    layers = block.config.num_hidden_layers  # the block looks at its own only
    keys, values = block.stream.seeded(block)
    return IntactCache(block.config, [keys] * layers, [values] * layers)


@dataclass(frozen=True)
class AWQ(GridQuantizer):
    """Scales and clip limits from a search, or from a file of the model zoo; then every linear is rounded.

    clip: whether weights are clipped, too. grouped_values: scale v → o also where several query heads read one value
    head (the reference leaves it out), with a averaged over them. file: a `.pt` of the model zoo instead of a search;
    no text is needed then.
    """

    grid: UniformGrid
    clip: bool = True
    grouped_values: bool = False
    file: str = ""
    name: ClassVar[str] = "awq"
    reads: ClassVar[Literal["quantized", "full", "both"]] = "full"
    rescales: ClassVar[bool] = True
    # What attention and the feed-forward part read and return; for limits, every k-th token in front of all linears.
    keeps: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if self.file and self.grouped_values:
            raise UserError("weights.grouped_values=true is for a search, but weights.file names a finished one")

    @property
    def calibrates(self) -> bool:  # type: ignore[override]  # depends on a field
        """Only for a search of its own."""
        return not self.file

    @property
    def files(self) -> tuple[Path, ...]:
        """The model zoo's file. Raises UserError if it is missing."""
        if self.file and not Path(self.file).is_file():
            raise UserError(f"weights.file={self.file} is not there; give a .pt of the AWQ model zoo, or leave it out")
        return (Path(self.file),) if self.file else ()

    def check(self, block: DecoderBlock) -> None:
        """Groups must fill rows; every name and shape of the file must be the block's. Raises UserError."""
        super().check(block)
        if self.file:
            self._from_file(block)
        block.feeds()  # refuses a model whose norms stand behind attention and feed-forward

    def quantize_block(self, block: DecoderBlock) -> Mapping[str, QuantizedTensor]:
        """Every linear of the block; `figures` gets the summed loss of the scales. The block is left rescaled."""
        with torch.no_grad():
            linears = block.linears()
            for name, linear in linears.items():
                finite(linear.weight, f"{block.name}.{name}")
            limits = self._apply(block, self._from_file(block)) if self.file else self._search(block)
            return {
                name: quantize(
                    clipped(linear.weight, limits[name]) if name in limits else linear.weight,
                    self.grid,
                    f"{block.name}.{name}",
                )
                for name, linear in linears.items()
            }

    def rescaled_feeds(self, block: DecoderBlock) -> list[Feed]:
        """The pairs whose scales are searched: v → o only with one value head per query head, or `grouped_values`."""
        linears = block.linears()

        def is_grouped(feed: Feed) -> bool:
            return (
                feed.producer.startswith(f"{block.architecture.attention}.")
                and linears[feed.producer].weight.shape != linears[feed.consumers[0]].weight.shape
            )

        return [feed for feed in block.feeds() if self.grouped_values or not is_grouped(feed)]

    def _search(self, block: DecoderBlock) -> dict[str, Tensor]:
        """Find all scales, rescale the block, then find the clip limits of the rescaled weights."""
        inputs, calls = self._observe(block)
        steps = []
        for feed in self.rescaled_feeds(block):
            producer = block.module.get_submodule(feed.producer)
            channels = len(producer.get_parameter("weight"))
            seen = with_moment(block, feed, inputs)
            loss = self._loss(block, feed, seen, calls.pop(feed.inside, None))
            magnitude = _per_producer(seen.magnitude / seen.count, channels, block.head_size)
            scale, smallest = search_scales(magnitude, loss, f"{block.name}.{feed.producer}")
            steps.append(Rescaling(feed.producer, feed.readers, scale))
            block.report(loss=smallest)
        scale_of = {}
        for step in steps:
            scale_of.update(dict.fromkeys(step.consumers, block.rescale(step).scale))
        limits = {}
        for name, linear in block.linears().items():
            if self.clip and is_clipped(block, name):
                x = torch.cat(inputs[name].tokens).float()
                if name in scale_of:
                    x /= per_column(scale_of[name], x.shape[1], block.head_size)
                limits[name] = clip_limits(linear.weight, x, self.grid)
        return limits

    def _observe(self, block: DecoderBlock) -> tuple[dict[str, Inputs], dict[str, Calls]]:
        """Run the text through the block once: the inputs of every linear, the calls of every measured module."""
        stream, feeds = block.stream, self.rescaled_feeds(block)
        assert stream is not None, "AWQ without a file calibrates, but no calibration text was given"
        alone = {feed.inside for feed in feeds if feed.inside in feed.consumers}
        inside = {feed.inside for feed in feeds if feed.inside not in alone}
        calls = {name: Calls(len(stream.hidden), stream.device, block.architecture.cache) for name in inside}
        with hooked(after(block.module.get_submodule(name), of.note) for name, of in calls.items()):
            inputs = inputs_of_block(block, alone)
        return inputs, calls

    def _loss(self, block: DecoderBlock, feed: Feed, inputs: Inputs, calls: Calls | None) -> Callable[[Tensor], Tensor]:
        """The mean squared error of the measured module as a function of s, with the weights as they are now."""
        weights = {name: block.linears()[name].weight for name in feed.consumers}

        def candidates(scale: Tensor) -> dict[str, Tensor]:
            return {
                name: rounded_behind(w, per_column(scale, w.shape[1], block.head_size), self.grid)
                for name, w in weights.items()
            }

        def of_linear(scale: Tensor) -> Tensor:
            delta = candidates(scale)[feed.inside].sub_(weights[feed.inside])
            return inputs.squared_error(delta) / (inputs.count * len(delta))

        def of_module(scale: Tensor) -> Tensor:
            rounded = {
                f"{name.removeprefix(f'{feed.inside}.')}.weight": w.to(weights[name].dtype)
                for name, w in candidates(scale).items()
            }
            module = block.module.get_submodule(feed.inside)
            assert calls is not None
            errors = [
                (made.float() - wanted.float()).square_().sum()
                for made, wanted in calls.again(module, rounded, partial(_fresh_cache, block))
            ]
            return torch.stack(errors).double().sum() / calls.numbers

        return of_linear if feed.inside in feed.consumers else of_module

    def _from_file(self, block: DecoderBlock) -> ZooBlock:
        """What the file says of the block. Raises UserError if it does not fit, or leaves something out."""
        scales = [feed.producer for feed in self.rescaled_feeds(block)]
        limits = [name for name in block.linears() if self.clip and is_clipped(block, name)]
        return read_zoo(Path(self.file), block, self.grid, scales, limits)

    def _apply(self, block: DecoderBlock, found: ZooBlock) -> Mapping[str, Tensor]:
        """Rescale the block as the file says. Returns its clip limits.

        Raises UserError if the weights cannot be those that the limits were found for.
        """
        for step in found.steps:
            block.rescale(step)
        limits: dict[str, Tensor] = {}
        for name, of_file in found.limits.items() if self.clip else ():
            weight = block.linears()[name].weight
            limits[name] = m = of_file.to(weight.device)
            largest, *_, smallest = clip_candidates(split_groups(weight.float(), self.grid.group_size))
            strange = float(((m > 1.02 * largest) | (m < 0.98 * smallest)).float().mean())
            if strange > STRANGE_LIMITS:
                raise UserError(
                    f"{self.file}: {strange:.0%} of the clip limits of {block.name}.{name} are larger than the weights "
                    "or below 0.55 of them; the file was made for other weights (another revision or fine-tuning)"
                )
        return limits


def _per_producer(values: Tensor, channels: int, head_size: int) -> Tensor:
    """Values per column, averaged over the query heads that read the same KV channel: `per_column` backwards."""
    if values.numel() == channels:
        return values
    return values.view(channels // head_size, -1, head_size).mean(1).flatten()
