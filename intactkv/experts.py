"""Mixtures of experts (Shazeer et al. 2017, 1701.06538) whose matrices are linears, one module for every expert.

    y_t = Σ_{e chosen for t} p_te · W_down,e (f(W_gate,e x_t) ∘ W_up,e x_t)

The router is the model's own: `SeparateExperts` stands where transformers keeps the stacked matrices, and is told which
experts every token goes to, and with which weight. An expert's linears see the tokens that are sent to it, no others,
as (tokens, channels) in their order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Expert", "SeparateExperts", "alone", "on_inputs_of_chosen"]


class Expert(nn.Module):
    """One gated feed-forward part. linears: by their names, the gate, what it lets through, and the last."""

    def __init__(self, linears: Mapping[str, nn.Linear], activation: Callable[[Tensor], Tensor]):
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._names = tuple(linears)
        self._activation = activation  # of an `nn.Module` a child, which holds nothing

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, channels); the same shape."""
        gate, up, down = map(self.get_submodule, self._names)
        y: Tensor = down(self._activation(gate(x)) * up(x))
        return y


class SeparateExperts(nn.Module):
    """Experts "0", "1", … in place of transformers' stacks of their matrices, with the same function.

    asked_for: the only expert that computes, for a while; the others add nothing. None: all that tokens go to.
    """

    def __init__(self, linears: Sequence[Mapping[str, nn.Linear]], activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.asked_for: int | None = None
        for index, of_one in enumerate(linears):
            self.add_module(str(index), Expert(of_one, activation))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (tokens, channels). top_k_index: (tokens, k), the count of experts or more for none.
        top_k_weights: (tokens, k). Returns (tokens, channels) in the dtype of the hidden states."""
        output = torch.zeros_like(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)  # by expert, then by token
        experts, weights = list(self.children()), top_k_weights.flatten()
        counts = torch.bincount(top_k_index.flatten(), minlength=len(experts)).tolist()  # waits for the device once
        start = 0
        for index, (expert, count) in enumerate(zip(experts, counts, strict=False)):
            places = order[start : start + count]
            start += count
            if count and self.asked_for in (None, index):
                tokens = places // top_k_index.shape[1]
                made = expert(hidden_states[tokens]) * weights[places, None]
                output.index_add_(0, tokens, made.to(output.dtype))
        return output


def on_inputs_of_chosen(
    experts: nn.Module, part: str, look: Callable[[Tensor], object], *, first: bool = False
) -> Iterator[RemovableHandle]:
    """Show `look` what the linear of a name reads in the experts of every token: (tokens, k · channels), those of one
    token beside each other, in the experts' order. first: in front of hooks that change it, such as a rotation."""
    assert isinstance(experts, SeparateExperts)
    read: dict[int, Tensor] = {}

    def keep(index: int, _linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[index] = args[0]

    def gather(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        chosen = args[1]
        some = next(iter(read.values()))
        found = some.new_zeros(*chosen.shape, some.shape[-1])
        taken = torch.zeros(len(chosen), dtype=torch.long, device=chosen.device)
        for index in sorted(read):
            tokens = (chosen == index).any(-1).nonzero()[:, 0]
            found[tokens, taken[tokens]] = read[index]
            taken[tokens] += 1
        read.clear()
        look(found.flatten(1))

    for index, expert in enumerate(experts.children()):
        yield expert.get_submodule(part).register_forward_pre_hook(partial(keep, index), prepend=first)
    yield experts.register_forward_hook(gather)


@contextmanager
def alone(experts: nn.Module, index: int) -> Iterator[None]:
    """Let one expert compute and no other, for a while: for passes that look at what it reads."""
    assert isinstance(experts, SeparateExperts)
    experts.asked_for = index
    try:
        yield
    finally:
        experts.asked_for = None
