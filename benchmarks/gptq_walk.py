"""Where the seconds of quantizing go: reading, passes, Hessians, columns, writing; and the kernels behind them.

Random blocks of one shape, quantized three times: first while libraries and kernels are loaded, then as users do, then
once more. The first and the last time a GPU is waited for at every stage, which says what each takes. Then one block
under torch's profiler (`--profile`).
"""

import argparse
import logging
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import report
from benchmarks.memory import SHAPES, VOCABULARY, write_random_checkpoint
from quantization.model.stages import seconds_by_stage
from quantization.named import RECIPES, named_recipe
from quantization.recipes.recipe import with_settings
from quantization.runs.pipeline import quantize_checkpoint


class _Blocks(logging.Handler):
    """Seconds of every block, from the log."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("block") and isinstance(record.args, tuple):
            self.seconds.append(round(float(str(record.args[-1])), 2))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--shape", choices=[*SHAPES], default="8b", help="(default: 8b)")
    parser.add_argument("--recipe", choices=[*RECIPES], default="gptq-w4", help="(default: gptq-w4)")
    parser.add_argument("--blocks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (default: 128)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each (default: 2048)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    parser.add_argument("--profile", action="store_true", help="one block more under torch's profiler: 15 kernels")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU is here")
        return
    shape = (options.samples, options.length)
    ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    recipe = with_settings(named_recipe(options.recipe), options.settings)
    log, blocks = logging.getLogger("quantization.runs.pipeline"), _Blocks()
    log.setLevel(logging.INFO)
    log.addHandler(blocks)
    with tempfile.TemporaryDirectory() as place:

        def run(source: Path, out: str) -> float:
            start = time.perf_counter()
            quantize_checkpoint(source, recipe, Path(place) / out, segments=ids, device=options.device)
            return round(time.perf_counter() - start, 2)

        source = Path(place) / "model"
        write_random_checkpoint(source, options.shape, options.blocks, options.device)
        figures: dict[str, Any] = {}
        for name in ("first", "plain", "stages"):
            blocks.seconds.clear()
            with nullcontext({}) if name == "plain" else seconds_by_stage() as stages:
                figures[f"seconds_{name}"] = run(source, name)
            figures[f"blocks_{name}"] = list(blocks.seconds)
            if stages:
                by_size = sorted(stages.items(), key=lambda x: -x[1])
                figures[f"stages_{name}"] = {stage: round(took, 3) for stage, took in by_size}
        if options.device == "cuda":
            figures["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
        report(benchmark="gptq_walk", recipe=recipe.label(), shape=options.shape, tokens=list(shape), **figures)
        if options.profile:
            from torch.profiler import ProfilerActivity, profile

            one = Path(place) / "one"
            write_random_checkpoint(one, options.shape, 1, options.device)
            on_gpu = options.device == "cuda"
            with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
                run(one, "profiled")
            took = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            for event in sorted(profiled.key_averages(), key=lambda event: -getattr(event, took))[:15]:
                print(f"{getattr(event, took) / 1e3:10.1f} ms {event.count:7d} ×  {event.key[:90]}")


if __name__ == "__main__":
    main()
