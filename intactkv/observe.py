"""Look into a running model: what figures need of the tensors of its blocks, reduced while it runs.

A `Site` names one tensor of every block: the input or the output of a module, or a query or key after RoPE. `observe`
runs texts behind their prefix and hands each site's tensor to a function that keeps what it needs of it; nothing else
stays in memory. The prefix's own tokens are in the cache and never seen here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eval.hooks import eager_attention, hooked, run_decoder, tensor_of
from eval.perplexity import default_batch_size
from intactkv.architecture import Architecture, architecture_of
from intactkv.attach import IntactModel
from intactkv.prefix import input_embeddings

__all__ = ["BLOCK_OUTPUT", "Site", "attention_mass", "down_input", "head_input", "input_sites", "observe",
           "output_sites", "token_maxima"]  # fmt: skip

Look = Callable[["Site", int, int, Tensor], None]  # site, layer, row of the first sequence, (B, T, C)


@dataclass(frozen=True)
class Site:
    """One tensor of every block. name: in file names and CSV. label: on figures. module: dotted, within the block, ""
    for the block itself. output: the module's output, else its input. rotated: after RoPE."""

    name: str
    label: str
    module: str
    output: bool = True
    rotated: bool = False


BLOCK_OUTPUT = Site("block", "output of the block", "")


def input_sites(architecture: Architecture) -> tuple[Site, ...]:
    """The inputs of a block's linears: one site for those that read the same tensor, named after the first."""
    sites = []
    for linears in architecture.linears:
        short = [linear.rpartition(".")[2] for linear in linears]
        sites.append(Site(short[0], f"input of {', '.join(short)}", linears[0], output=False))
    return tuple(sites)


def down_input(architecture: Architecture) -> Site:
    """The input of the last linear of the feed-forward part (`down_proj`): what PrefixQuant's detector looks at."""
    return input_sites(architecture)[-1]


def output_sites(architecture: Architecture, pre_rope: bool) -> tuple[Site, ...]:
    """Queries, keys and values. pre_rope: the first two before the rotation by position (models with RoPE only)."""
    rotated = architecture.rotary and not pre_rope
    when = "" if not architecture.rotary else " after RoPE" if rotated else " before RoPE"
    value = architecture.linears[0][-1]
    return (
        Site("query", f"Q{when}", architecture.query, rotated=rotated),
        Site("key", f"K{when}", architecture.key, rotated=rotated),
        Site("value", "V", value),
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
    """
    architecture = architecture_of(model.model.config)
    blocks = architecture.blocks_of(model.model)
    device = input_embeddings(model.model).device
    batch_size = batch_size or default_batch_size(ids.shape[1], device.type)
    row, shape = 0, torch.Size()

    def report(site: Site, layer: int, x: Tensor) -> None:
        look(site, layer, row, x.reshape(*shape, -1))

    with hooked([]) as hooks:
        for layer in range(len(blocks)) if layers is None else layers:
            for site in sites:
                _hang(hooks, blocks[layer], architecture, site, layer, report)
        for rows in ids.split(batch_size):
            shape = rows.shape
            run_decoder(model, rows)
            row += len(rows)
            advance(len(rows))


def token_maxima(model: IntactModel, ids: Tensor, sites: Sequence[Site], **options: Any) -> dict[str, Tensor]:
    """M_t = max_c |X_tc| of every site by its name: (L, N, T) float32, for (N, T) ids. options: of `observe`."""
    blocks = len(architecture_of(model.model.config).blocks_of(model.model))
    maxima = {site.name: torch.zeros(blocks, *ids.shape) for site in sites}

    def look(site: Site, layer: int, row: int, x: Tensor) -> None:
        maxima[site.name][layer, row : row + len(x)] = x.float().abs().amax(dim=-1).cpu()

    observe(model, ids, sites, look, **options)
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

    def keep(layer: int, output: tuple[Tensor, Tensor]) -> None:
        mass[layer] += output[1].double().sum(dim=(0, 1)).cpu()

    with eager_attention(model.model), hooked([]) as hooks:
        for layer in layers:
            attention = blocks[layer].get_submodule(architecture.attention)
            hooks.append(attention.register_forward_hook(lambda _m, _a, output, layer=layer: keep(layer, output)))
        for rows in ids.split(batch_size or default_batch_size(ids.shape[1], device.type)):
            run_decoder(model, rows)
            advance(len(rows))
    return {layer: (sums / len(ids)).float() for layer, sums in mass.items()}


def _hang(
    hooks: list[Any],
    block: nn.Module,
    architecture: Architecture,
    site: Site,
    layer: int,
    report: Callable[[Site, int, Tensor], None],
) -> None:
    """Add the hooks that report a site of one block."""
    module = block.get_submodule(site.module)
    if not site.output:
        hooks.append(module.register_forward_pre_hook(lambda _module, args: report(site, layer, args[0])))
        return
    if not site.rotated:
        hooks.append(module.register_forward_hook(lambda _m, _a, output: report(site, layer, tensor_of(output))))
        return
    # The block hands cosines and sines of its tokens' positions to attention just before it computes Q and K.
    angles: list[tuple[Tensor, Tensor]] = []

    def remember(_module: nn.Module, _args: Any, keywords: dict[str, Any]) -> None:
        angles[:] = [keywords["position_embeddings"]]

    def rotated(_module: nn.Module, _args: Any, output: Tensor) -> None:
        report(site, layer, _rotated(output, *angles[0]))

    attention = block.get_submodule(architecture.attention)
    hooks.append(attention.register_forward_pre_hook(remember, with_kwargs=True))
    hooks.append(module.register_forward_hook(rotated))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """RoPE (Su et al. 2021, 2104.09864) on the pairs (i, i + D/2) of every head.

    x: (B, T, heads · D) or (B, T, heads, D). cosines, sines: (B or 1, T, D). Returns (B, T, heads, D).
    """
    heads = x.reshape(*x.shape[:2], -1, cosines.shape[-1])
    low, high = heads.chunk(2, dim=-1)
    return heads * cosines[:, :, None] + torch.cat([-high, low], dim=-1) * sines[:, :, None]
