"""Look into a running model: the hooks of the whole project, and what figures need of the tensors of its blocks.

`hooked` takes hooks off again at its end: `before` and `after` see a call as it is, `on_input` and `on_output` its
hidden states; `inputs_of` and `outputs_of` collect them. (What is a part of the model, such as the quantizer in front
of a linear, hangs its own.)

A `Site` names one tensor of every block: the input or the output of a module, or a query or key after RoPE. `observe`
runs texts behind their prefix and hands each site's tensor to a function that keeps what it needs of it; nothing else
stays in memory. The prefix's own tokens are in the cache and never seen here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import Architecture, architecture_of, blocks_of, decoder_of, heads_of
from intactkv.attach import IntactModel, default_batch_size
from intactkv.attention import EXPLICIT, ROWS, asks
from intactkv.cache import IntactCache
from intactkv.experts import on_inputs_of_chosen
from intactkv.finite import finite
from intactkv.prefix import input_embeddings
from intactkv.rope import Places, Rope, ropes_of

__all__ = [
    "BLOCK_OUTPUT",
    "Site",
    "after",
    "attention_mass",
    "before",
    "change_input",
    "down_input",
    "eager_attention",
    "head_input",
    "hooked",
    "input_sites",
    "inputs_of",
    "observe",
    "on_input",
    "on_output",
    "output_sites",
    "outputs_of",
    "run_decoder",
    "token_maxima",
]

Look = Callable[["Site", int, int, Tensor], None]  # site, layer, row of the first sequence, (B, T, C)


# Hooks ----------------------------------------------------------------------------------------------------------------


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hang these hooks, and remove them at the end, also after an error, also of one of them."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def before(
    module: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], Any], *, first: bool = False
) -> RemovableHandle:
    """Show `look` the arguments of every call, by position and by name. first: in front of all hooks that are there,
    such as an online rotation; else behind them."""

    def hook(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        look(args, keywords)

    return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)


def after(module: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any], Any], Any]) -> RemovableHandle:
    """Show `look` the arguments of every call and what it returned."""

    def hook(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        look(args, keywords, output)

    return module.register_forward_hook(hook, with_kwargs=True)


def on_input(module: nn.Module, look: Callable[[Tensor], Any], *, first: bool = False) -> RemovableHandle:
    """Show `look` the hidden states that a module reads. first: as `before` has it."""
    return before(module, lambda args, _keywords: look(args[0]), first=first)


def on_output(module: nn.Module, look: Callable[[Tensor], Any]) -> RemovableHandle:
    """Show `look` the hidden states among what a module returns: a tensor, or a tuple that starts with it."""
    return after(module, lambda _a, _k, output: look(output[0] if isinstance(output, tuple) else output))


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a module read `change` of what it is given."""
    return module.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))


def inputs_of(modules: Iterable[nn.Module]) -> AbstractContextManager[list[Tensor]]:
    """What these modules read in the passes made inside, in the order of their calls."""
    return _collected(modules, on_input)


def outputs_of(modules: Iterable[nn.Module]) -> AbstractContextManager[list[Tensor]]:
    """What these modules return in the passes made inside, in the order of their calls."""
    return _collected(modules, on_output)


@contextmanager
def _collected(modules: Iterable[nn.Module], hang: Callable[..., RemovableHandle]) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    with hooked(hang(module, seen.append) for module in modules):
        yield seen


