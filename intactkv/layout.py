"""Fused, transposed and stacked matrices of a model as linears of their own, and back.

    qkv_proj(x) = (q_proj(x), k_proj(x), v_proj(x))        rows of one matrix, in runs where heads alternate

transformers' code stays as it is: a fused module is exchanged for one that holds the linears and puts their outputs
together again. Methods see linears; files are read and exports written through the same map of rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv.architecture import Architecture, Experts, Fused, architecture_of
from intactkv.experts import SeparateExperts

__all__ = ["FusedLinears", "Part", "in_files", "joined", "lay_out", "owner_of", "sources_of"]


class Indexed(Protocol):
    """A tensor, or one in a file that reads what it is asked for."""

    def __getitem__(self, index: Any, /) -> Tensor:
        """`stored[2, :3]`."""
        ...


@dataclass(frozen=True)
class Part:
    """Where a parameter of a laid-out model stands in transformers' own: in `name`, there are all of it, or rows.

    start, count, run: rows start … start + count − 1 of every run of so many; run 0 for all rows. transposed: (in, out)
    there. expert: its place in a stack, None for none.
    """

    name: str
    start: int = 0
    count: int = 0
    run: int = 0
    groups: int = 1
    transposed: bool = False
    expert: int | None = None

    def taken(self, stored: Indexed) -> Tensor:
        """The parameter's own numbers. stored: the whole."""
        index: list[int | slice] = [] if self.expert is None else [self.expert]
        if self.run and self.groups == 1 and not self.transposed:  # one run: nothing else is read
            return stored[(*index, slice(self.start, self.start + self.count))].contiguous()
        whole = stored[tuple(index) or slice(None)]
        rows = whole.T if self.transposed and whole.ndim == 2 else whole
        if self.run:
            runs = rows.unflatten(0, (self.groups, self.run))
            rows = runs[:, self.start : self.start + self.count].flatten(0, 1)
        return rows.contiguous()

    def stored_shape(self, shape: tuple[int, ...], stack: int = 0) -> tuple[int, ...]:
        """The whole's shape, by this parameter's. stack: experts there are."""
        if self.run:
            shape = (self.groups * self.run, *shape[1:])
        if self.transposed:
            shape = shape[::-1]
        return shape if self.expert is None else (stack, *shape)


class FusedLinears(nn.Module):
    """Linears in place of the module that held their matrices in one: the same outputs in the same order.

    Every part reads the tensor that the module is given.
    """

    def __init__(self, fused: Fused, linears: Mapping[str, nn.Linear]):
        super().__init__()
        self.groups = fused.groups
        for name in fused.parts:
            self.add_module(name, linears[name])

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., rows of all parts)."""
        outputs = [linear(x) for linear in self.children()]
        if self.groups == 1:
            return torch.cat(outputs, dim=-1)
        return torch.cat([output.unflatten(-1, (self.groups, -1)) for output in outputs], dim=-1).flatten(-2)


def lay_out(model: PreTrainedModel) -> PreTrainedModel:
    """Exchange what is fused or stacked for linears of their own, in place; weights stay the ones they were.

    A model that is laid out already, or has nothing to lay out, stays as it is. Returns the model.
    Raises UserError for a model type without a row.
    """
    architecture = architecture_of(model.config)
    for block in architecture.blocks_of(model):
        for fused in architecture.fused:
            module = block.get_submodule(fused.module)
            if not isinstance(module, FusedLinears) and not (type(module) is nn.Linear and not fused.parts):
                block.set_submodule(fused.module, _apart(module, fused))
        if (experts := architecture.experts) is not None:
            module = block.get_submodule(experts.module)
            if not isinstance(module, SeparateExperts):
                block.set_submodule(experts.module, _separated(module, experts))
    return model


def _apart(module: nn.Module, fused: Fused) -> nn.Module:
    """What stands in place of one fused module."""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if not fused.parts:
        return _linear(nn.Linear, _whole(fused, "weight").taken(weight.data), None if bias is None else bias.data)
    kind = type(module) if isinstance(module, nn.Linear) else nn.Linear  # Falcon's adds its bias in another way
    linears = {}
    for name in fused.parts:
        own = _part(fused, name, "")
        linears[name] = _linear(kind, own.taken(weight.data), None if bias is None else own.taken(bias.data))
    return FusedLinears(fused, linears)


def _separated(module: nn.Module, experts: Experts) -> SeparateExperts:
    """What stands in place of transformers' stacks; the linears are views of them."""
    linears = []
    for index in range(experts.count):
        own = {part: _part_of_stack(experts, index, part, "") for part in (*experts.inputs, experts.output)}
        linears.append({part: _linear(nn.Linear, where.taken(module.get_parameter(name).data), None)
                        for part, (name, where) in own.items()})  # fmt: skip
    return SeparateExperts(linears, module.act_fn)  # type: ignore[arg-type]  # a module or a function


