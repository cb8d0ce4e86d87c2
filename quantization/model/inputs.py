"""What stands in front of a linear when a model runs: an online rotation, then a quantizer of the input.

    y = Q(x R) Ŵᵀ + b      R orthogonal, already in Ŵ; Q rounds every token (dynamic) or by one calibrated grid (static)

An `InputPath` is a submodule `input` of the first of the linears that read the same tensor, and a hook on each of them:
the linears stay `nn.Linear` or `QuantLinear`, their weights stay where checkpoints expect them, and the path's tensors
are part of the model's state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from corpora.errors import UserError
from quantization.grids.straight_through import fit_through, on_grid, straight
from quantization.grids.uniform import Fit, UniformGrid, merge_groups, split_groups
from quantization.model.online import OnlineRotation

__all__ = [
    "PATH",
    "InputPath",
    "InputQuantizer",
    "fit_shares",
    "path_in_front",
    "path_of",
    "put_in_front",
    "restore_paths",
    "stored_paths",
]

PATH = "input"  # name of the submodule


def fit_shares(groups: Tensor, low: Tensor, high: Tensor, grid: UniformGrid) -> Fit:
    """Scale and zero point of every group of (..., group_size), from its own range, of which shares are kept.

    low, high: scalars, with gradients; a symmetric grid takes `high` for both ends.
    """
    # Not aminmax: it has no gradient in torch 2.11.
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    below = high if grid.rule.zero_point == "constant" else low
    return fit_through(lowest * below, highest * high, grid)


class InputQuantizer(nn.Module):
    """Rounds (..., channels) to a grid and maps back.

    Dynamic: every group of every token has its own range, of which the shares `low` and `high` (scalars) are kept.
    Static: `scale` and `zero_point`, (groups, 1), for all tokens. The tensors are float32 buffers; training may ask
    them for gradients.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: UniformGrid, fitted: Fit | None = None, keep: float = 1.0):
        super().__init__()
        self.grid = grid
        self.static = fitted is not None
        names = ("scale", "zero_point") if self.static else ("low", "high")
        values = tuple(fitted) if fitted is not None else (torch.tensor(keep), torch.tensor(keep))
        for name, value in zip(names, values, strict=True):
            self.register_buffer(name, value.clone())

    def header(self) -> dict[str, Any]:
        """Plain JSON: what the tensors do not tell."""
        return {"grid": asdict(self.grid), "static": self.static}

    @classmethod
    def restore(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "InputQuantizer":
        """Undo `header` and the state dict."""
        fitted = Fit(tensors["scale"], tensors["zero_point"]) if header["static"] else None
        quantizer = cls(UniformGrid(**header["grid"]), fitted)
        quantizer.load_state_dict(dict(tensors), assign=True)
        return quantizer

    @property
    def learned(self) -> list[Tensor]:
        """What training may move: scales, or the shares of the ranges; zero points where the grid has free ones."""
        tensors = [self.scale, self.zero_point] if self.static else [self.high, self.low]
        return tensors[:1] if self.grid.rule.zero_point == "constant" else tensors

    def fit(self, groups: Tensor) -> Fit:
        """Scale and zero point for (..., groups, group_size): float32, what broadcasts to (..., groups, 1)."""
        if self.static:
            zero_point = self.zero_point
            if self.grid.rule.zero_point == "code":  # a code, however it was trained
                zero_point = straight(zero_point.round().clamp(0, self.grid.top), zero_point)
            return Fit(self.scale, zero_point)
        return fit_shares(groups, self.low, self.high, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., channels), any float dtype; same shape and dtype."""
        groups = split_groups(x.float(), self.grid.group_size)
        return merge_groups(on_grid(groups, self.fit(groups), self.grid)).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go where the model goes, but keep the tensors in float32 when it is cast."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if (now := self.get_buffer(name)).dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self

    def extra_repr(self) -> str:
        """As torch's modules print themselves."""
        return f"{self.grid}, {'static' if self.static else 'dynamic'}"


class InputPath(nn.Module):
    """Rotation and quantizer in front of `readers` linears that read the same tensor; either may be None."""

    def __init__(self, rotation: OnlineRotation | None = None, quantizer: InputQuantizer | None = None):
        super().__init__()
        self.rotation = rotation
        self.quantizer = quantizer
        self.readers = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._served: list[int] = []

    def forward(self, x: Tensor, reader: nn.Module) -> Tensor:
        """What the linears see. Computed once for all of them, who are called one after the other with one tensor; a
        reader that comes again starts anew, so that nothing of a pass that was left early is ever used."""
        if self._last is None or self._last[0] is not x or id(reader) in self._served:
            out = x if self.rotation is None else self.rotation(x)
            self._last, self._served = (x, out if self.quantizer is None else self.quantizer(out)), []
        out = self._last[1]
        self._served.append(id(reader))
        if len(self._served) == self.readers:
            self._last = None
        return out


def path_of(linear: nn.Module) -> InputPath | None:
    """The path whose tensors live in this linear."""
    path = getattr(linear, PATH, None)
    return path if isinstance(path, InputPath) else None


def path_in_front(linear: nn.Module) -> InputPath | None:
    """The path that a linear reads through, wherever its tensors live."""
    hooks = linear._forward_pre_hooks.values()
    paths = [hook.args[0] for hook in hooks if isinstance(hook, partial) and hook.func is _read]
    return paths[0] if paths else None


def put_in_front(
    block: nn.Module,
    linears: Sequence[str],
    rotation: OnlineRotation | None = None,
    quantizer: InputQuantizer | None = None,
) -> InputPath:
    """Put a rotation or a quantizer in front of linears that share their input, beside what stands there already.

    Hooks that were registered earlier see the input as it was, later ones what the linears see.
    """
    first = block.get_submodule(linears[0])
    path = path_of(first)
    if path is None:
        path = InputPath()
        first.add_module(PATH, path)
        for name in linears:
            block.get_submodule(name).register_forward_pre_hook(partial(_read, path))
            path.readers += 1
    path.rotation = rotation or path.rotation
    path.quantizer = quantizer or path.quantizer
    return path


def _read(path: InputPath, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook, in a form that a copy of the model copies with its own path."""
    return path(args[0], linear), *args[1:]


def stored_paths(block: nn.Module, sets: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Plain JSON of a block's paths; their tensors are in its state dict, under `{first linear}.input.quantizer`.

    sets: the linears that share an input, as the architecture lists them.
    """
    found = []
    for names in sets:
        path = path_of(block.get_submodule(names[0]))
        if path is not None:
            rotation = None if path.rotation is None else path.rotation.header()
            quantizer = None if path.quantizer is None else path.quantizer.header()
            found.append({"linears": list(names), "rotation": rotation, "quantizer": quantizer})
    return found


def restore_paths(block: nn.Module, stored: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Undo `stored_paths`; tensors: of the block's state dict, by their names within the block."""
    for entry in stored:
        quantizer = None
        if entry["quantizer"] is not None:
            start = f"{entry['linears'][0]}.{PATH}.quantizer."
            own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            wanted = {"scale", "zero_point"} if entry["quantizer"]["static"] else {"low", "high"}
            if own.keys() != wanted:
                raise UserError(
                    f"the checkpoint lacks the ranges {', '.join(sorted(wanted - own.keys()))} of the input of "
                    f"{entry['linears'][0]}; it is incomplete, delete the directory and quantize again"
                )
            quantizer = InputQuantizer.restore(entry["quantizer"], own)
        rotation = None if entry["rotation"] is None else OnlineRotation.restore(entry["rotation"])
        put_in_front(block, entry["linears"], rotation, quantizer)
