"""Tokens per second and peak memory of the evaluator beside the plain loop, on the same windows.

The plain loop is what one writes first: one call of the model per window, all logits, one cross-entropy.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.measure import alternating, peak_unshared_mb, ratio, report
from corpora.text import evaluation_stream, protocol
from eval.perplexity import Windows, cut_windows, window_losses
from intactkv.attach import IntactModel, default_batch_size
from quantization.named import named_recipe
from quantization.programs.options import chosen_device
from quantization.runs.plan import plan_run


def plain_loop(model: IntactModel, windows: Windows) -> float:
    """Mean NLL by full logits, window by window."""
    losses = []
    with torch.inference_mode():
        for fed in windows.fed:
            ids = torch.cat([windows.lead, fed])[None].to(model.model.device)
            logits = model.model(ids).logits[0, len(windows.lead) : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(windows.lead) + 1 :]).double())
    return float(torch.stack(losses).mean())


def evaluator(model: IntactModel, windows: Windows, window: int) -> float:
    """Mean NLL by `eval ppl`."""
    return float(window_losses(model, windows, batch_size=default_batch_size(window, model.model.device.type)).mean())


def main() -> None:
    """Measure, or (as a child) run one arm alone for its memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("modelzoo/smollm2/smollm2-135m"))
    parser.add_argument("--corpus", default="sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=["plain", "evaluator"], help="run only this arm, once")
    parser.add_argument("--window", type=int, default=None)
    options = parser.parse_args()
    device = chosen_device(options.device)
    plan = plan_run(options.model, named_recipe("fp16"), device=device)
    model = plan.load()
    for window, count in ((512, 8), (2048, 2)):
        if options.window not in (None, window):
            continue
        rules = protocol("intactkv")
        stream = evaluation_stream(plan.tokenizer, options.corpus, window=window, protocol=rules)
        windows = cut_windows(stream, rules, (), False, count)
        if options.arm == "plain":
            plain_loop(model, windows)
            continue
        if options.arm == "evaluator":
            evaluator(model, windows, window)
            continue
        mine, peer = evaluator(model, windows, window), plain_loop(model, windows)
        assert abs(mine - peer) < 1e-4, (mine, peer)
        times = alternating(
            lambda w=windows, s=window: evaluator(model, w, s),
            lambda w=windows: plain_loop(model, w),
            options.rounds,
            device.type,
        )
        memory = {}
        if device.type == "cpu":
            for arm in ("evaluator", "plain"):
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.perplexity",
                    "--arm",
                    arm,
                    "--window",
                    str(window),
                    "--model",
                    str(options.model),
                    "--corpus",
                    options.corpus,
                ]
                memory[f"{arm}_peak_mb"] = round(peak_unshared_mb(command))
        tokens = windows.targets * count
        report(
            benchmark="perplexity",
            window=window,
            windows=count,
            device=device.type,
            tokens_per_second=round(tokens / sorted(times[0])[options.rounds // 2], 1),
            plain_tokens_per_second=round(tokens / sorted(times[1])[options.rounds // 2], 1),
            speed_ratio=round(ratio(times[1], times[0]), 3),
            **memory,
        )


if __name__ == "__main__":
    main()