def _part_of_stack(experts: Experts, index: int, part: str, place: str) -> tuple[str, Part]:
    """The parameter that holds a linear of an expert, and where. place: in front of the module's name."""
    inputs, output = experts.stacked
    if part == experts.output:
        return output, Part(f"{place}{experts.module}.{output}", expert=index)
    start, rows = experts.inputs.index(part) * experts.width, len(experts.inputs) * experts.width
    return inputs, Part(f"{place}{experts.module}.{inputs}", start, experts.width, rows, expert=index)


def _linear(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _part(fused: Fused, part: str, name: str) -> Part:
    place = fused.parts.index(part)
    return Part(
        name, sum(fused.rows[:place]), fused.rows[place], sum(fused.rows), fused.groups, transposed=fused.transposed
    )


def _whole(fused: Fused, name: str) -> Part:
    return Part(name, transposed=fused.transposed)


def sources_of(architecture: Architecture, name: str) -> Iterator[Part]:
    """Where a parameter of the laid-out model may be in a file, the likeliest first: as it is called here, under older
    names, or in what transformers' own model fuses or stacks."""
    for part in _places(architecture, name):
        yield part
        for spelling in architecture.stored:
            if (other := _spelled(part.name, spelling)) != part.name:
                yield replace(part, name=other)


def in_files(architecture: Architecture, name: str) -> str:
    """What files call a parameter of an exported model."""
    return _spelled(name, architecture.exported or {})


def _spelled(name: str, spelling: Mapping[str, str]) -> str:
    for ours, theirs in spelling.items():
        name = name.replace(ours, theirs)
    return name


def _places(architecture: Architecture, name: str) -> Iterator[Part]:
    """The same without older names."""
    place, inner = _in_block(architecture, name)
    owner, _, parameter = inner.rpartition(".")
    module, _, part = owner.rpartition(".")
    alone = [fused for fused in architecture.fused if owner == fused.module]  # has no parts
    yield _whole(alone[0], name) if alone else Part(name)
    for fused in architecture.fused:
        if module == fused.module and part in fused.parts:
            yield _part(fused, part, f"{place}{module}.{parameter}")
    if architecture.experts is not None and (index := architecture.expert_of(inner)) is not None:
        yield _part_of_stack(architecture.experts, index, part, place)[1]


def _in_block(architecture: Architecture, name: str) -> tuple[str, str]:
    """`model.layers.3.` and the rest; nothing and the name for what is in no block."""
    start = f"{architecture.blocks}."
    if not name.startswith(start):
        return "", name
    index, _, inner = name.removeprefix(start).partition(".")
    return f"{start}{index}.", inner


def owner_of(architecture: Architecture, name: str) -> str:
    """The module of transformers' own model that holds the rows of a linear; the linear itself where nothing is
    fused."""
    module, _, part = name.rpartition(".")
    inner = _in_block(architecture, module)[1]
    return module if any(inner == fused.module and part in fused.parts for fused in architecture.fused) else name


def joined(fused: Fused, parts: Mapping[str, Tensor]) -> Tensor:
    """One tensor of transformers' own module from those of its parts, whose first axis is that of output rows."""
    runs = [part.unflatten(0, (fused.groups, -1)) for part in parts.values()]
    whole = torch.cat(runs, dim=1).flatten(0, 1)
    return whole.T.contiguous() if fused.transposed and whole.ndim == 2 else whole
