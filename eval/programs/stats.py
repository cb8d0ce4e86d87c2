"""python -m eval stats: what quantization does inside the model, layer by layer."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora import values
from corpora.errors import UserError
from quantization.programs.options import add_plan_options, add_text_seed, plan_of, show_log
from quantization.programs.out_option import check_out

if TYPE_CHECKING:
    from corpora.text import TokenStream
    from eval.perplexity import Windows
    from quantization.runs.plan import Plan

__all__ = ["add", "run"]


@dataclass(frozen=True)
class Kind:
    """What a report is about. windows: of text, by default; drawn: from the calibration text, with a seed."""

    help: str
    description: str
    windows: int
    drawn: bool = False


KINDS = {
    "linears": Kind(
        "own error of every quantized linear, and how weights and inputs are spread",
        "SQNR and MSE of input, weight and output, and mean, std, kurtosis, max, min of input and weight, of every "
        "linear for itself: the full-precision weight gets the same input. Means over the windows.",
        windows=10,
    ),
    "distance": Kind(
        "distance to full precision over depth: own, accumulated and block-output error; KL of the logits",
        "The full-precision twin runs on the same tokens: own error of every linear, accumulated error of its input, "
        "error of every block's output, KL and agreement of the logits. With a prefix, vanilla and intact arm.",
        windows=1,
        drawn=True,
    ),
    "kv": Kind(
        "error of keys, values and attention per layer, pivot tokens apart",
        "SQNR of the cached keys and values and of what attention returns against full precision, for pivot tokens "
        "and the rest, with quantized fraction and bits per element. With a prefix, vanilla and intact arm.",
        windows=4,
    ),
    "pivots": Kind(
        "pivot tokens, the attention they receive, their share of every Hessian",
        "Tokens with massive activations, where and how large; the attention mass they receive, their share of the "
        "Hessians' traces, their keys and values against the others'. The model computes a prefix's tokens itself.",
        windows=1,
    ),
}
PUBLISHED_WINDOW = 2048  # of analyze_stats and get_layerwise_distance, with the seed of the latter
PUBLISHED_SEED = 1234


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    stats = commands.add_parser(
        "stats",
        help="statistics per layer: errors, keys and values, pivot tokens",
        description="What quantization does inside the model, as a table, a CSV, a figure and a run record.",
    )
    kinds = stats.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for name, kind in KINDS.items():
        report = kinds.add_parser(name, help=kind.help, description=kind.description)
        add_plan_options(report)
        text = report.add_argument_group("text")
        text.add_argument(
            "--corpus",
            type=values.name,
            metavar="NAME|FILE",
            help="a corpus by name or a text file (default: the model's own, wikitext2 for most)",
        )
        text.add_argument(
            "--protocol",
            default="intactkv",
            choices=["intactkv", "gptq"],
            help="intactkv: [BOS] (or the prefix) stands in front of every window (default); gptq: windows of the "
            "plain text",
        )
        text.add_argument(
            "--window", type=values.count(3), metavar="TOKENS", help="window length (default: 2048, or the model's own)"
        )
        text.add_argument(
            "--limit",
            type=values.count(),
            default=kind.windows,
            metavar="WINDOWS",
            help=f"windows (default: {kind.windows})",
        )
        if kind.drawn:
            add_text_seed(text, PUBLISHED_SEED, "of the windows' draw from the corpus' calibration text")
        report.add_argument(
            "--out",
            type=values.path,
            metavar="FILE.csv",
            help="table to write, the figure beside it (default: outputs/stats/"
            "MODEL__KIND__WEIGHTS[__PREFIX]__IDENTITY.csv, with the identity of the run record)",
        )
        if name != "pivots":
            report.add_argument("--full", action="store_true", help="print every row, not only a summary")
        report.add_argument("--json", action="store_true", help="print the run record instead of the tables")
        report.add_argument("--force", action="store_true", help="run again, even if there is a record")


def run(options: argparse.Namespace) -> None:
    """Measure, unless there is a record; write CSV and figure, print the tables."""
    from corpora.storage import sha256_of_tensor
    from corpora.text import corpus_label
    from eval.inside.reports import TABLES, decoded, encoded, write_csv
    from eval.plots.statistics import draw
    from eval.runs import record_of
    from eval.tables.render import render

    show_log()
    kind = options.kind
    if options.out is not None:
        beside = [
            options.out.with_name(f"{options.out.stem}__{part}")
            for part in ("figure.png", "figure.pdf", "figure.csv", "tokens.csv")
        ]
        check_out(options, ".csv", *beside)
    plan = plan_of(options)
    _refuse(kind, plan)
    stream, windows = _text(options, plan)
    description = plan.describe()
    settings = description | {
        "kind": kind,
        "corpus": corpus_label(stream.corpus),
        "text_sha256": stream.text_sha256,
        "tokens_sha256": sha256_of_tensor(windows.fed),
        "lead": windows.lead.tolist(),
        "protocol": options.protocol,
        "window": stream.window,
        "limit": options.limit,
        "text_seed": getattr(options, "text_seed", None),
    }
    name = f"{description['model']}-{description['weights']}-{settings['corpus']}"
    record = record_of(
        f"stats-{kind}", name, settings, lambda: encoded(_measure(kind, plan, windows)), force=options.force
    )
    figures = decoded(record)
    out = options.out or _default_out(kind, plan, record["identity"])
    written = [out]
    drawn = draw(kind, figures, out.with_suffix(""))  # first: it carries the mark by which the tables are known as ours
    write_csv(out, figures["rows"])
    if kind == "pivots":
        written.append(out.with_name(f"{out.stem}__tokens.csv"))
        write_csv(written[-1], figures["pivots"])
    written += drawn
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{description['model']}, weights {description['weights']}, {_conditions(settings, windows)}")
    print(f"\n{render(TABLES[kind](figures, getattr(options, 'full', True)), 'markdown')}", end="")
    if kind == "pivots" and not figures["pivots"]:
        print("\nNo token holds a massive activation (over 100, and over 1000 times the layer's median).")
    print("\n" + "  ".join(str(path) for path in written))


def _refuse(kind: str, plan: "Plan") -> None:
    """What a report cannot be made of."""
    changed = plan.recipe.makes_checkpoint or plan.checkpoint.manifest is not None
    if kind == "linears" and not changed:
        raise UserError(
            "the statistics of linears compare quantized weights with their full precision, but this recipe quantizes "
            "none; name one that does, for example --recipe rtn-w4, or a quantized checkpoint"
        )
    if kind == "pivots" and plan.recipe.kv_cache is not None:
        raise UserError("the pivot report looks at the model, not at a cache policy; add --kv none")


def _text(options: argparse.Namespace, plan: "Plan") -> "tuple[TokenStream, Windows]":
    """The text that the models run: a stream, and the windows cut from it."""
    from corpora.catalog import model_defaults
    from corpora.storage import sha256_of_tensor
    from corpora.text import TokenStream, calibration_segments, evaluation_stream, protocol, start_token_id
    from eval.perplexity import cut_windows

    own, rules = model_defaults(plan.checkpoint.family_name), protocol(options.protocol)
    corpus = options.corpus or own.default_corpora[0]
    window = options.window
    if window is None:
        window = own.default_calibration.length if own.default_calibration else PUBLISHED_WINDOW
    if KINDS[options.kind].drawn:
        segments = calibration_segments(
            plan.tokenizer, corpus, samples=options.limit, length=window, seed=options.text_seed
        )
        stream = TokenStream(
            segments.flatten(), corpus, sha256_of_tensor(segments), options.limit, window, rules,
            start_token_id(plan.tokenizer),
        )  # fmt: skip
    else:
        stream = evaluation_stream(plan.tokenizer, corpus, window=window, protocol=rules)
    windows = cut_windows(stream, rules, plan.choice.ids, False, options.limit)
    plan.check_fits("--window", windows.lead.numel() + windows.fed.shape[1], window)
    return stream, windows


def _measure(kind: str, plan: "Plan", windows: "Windows") -> dict[str, Any]:
    """Run the models and return the figures of the record."""
    import time
    from dataclasses import replace

    import torch
    from tqdm import tqdm

    from corpora.machine import peak_memory_mb
    from eval.inside.distances import layerwise_distance, linear_statistics
    from eval.inside.kv_report import kv_report
    from eval.inside.pairs import pairs_of
    from eval.inside.pivot_report import pivot_report
    from eval.inside.reports import means_of
    from intactkv.attach import attach

    def bar(passes: int) -> tqdm:
        return tqdm(total=passes * len(windows.fed), desc=f"statistics: {kind}", unit="window")

    started = time.perf_counter()
    figures: dict[str, Any] = {}
    if kind == "pivots":
        # The model computes the prefix's tokens itself; weights that must not are refused here.
        model = attach(replace(plan, vanilla=True).load().model, None).model
        texts = torch.cat([windows.lead.expand(len(windows.fed), -1), windows.fed], dim=1)
        with bar(1) as progress:
            tokens, rows = pivot_report(model, texts, progress.update)
        figures["pivots"] = [{"text": repr(str(plan.tokenizer.decode([row["token"]]))), **row} for row in tokens]
    elif kind == "linears":
        pair = pairs_of(plan)[-1]
        with bar(1) as progress:
            rows = linear_statistics(pair, windows, progress.update)
        figures["arm"] = pair.arm
    else:
        look = layerwise_distance if kind == "distance" else kv_report
        pairs, rows, figures["logits"] = pairs_of(plan), [], {}
        with bar(len(pairs)) as progress:
            for pair in pairs:
                mine, figures["logits"][pair.arm] = look(pair, windows, progress.update)
                rows += mine
    seconds = time.perf_counter() - started
    return figures | {
        "means": means_of(kind, rows),
        "rows": rows,
        "windows": len(windows.fed),
        "tokens": windows.fed.numel(),
        "seconds": round(seconds, 3),
        "peak_memory_mb": round(peak_memory_mb(plan.device.type), 1),
    }


def _conditions(settings: dict[str, Any], windows: "Windows") -> str:
    """Everything that a figure depends on and the table does not say."""
    from quantization.labels import kv_label

    return (
        f"KV {kv_label(settings['kv'])}, prefix {settings['prefix']['label']}, {settings['corpus']}: "
        f"{len(windows.fed)} × {settings['window']} tokens, protocol {settings['protocol']}, {settings['dtype']} on "
        f"{settings['device']}"
    )


def _default_out(kind: str, plan: "Plan", identity: str) -> Path:
    """outputs/stats/MODEL__KIND__WEIGHTS[__PREFIX]__IDENTITY.csv: one table for every run record."""
    from corpora.files import name_part
    from corpora.paths import outputs_dir
    from quantization.kv_cache import kv_bits
    from quantization.labels import full_label, told
    from quantization.recipes.recipe import describe

    manifest, kv, word = plan.checkpoint.manifest, plan.recipe.kv_cache, plan.choice.word
    weights = full_label(plan.recipe) if manifest is None else told(manifest["label"], manifest["recipe"])
    if kv is not None:
        weights += f"-kv{kv_bits(describe(kv))}"
    parts = [plan.checkpoint.family_name, kind, weights]
    if plan.has_prefix:
        parts.append((word if word in ("bos", "prompt") else "text") + ("-vanilla" if plan.vanilla else ""))
    return outputs_dir() / "stats" / f"{name_part('__'.join(parts))}__{identity}.csv"
