"""Squared gradients of the loss by the keys and values of every layer, on calibration text: KVQuant's Fisher weights.

    F = g²,  g = ∂L/∂y,  L = mean over t of −log p(x_{t+1} | x_{≤t})      y: a key as RoPE receives it, or a value

One pass forwards and one backwards over the whole model for every sample, without gradients of its weights. It needs
the model in memory, and what one sample leaves in its layers; a larger model takes a policy without weights. On disk F
takes 4·N·T·C bytes a layer, and as much again until the pass is over: 268 MB a sample of 2048 tokens of Llama-3.1-8B.
Squares are taken in float32 and stored in bfloat16, to 0.4 %.
"""

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from corpora.storage import open_tensors, write_tensors
from intactkv.attach import IntactModel, attach
from intactkv.finite import finite
from intactkv.observe import hooked, on_output
from intactkv.prefix import Prefix, build_prefix, input_embeddings
from intactkv.rope import ropes_of

__all__ = ["gradients_of", "squared_gradients"]


def gradients_of(model: IntactModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Gradients by the keys and the values of every layer, each (1, KV heads, T, D) float32, for a sample of (T,) ids.

    The sample stands behind the model's prefix; the loss is that of its tokens 2…T. Raises UserError for gradients that
    are not finite.
    """
    states: list[Tensor] = []

    def watched(update: Any, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> Any:
        states.extend((keys, values))
        return update(keys, values, *more, **named)

    cache = model.new_cache()
    for layer in cache.intact_layers:
        layer.update = partial(watched, layer.update)  # type: ignore[method-assign]
    embeddings = model.model.get_input_embeddings()
    batch = ids[None].to(input_embeddings(model.model).device)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        # Weights take no gradients, so that the graph begins with the embedded text.
        stack.enter_context(hooked([on_output(embeddings, lambda hidden: hidden.requires_grad_())]))
        logits = model.feed(batch, cache=cache).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), batch[0, 1:].to(logits.device), reduction="sum")
        found = torch.autograd.grad(loss, states)
    for gradient in found:
        finite(gradient, f"gradients by keys or values of {model.name}")
    positions = torch.arange(len(ids))[None] + model.prefix_length
    mean = [gradient.float() / (len(ids) - 1) for gradient in found]  # later: small numbers vanish in half precision
    # A gradient turns with the transposed rotation, which is that by the opposite angle.
    keys = [
        x if rope is None else rope.turned(x, -positions.to(x.device))
        for rope, x in zip(ropes_of(model.model.config), mean[0::2], strict=True)
    ]
    return list(zip(keys, mean[1::2], strict=True))


def squared_gradients(
    model: PreTrainedModel, segments: Tensor, behind: Tensor | Prefix | None, folder: Path
) -> list[Path]:
    """Write a file for every layer into an empty folder: `keys` and `values`, each (N, KV heads, T, D) bfloat16.

    segments: (N, T) ids. behind: what they run behind, ids (P,) or a prefix. Raises as `gradients_of`.
    """
    intact = attach(model, build_prefix(model, behind) if isinstance(behind, Tensor) else behind)
    samples = folder / "samples"
    for number, ids in enumerate(tqdm(segments, desc="gradients", unit="sample")):
        squares = [[x.square_().bfloat16() for x in pair] for pair in gradients_of(intact, ids)]
        tensors = {f"{i}.{name}": x for i, of in enumerate(squares) for name, x in zip(_SIDES, of, strict=True)}
        write_tensors(samples / f"{number:05d}.safetensors", tensors)
    files = []
    with ExitStack() as stack:
        opened = [stack.enter_context(open_tensors(file)) for file in sorted(samples.iterdir())]
        for layer in range(len(squares)):
            of_layer = {name: torch.cat([file.get_tensor(f"{layer}.{name}") for file in opened]) for name in _SIDES}
            files.append(folder / f"layer-{layer:03d}.safetensors")
            write_tensors(files[-1], of_layer)
    shutil.rmtree(samples)
    return files


_SIDES = ("keys", "values")
