"""python -m eval: perplexity, tables of finished runs, figures."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from corpora.errors import Parser, UserError, run_program
from quantization.options import add_calibration_options, add_model_options, add_recipe_options, add_run_options


def parser() -> argparse.ArgumentParser:
    """Every subcommand's options."""
    top = Parser(
        prog="python -m eval",
        description="Evaluate a model, dense or quantized, with and without an intact prefix.",
        epilog="example: python -m eval ppl --model modelzoo/smollm2/smollm2-135m --recipe rtn-w3 --prefix bos "
        "--window 512 --limit 8",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="ppl|table|plot")

    ppl = commands.add_parser(
        "ppl",
        help="perplexity on a corpus or a text file",
        description=(
            "Perplexity. A recipe on a dense checkpoint quantizes on the way and reuses what exists; a finished run is "
            "read back from outputs/runs/. Under `accelerate launch` the windows are shared among the processes."
        ),
    )
    add_model_options(ppl)
    add_recipe_options(ppl)
    add_calibration_options(ppl)
    add_run_options(ppl)
    data = ppl.add_argument_group("data and protocol")
    data.add_argument(
        "--corpus",
        action="append",
        metavar="NAME|FILE",
        help="a corpus by name (python -m corpora lists them) or a text file; may be given several times "
        "(default: the model's own, wikitext2 and c4 for most)",
    )
    data.add_argument(
        "--protocol",
        default="intactkv",
        choices=["intactkv", "gptq"],
        help="intactkv: [BOS] in every window, its own prediction not counted (default); gptq: windows "
        "of the plain stream",
    )
    data.add_argument("--window", type=int, default=2048, metavar="TOKENS", help="window length (default: 2048)")
    data.add_argument("--limit", type=int, default=None, metavar="WINDOWS", help="at most so many windows")
    data.add_argument(
        "--batch-size",
        type=int,
        default=None,
        metavar="WINDOWS",
        help="windows per forward pass (default: about 512 tokens on a CPU, 2048 on a GPU)",
    )
    ppl.add_argument("--json", action="store_true", help="print the run record instead of the table")
    ppl.add_argument("--force", action="store_true", help="run again, even if there is a record")

    table = commands.add_parser(
        "table",
        help="finished runs as a table, vanilla beside IntactKV",
        description="Print the perplexities in outputs/runs/, vanilla beside IntactKV.",
    )
    table.add_argument("--format", default="markdown", choices=["markdown", "csv"], help="default: markdown")
    table.add_argument(
        "--costs", action="store_true", help="also what quantizing took: bits per weight, seconds, peak memory"
    )
    _add_filters(table, required=False)

    plot = commands.add_parser("plot", help="figures", description="Draw a figure as PNG, with its data as CSV.")
    figures = plot.add_subparsers(dest="figure", required=True, metavar="perplexity|pivots|hessian")
    bars = figures.add_parser(
        "perplexity",
        help="perplexity per setting, with and without IntactKV",
        description="Perplexity per setting, from the records in outputs/runs/.",
    )
    _add_filters(bars, required=True)
    pivots = figures.add_parser(
        "pivots",
        help="activation magnitude per token and layer",
        description="Largest activation of every token in every layer: the pivots stand out.",
    )
    add_model_options(pivots)
    pivots.add_argument("--corpus", default=None, metavar="NAME|FILE", help="text to run (default: the model's own)")
    pivots.add_argument("--tokens", type=int, default=48, metavar="T", help="length of the text (default: 48)")
    hessian = figures.add_parser(
        "hessian",
        help="the first token's share of every Hessian",
        description="How much of every Hessian's trace the first token of the calibration text owns, per block.",
    )
    add_model_options(hessian)
    hessian.add_argument("--calibration", metavar="NAME|FILE", help="text to run (default: the model's own, or c4)")
    hessian.add_argument("--calibration-samples", type=int, metavar="N", help="pieces of text (default: 16)")
    hessian.add_argument("--calibration-length", type=int, metavar="T", help="tokens of a piece (default: 512 or 2048)")
    for figure in (bars, pivots, hessian):
        figure.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="file to write")
    return top