# Passes ---------------------------------------------------------------------------------------------------------------


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute its attention weights explicitly for the time of the block; one that does so stays."""
    earlier = model.config._attn_implementation
    explicit, set_to = ROWS, model.set_attn_implementation
    if not asks(type(model)):  # its own code looks the word up in every pass
        explicit, set_to = "eager", partial(setattr, model.config, "_attn_implementation")
    set_to(earlier if earlier in EXPLICIT else explicit)
    try:
        yield
    finally:
        set_to(earlier)


def run_decoder(model: IntactModel, ids: Tensor, cache: IntactCache | None = None) -> Tensor:
    """One pass over (B, T) ids behind the model's prefix: what the head would read, (B, T, hidden size).

    cache: one made by `new_cache`, to look at afterwards; by default nothing is kept. Raises UserError for numbers that
    are none.
    """
    device = input_embeddings(model.model).device
    hidden = model.feed(ids.to(device), through=decoder_of(model.model), cache=cache).last_hidden_state
    return finite(hidden, f"hidden states of {model.name}, by row, token and channel")


# Sites ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One tensor of every block. name: in file names and CSV. label: on figures. module: dotted, within the block, ""
    for the block itself. output: the module's output, else its input. rotated: after RoPE. heads_first: the module
    returns (B, heads, T, D). first: in front of an online rotation of the input, where there is one, and of its
    quantizer; else behind both. part: the module holds experts, and the tensor is the input of the linear of this name
    in those that a token is sent to."""

    name: str
    label: str
    module: str
    output: bool = True
    rotated: bool = False
    heads_first: bool = False
    first: bool = False
    part: str = ""


BLOCK_OUTPUT = Site("block", "output of the block", "")


def input_sites(architecture: Architecture) -> tuple[Site, ...]:
    """The inputs of a block's linears: one site for those that read the same tensor, named after the first. Those of
    all experts are two: what goes into them, and what the last linears of those that a token is sent to read."""
    sites = []
    for linears in architecture.everywhere:
        short = [linear.rpartition(".")[2] for linear in linears]
        sites.append(Site(short[0], f"input of {', '.join(short)}", linears[0], output=False))
    if (experts := architecture.experts) is not None:
        sites.append(Site("experts", f"input of experts' {', '.join(experts.inputs)}", experts.module, output=False))
        name, label = f"experts_{experts.output}", f"input of experts' {experts.output}"
        sites.append(Site(name, label, experts.module, output=False, part=experts.output))
    return tuple(sites)


def down_input(architecture: Architecture) -> Site:
    """The input of the last linear of the feed-forward part: what PrefixQuant's detector looks at; where each
    expert has one, and no token sees all of them, of those that a token is sent to."""
    sites = input_sites(architecture)
    return next((site for site in sites if site.module == architecture.down), sites[-1])


def output_sites(architecture: Architecture, pre_rope: bool) -> tuple[Site, ...]:
    """Queries, keys and values. pre_rope: the first two before the rotation by position (models with RoPE only)."""
    rotated = architecture.rotary and not pre_rope
    when = "" if not architecture.rotary else " after RoPE" if rotated else " before RoPE"
    ahead: Any = {"rotated": rotated, "heads_first": architecture.heads_first}
    return (
        Site("query", f"Q{when}", architecture.rope_query, **ahead),
        Site("key", f"K{when}", architecture.rope_key, **ahead),
        Site("value", "V", architecture.value),
    )


@torch.inference_mode()
def observe(
    model: IntactModel,
    ids: Tensor,
    sites: Sequence[Site],
    look: Look,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda rows: None,
) -> None:
    """Run (N, T) ids behind the model's prefix and show `look` every site of the layers (None: all).

    batch_size: sequences of one pass; None takes what perplexity takes. advance: told how many sequences are done.
    Raises UserError, with the linears there are, if a block has no module of that name; and for a site after a rotation
    that `intactkv.rope` does not know.
    """
    blocks = blocks_of(model.model)
    batch_size = batch_size or default_batch_size(ids.shape[1], input_embeddings(model.model).device.type)
    ropes = ropes_of(model.model.config) if any(site.rotated for site in sites) else []
    size = heads_of(model.model.config)[1]
    row, shape = 0, torch.Size()

    def report(site: Site, layer: int, x: Tensor) -> None:
        look(site, layer, row, x.reshape(*shape, -1))

    def hooks() -> Iterator[RemovableHandle]:
        for layer in range(len(blocks)) if layers is None else layers:
            for site in sites:
                rope = ropes[layer] if site.rotated else None
                yield from _hang(blocks[layer], site, partial(report, site, layer), rope, size, model.prefix_length)

    with hooked(hooks()):
        for rows in ids.split(batch_size):
            shape = rows.shape
            run_decoder(model, rows)
            row += len(rows)
            advance(len(rows))


