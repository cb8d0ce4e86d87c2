"""How far quantization takes every layer from full precision: its own error, and what arrives from the layers before.

`linear_statistics` (analyze_stats of aiha-lab/qllm-infer) looks at each linear by itself:
    own error      F.linear(x, W, b) of the twin against the linear's real output, for the *same* x
`layerwise_distance` (its get_layerwise_distance) runs the full-precision twin on the same tokens, too; three curves:
    own            as above                                                        per linear
    input          the twin's input against the quantized model's: accumulated     per linear
    output         the twin's residual stream against the quantized model's        behind each block
and compares the logits: KL(full ‖ quantized), top-1 agreement, largest |Δ|.

Departs from the published code, which measures inputs only, against a "full-precision" run that keeps the quantizers of
cache and attention products; leaves the bias out of the reference output; sums errors in half precision; and draws its
window from the first 1 % of the text's rows, where `python -m eval stats distance` draws from all of them.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as linear_function
from torch.utils.hooks import RemovableHandle

from eval.inside.pairs import Pair, weight_of
from eval.inside.statistics import Loss, TokenLoss, spread
from eval.perplexity import Windows
from eval.tasks.scoring import LOGITS_AT_ONCE
from intactkv.finite import finite
from intactkv.observe import after, hooked, on_input, on_output
from quantization.model.inputs import path_in_front

__all__ = ["COLUMNS", "LogitLoss", "layerwise_distance", "linear_statistics"]

SPREAD = ("mean", "std", "kurt", "max", "min")
COLUMNS = (
    *(f"{figure}_{tensor}" for tensor in "xwo" for figure in ("sqnr", "mse")),
    *(f"{figure}_{tensor}" for tensor in "xw" for figure in SPREAD),
)


@torch.inference_mode()
def linear_statistics(
    pair: Pair, windows: Windows, report: Callable[[], Any] = lambda: None
) -> list[dict[str, str | int | float]]:
    """The 16 columns of `COLUMNS` for every linear of the blocks, one row each in model order, as `block`, `linear`.

    x: the input, all tokens that the linear processes (an intact prefix is not among them), its error that of what the
    product takes; behind the online rotation where there is one. w: the twin's weight, its error that of the current
    one. o: the twin's output for this x, bias included, its error that of the real output. x and o: means over the
    windows, as published; of an expert over those that send it a token, nan if none does.
    Memory: one linear's input and output at a time, in float64. report: called after each window.
    """
    rows: list[dict[str, Any]] = []
    watched: list[tuple[dict[str, Any], nn.Module, nn.Linear]] = []
    last: list[tuple[Tensor, dict[str, float]]] = []

    def watch(row: dict[str, Any], module: nn.Module, twin: nn.Linear) -> Iterator[RemovableHandle]:
        def look(x: Tensor, rounded: Tensor, output: Tensor) -> None:
            loss, of_input = Loss(), Loss()
            loss.add(linear_function(x, twin.weight, twin.bias), output)
            of_input.add(x, rounded)
            if not last or last[0][0] is not x:  # linears of one set read the same tensor in a row
                last[:] = [(x, spread(x))]
            figures = {f"{name}_x": value for name, value in last[0][1].items()}
            figures |= {"sqnr_x": of_input.sqnr, "mse_x": of_input.mse, "sqnr_o": loss.sqnr, "mse_o": loss.mse}
            row["seen"] = row.get("seen", 0) + 1
            for name, value in figures.items():
                row[name] = row.get(name, 0.0) + value

        return _watch(module, look)

    for block, name, module, twin in pair.linears():
        loss = Loss()
        loss.add(twin.weight, weight_of(module, twin.weight.dtype))
        row: dict[str, Any] = {"block": block, "linear": name}
        row |= {"sqnr_w": loss.sqnr, "mse_w": loss.mse}
        row |= {f"{figure}_w": value for figure, value in spread(twin.weight).items()}
        rows.append(row)
        watched.append((row, module, twin))
    with hooked(handle for row, module, twin in watched for handle in watch(row, module, twin)):
        for i in range(len(windows.fed)):
            pair.run(pair.quantized, pair.fed(windows, i))
            report()
    for row, _, _ in watched:
        seen = row.pop("seen", 0)  # an expert may see no token of some windows, or of all
        row |= {key: row[key] / seen if seen else math.nan for key in COLUMNS if not key.endswith("_w")}
    return [{key: row[key] for key in ("block", "linear", *COLUMNS)} for row in rows]


@torch.inference_mode()
def layerwise_distance(
    pair: Pair, windows: Windows, report: Callable[[], Any] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The three curves, and the figures of the logits. Experts, which see a part of the tokens, are in the output.

    Returns rows of arm, curve, block, linear (`-` for the output), sqnr, median_token_sqnr (see `TokenLoss`), mse; and
    kl (nats, mean over positions), top1_agreement (0…1), max_logit_change. All count the text's tokens only, so that
    the arms compare the same ones; errors are summed over the windows.
    Memory: two models, and of one window the twin's inputs of every set of linears and its block outputs (on the CPU).
    report: called after each window.
    """
    names = [(block, name) for block, name, _, _ in pair.linears(everywhere=True)]
    losses = {(curve, *name): TokenLoss() for name in names for curve in ("own", "input")}
    losses |= {("output", block, "-"): TokenLoss() for block in range(len(pair.blocks(pair.quantized)))}
    logits = LogitLoss()
    for i in range(len(windows.fed)):
        ids, lead = pair.fed(windows, i), pair.lead(windows)
        kept: dict[tuple[int, str], Tensor] = {}
        with hooked(_keep(pair, kept)):
            expected = pair.run(pair.reference, ids)
        with hooked(_compare(pair, kept, losses, lead)):
            hidden = pair.run(pair.quantized, ids)
        logits.add(pair, expected[lead:], hidden[lead:])
        report()
    rows = [
        {
            "arm": pair.arm,
            "curve": curve,
            "block": block,
            "linear": name,
            "sqnr": loss.sqnr,
            "median_token_sqnr": loss.median,
            "mse": loss.mse,
        }
        for (curve, block, name), loss in losses.items()
    ]
    return rows, logits.figures()


