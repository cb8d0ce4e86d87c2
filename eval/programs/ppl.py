"""python -m eval ppl: perplexity on a corpus or a text file."""

import argparse
import json
from typing import Any

from corpora import values
from eval.programs.start import start
from eval.tables.departures import WINDOW
from quantization.programs.options import add_plan_options

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    ppl = commands.add_parser(
        "ppl",
        help="perplexity on a corpus or a text file",
        description=(
            "Perplexity. A recipe on a dense checkpoint quantizes on the way and reuses what exists; a finished run is "
            "read back from outputs/runs/. Under `accelerate launch` the windows are shared among the processes."
        ),
    )
    add_plan_options(ppl, several=True)
    data = ppl.add_argument_group("data and protocol")
    data.add_argument(
        "--corpus",
        type=values.name,
        action="append",
        metavar="NAME|FILE",
        help="a corpus by name (python -m corpora lists them) or a text file; may be given several times "
        "(default: the model's own; for most wikitext2 and c4, by the protocol gptq wikitext2 and c4-old)",
    )
    data.add_argument(
        "--protocol",
        default="intactkv",
        choices=["intactkv", "gptq"],
        help="intactkv: [BOS] in every window, its own prediction not counted (default); gptq: windows "
        "of the plain stream",
    )
    data.add_argument(
        "--window", type=values.count(3), default=WINDOW, metavar="TOKENS", help=f"window length (default: {WINDOW})"
    )
    data.add_argument("--limit", type=values.count(), default=None, metavar="WINDOWS", help="at most so many windows")
    data.add_argument(
        "--batch-size",
        type=values.count(),
        default=None,
        metavar="WINDOWS",
        help="windows per forward pass (default: about 512 tokens on a CPU, 2048 on a GPU)",
    )
    ppl.add_argument("--json", action="store_true", help="print the run record instead of the table")
    ppl.add_argument("--force", action="store_true", help="run again, even if there is a record")


def run(options: argparse.Namespace) -> None:
    """Measure every corpus that has no finished run, and print all."""
    import torch

    from corpora.catalog import model_defaults
    from corpora.storage import sha256_of_tensor
    from corpora.text import corpus_label, evaluation_stream, protocol
    from eval.perplexity import cut_windows
    from eval.runs import record_of
    from eval.tables.perplexities import perplexity_rows, print_table
    from intactkv.attach import default_batch_size

    plan, processes = start(options)
    device = plan.device
    batch_size = options.batch_size or default_batch_size(options.window, device.type)
    rules = protocol(options.protocol)
    description = plan.describe()
    records: list[dict[str, Any]] = []
    model: list[Any] = []  # loaded once, when the first corpus without a finished run needs it

    texts = []
    for corpus in options.corpus or model_defaults(plan.checkpoint.family_name).corpora_of(rules.name):
        stream = evaluation_stream(plan.tokenizer, corpus, window=options.window, protocol=rules)
        windows = cut_windows(stream, rules, plan.choice.ids, description["prefix"]["intact"], options.limit)
        plan.check_fits("--window", windows.lead.numel() + windows.fed.shape[1], options.window)
        texts.append((stream, windows))  # of all corpora, before the first of them is run

    for stream, windows in texts:
        settings = description | {
            "corpus": corpus_label(stream.corpus),
            "text_sha256": stream.text_sha256,
            "tokens_sha256": sha256_of_tensor(torch.cat([windows.lead, windows.fed.flatten()])),
            "protocol": rules.name,
            "window": options.window,
            "limit": options.limit,
            "batch_size": batch_size,
        }

        def figures(windows: Any = windows, stream: Any = stream) -> dict[str, Any]:
            if not model:
                model.append(plan.load())
            model[0].usage.clear()
            measured = _measure(model[0], windows, stream, batch_size, device, processes)
            kv = model[0].kv_figures(windows.fed.shape[1])
            return measured | ({} if kv is None else {"kv_cache": kv}) | plan.outcome()

        name = f"{description['model']}-{description['weights']}-{settings['corpus']}"
        records.append(record_of("ppl", name, settings, figures, force=options.force, write=processes.is_first))
    if not processes.is_first:
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
    from eval.perplexity import perplexity_of, window_losses

    mine = processes.mine(range(0, len(windows.fed), batch_size))
    started = time.perf_counter()
    with tqdm(
        total=len(windows.fed), desc=f"perplexity {stream.corpus}", unit="window", disable=not processes.is_first
    ) as bar:

        def report(done: int, running: float) -> None:
            bar.update(done)
            bar.set_postfix_str(f"perplexity {running:.3f}")

        losses = processes.summed(window_losses(model, windows, batch_size=batch_size, mine=mine, report=report))
    seconds = time.perf_counter() - started
    tokens = windows.targets * len(windows.fed)
    return {
        "perplexity": perplexity_of(losses),
        "nll": float(losses.mean()),
        "window_nll": [round(loss, 6) for loss in losses.tolist()],
        "windows": len(windows.fed),
        "targets": tokens,
        "stream_tokens": len(stream.ids),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_mb": round(peak_memory_mb(device.type), 1),
    }