def _add_filters(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Which finished runs to show."""
    parser.add_argument("--model", required=required, metavar="NAME", help="only this one, for example smollm2-135m")
    parser.add_argument("--corpus", metavar="NAME", help="only runs on this corpus or text file")
    parser.add_argument("--protocol", choices=["intactkv", "gptq"], help="only runs by this protocol")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="only runs with this window")
    parser.add_argument("--limit", metavar="WINDOWS|all", help="only runs with this limit")
    parser.add_argument("--dtype", metavar="NAME", help="only runs computed in this dtype")
    parser.add_argument("--device", metavar="cpu|cuda", help="only runs on this kind of device")


def perplexity(options: argparse.Namespace) -> None:
    """The program `ppl`."""
    import logging

    import torch

    from corpora.catalog import model_defaults
    from corpora.storage import sha256_of_tensor
    from corpora.text import evaluation_stream, protocol
    from eval.perplexity import cut_windows, default_batch_size
    from eval.runs import record_of
    from eval.tables import perplexity_rows, print_table
    from quantization.loading import find_checkpoint, plan_run
    from quantization.options import chosen_device, chosen_dtype, chosen_recipe, show_log

    show_log()
    processes = _processes()
    if processes is not None and processes.process_index > 0:
        logging.getLogger().setLevel(logging.WARNING)
    device = processes.device if processes is not None and options.device == "auto" else chosen_device(options.device)
    checkpoint = find_checkpoint(options.model)
    plan = plan_run(
        options.model,
        chosen_recipe(options, checkpoint),
        device=device,
        vanilla=options.vanilla,
        dtype=chosen_dtype(options.dtype),
        packed=options.packed,
    )
    if options.window < 3:
        raise UserError(f"--window {options.window}: give at least 3 tokens")
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: give at least 1 window")
    batch_size = options.batch_size or default_batch_size(options.window, device.type)
    rules = protocol(options.protocol)
    description = plan.describe()
    records: list[dict[str, Any]] = []
    model: list[Any] = []  # loaded once, when the first corpus without a finished run needs it

    for corpus in options.corpus or model_defaults(checkpoint.family_name).default_corpora:
        stream = evaluation_stream(plan.tokenizer, corpus, window=options.window, protocol=rules)
        windows = cut_windows(stream, rules, plan.choice.ids, description["prefix"]["intact"], options.limit)
        longest = windows.lead.numel() + windows.fed.shape[1]
        if plan.context is not None and longest > plan.context:
            raise UserError(
                f"--window {options.window}: {longest} tokens with what stands in front do not fit the "
                f"{plan.context} positions of {plan.checkpoint.name}; use a smaller window"
            )
        settings = description | {
            "corpus": stream.corpus if not Path(stream.corpus).exists() else Path(stream.corpus).name,
            "text_sha256": stream.text_sha256,
            "tokens_sha256": sha256_of_tensor(torch.cat([windows.lead, windows.fed.flatten()])),
            "protocol": rules.name,
            "window": options.window,
            "limit": options.limit,
            "batch_size": batch_size,
        }

        def run(windows: Any = windows, stream: Any = stream) -> dict[str, Any]:
            if not model:
                model.append(plan.load())
            figures = _measure(model[0], windows, stream, batch_size, device, processes)
            return figures | {"quantization": plan.cost()}

        name = f"{description['model']}-{description['weights']}-{settings['corpus']}"
        records.append(record_of("ppl", name, settings, run, force=options.force, write=_is_first(processes)))
    if not _is_first(processes):
        return
    if options.json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=2))
    else:
        print_table(perplexity_rows(records), costs=True)


def _measure(model: Any, windows: Any, stream: Any, batch_size: int, device: Any, processes: Any) -> dict[str, Any]:
    """Run the windows and return the figures of the record."""
    import time

    from tqdm import tqdm

    from corpora.machine import peak_memory_mb
    from eval.perplexity import window_losses

    starts = range(0, len(windows.fed), batch_size)
    mine = starts if processes is None else starts[processes.process_index :: processes.num_processes]
    started = time.perf_counter()
    with tqdm(
        total=len(windows.fed), desc=f"perplexity {stream.corpus}", unit="window", disable=not _is_first(processes)
    ) as bar:

        def report(done: int, running: float) -> None:
            bar.update(done)
            bar.set_postfix_str(f"perplexity {running:.3f}")

        losses = window_losses(model, windows, batch_size=batch_size, mine=mine, report=report)
    if processes is not None and processes.num_processes > 1:
        from accelerate.utils import reduce

        losses = reduce(losses.to(processes.device), "sum").cpu()
    seconds = time.perf_counter() - started
    tokens = windows.targets * len(windows.fed)
    return {
        "perplexity": float(losses.mean().exp()),
        "nll": float(losses.mean()),
        "window_nll": [round(loss, 6) for loss in losses.tolist()],
        "windows": len(windows.fed),
        "targets": tokens,
        "stream_tokens": len(stream.ids),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(device.type), 1),
    }


def _processes() -> Any:
    """accelerate's view of the processes, None when this is the only one."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    return PartialState()


def _is_first(processes: Any) -> bool:
    return processes is None or processes.is_main_process


FILTERS = ("model", "corpus", "protocol", "window", "limit", "dtype", "device")


def _shown(value: Any) -> str:
    """A setting as a filter spells it; no limit is `all`."""
    return "all" if value is None else str(value)


def _rows(options: argparse.Namespace) -> list[Any]:
    """The finished perplexities that the filters leave. Raises UserError if there are none."""
    from corpora.paths import outputs_dir
    from eval.runs import all_records
    from eval.tables import perplexity_rows

    wanted = {key: getattr(options, key) for key in FILTERS}
    records = [
        record
        for record in all_records("ppl")
        if all(value is None or str(value) == _shown(record["settings"][key]) for key, value in wanted.items())
    ]
    if not records:
        raise UserError(f"{outputs_dir() / 'runs'} holds no finished run that fits; run `python -m eval ppl` first")
    return perplexity_rows(records)


def table(options: argparse.Namespace) -> None:
    """The program `table`."""
    from eval.tables import print_table

    print_table(_rows(options), options.format, options.costs)


def plot(options: argparse.Namespace) -> None:
    """The program `plot`."""
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: figures are written as .png")
    if options.figure == "perplexity":
        from eval.plots.perplexity import draw

        draw(_rows(options), options.out)
    elif options.figure == "hessian":
        from eval.plots.hessian import draw_hessian

        size = options.calibration_samples, options.calibration_length
        draw_hessian(options.model, options.calibration, *size, options.device, options.out)
    else:
        from eval.plots.pivots import draw_pivots

        draw_pivots(options.model, options.corpus, options.tokens, options.device, options.out)
    print(f"{options.out}  {options.out.with_suffix('.csv')}")


def main() -> None:
    """Run the chosen program."""
    options = parser().parse_args(sys.argv[1:])
    {"ppl": perplexity, "table": table, "plot": plot}[options.command](options)


if __name__ == "__main__":
    run_program(main)