def _keep(pair: Pair, kept: dict[tuple[int, str], Tensor]) -> Iterator[RemovableHandle]:
    """Hooks that keep the reference's inputs, by block and first linear of a set, and block outputs, by block and `-`;
    each (tokens, channels), on the CPU."""

    def keep(key: tuple[int, str], tensor: Tensor) -> None:
        kept[key] = tensor.flatten(0, -2).cpu()

    for block, module in enumerate(pair.blocks(pair.reference)):
        yield on_output(module, partial(keep, (block, "-")))
        for names in pair.architecture.everywhere:
            yield on_input(module.get_submodule(names[0]), partial(keep, (block, names[0])))


def _compare(
    pair: Pair, kept: dict[tuple[int, str], Tensor], losses: dict[tuple[str, int, str], TokenLoss], lead: int
) -> Iterator[RemovableHandle]:
    """Hooks on the quantized model that count every error behind the leading tokens."""
    first_of = {name: names[0] for names in pair.architecture.everywhere for name in names}

    def linear(key: tuple[int, str], twin: nn.Linear, x: Tensor, _rounded: Tensor, output: Tensor) -> None:
        block, name = key
        x, output = x.flatten(0, -2)[lead:], output.flatten(0, -2)[lead:]
        losses["own", block, name].add(linear_function(x, twin.weight, twin.bias), output)
        losses["input", block, name].add(kept[block, first_of[name]][lead:].to(x.device), x)

    def block_output(block: int, output: Tensor) -> None:
        losses["output", block, "-"].add(kept[block, "-"][lead:].to(output.device), output.flatten(0, -2)[lead:])

    for i, name, module, twin in pair.linears(everywhere=True):
        yield from _watch(module, partial(linear, (i, name), twin))
    for i, module in enumerate(pair.blocks(pair.quantized)):
        yield on_output(module, partial(block_output, i))


def _watch(module: nn.Module, look: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[RemovableHandle]:
    """Hooks on a linear: look(input behind its online rotation, what the product takes of it, output)."""
    path, kept = path_in_front(module), list[Tensor]()

    def behind(args: tuple[Tensor, ...], _keywords: Any, output: Tensor) -> None:
        x = kept.pop()
        look(args[0] if path is None else x if path.rotation is None else path.rotation(x), args[0], output)

    yield on_input(module, kept.append, first=True)
    yield after(module, behind)


class LogitLoss:
    """Running comparison of the logits of two models; only a slice of them exists at any time."""

    def __init__(self) -> None:
        self.kl = self.agreed = self.largest = 0.0
        self.positions = 0

    def add(self, pair: Pair, expected: Tensor, hidden: Tensor) -> None:
        """Count positions. expected, hidden: what the heads of reference and quantized model read, (T, hidden size)."""
        heads = [model.model.get_submodule(pair.architecture.head) for model in (pair.reference, pair.quantized)]
        at_once = max(1, LOGITS_AT_ONCE // pair.reference.model.config.vocab_size)
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            full, changed = heads[0](expected[rows]).float(), heads[1](hidden[rows]).float()
            for logits, model in ((full, pair.reference), (changed, pair.quantized)):
                finite(logits.amax(dim=-1), f"logits of {model.name}, by position")
            full_log, changed_log = full.log_softmax(-1), changed.log_softmax(-1)
            self.kl += float((full_log.exp() * (full_log - changed_log)).sum(dtype=torch.float64))
            self.agreed += float((full.argmax(-1) == changed.argmax(-1)).sum())
            self.largest = max(self.largest, float((full - changed).abs().max()))
        self.positions += len(hidden)

    def figures(self) -> dict[str, float]:
        """kl: mean KL(full ‖ quantized) in nats. top1_agreement: 0…1. max_logit_change: of any logit anywhere; nan if
        there was no position."""
        if not self.positions:
            return dict.fromkeys(("kl", "top1_agreement", "max_logit_change"), math.nan)
        return {
            "kl": self.kl / self.positions,
            "top1_agreement": self.agreed / self.positions,
            "max_logit_change": self.largest,
        }