def token_maxima(model: IntactModel, ids: Tensor, sites: Sequence[Site], **options: Any) -> dict[str, Tensor]:
    """M_t = max_c |X_tc| of every site by its name: (L, N, T) float32, for (N, T) ids. options: of `observe`.

    Raises UserError if a value is not finite.
    """
    blocks = len(blocks_of(model.model))
    maxima = {site.name: torch.zeros(blocks, *ids.shape) for site in sites}

    def look(site: Site, layer: int, row: int, x: Tensor) -> None:
        maxima[site.name][layer, row : row + len(x)] = x.abs().amax(dim=-1).float().cpu()

    observe(model, ids, sites, look, **options)
    for site in sites:
        finite(maxima[site.name], f"{site.label} of {model.name}, by block, row and token")
    return maxima


@torch.inference_mode()
def head_input(model: IntactModel, ids: Tensor) -> Tensor:
    """What the vocabulary projection reads for (T,) ids: (T, C) float32."""
    return run_decoder(model, ids[None])[0].float().cpu()


@torch.inference_mode()
def attention_mass(
    model: IntactModel,
    ids: Tensor,
    layers: Sequence[int],
    *,
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda rows: None,
) -> dict[int, Tensor]:
    """Attention probabilities by layer, summed over heads and averaged over the (N, T) sequences: (T, P + T) float32.

    Every row sums to the number of heads. Only eager attention gives probabilities: the model uses it meanwhile.
    """
    architecture = architecture_of(model.model.config)
    blocks = architecture.blocks_of(model.model)
    device = input_embeddings(model.model).device
    columns = model.prefix_length + ids.shape[1]
    mass = {layer: torch.zeros(ids.shape[1], columns, dtype=torch.float64) for layer in layers}

    def keep(layer: int, _args: Any, _keywords: Any, output: tuple[Tensor, Tensor]) -> None:
        mass[layer] += output[1].double().sum(dim=(0, 1)).cpu()

    attentions = {layer: blocks[layer].get_submodule(architecture.attention) for layer in layers}
    with (
        eager_attention(model.model),
        hooked(after(attention, partial(keep, layer)) for layer, attention in attentions.items()),
    ):
        for rows in ids.split(batch_size or default_batch_size(ids.shape[1], device.type)):
            run_decoder(model, rows)
            advance(len(rows))
    return {layer: (sums / len(ids)).float() for layer, sums in mass.items()}


def _hang(
    block: nn.Module, site: Site, look: Callable[[Tensor], None], rope: Rope | None, size: int, first: int
) -> Iterator[RemovableHandle]:
    """The hooks that show a site of one block.

    rope: of the layer, None to turn nothing. size: channels of a head. first: position of the first token.
    """
    try:
        module = block.get_submodule(site.module)
    except AttributeError:
        linears = [name for name, inner in block.named_modules() if isinstance(inner, nn.Linear)]
        raise UserError(
            f"a block of this model holds no {site.module!r}; name one of its linears: {', '.join(linears)}"
        ) from None

    def shown(output: Tensor) -> None:  # queries or keys, (B, T, heads · D), (B, T, heads, D) or (B, heads, T, D)
        heads = output.transpose(1, 2) if site.heads_first else output
        if rope is not None:
            heads = heads.reshape(*heads.shape[:2], -1, size).transpose(1, 2).float()
            heads = Places(first, heads.shape[2], None, rope).turned(heads).transpose(1, 2).to(output.dtype)
        look(heads)

    if site.part:
        yield from on_inputs_of_chosen(module, site.part, look, first=site.first)
        return
    yield on_output(module, shown) if site.output else on_input(module, look, first=site.first)
