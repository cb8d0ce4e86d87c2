"""python -m eval plot: figures, each a picture and its numbers as CSV."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corpora import values
from eval.programs.plot_options import (
    Declare,
    calibration_options,
    hessian_options,
    kv_bits_options,
    layer_options,
    linear_options,
    linear_output_options,
    log_option,
    motivation_options,
    needle_options,
    only_down_option,
    opening_options,
    outlier_options,
    scattered_options,
)
from eval.programs.table import add_filters, chosen_grids, chosen_rows

if TYPE_CHECKING:
    from corpora.catalog import CalibrationText
    from eval.plots.canvas import Output
    from eval.plots.subject import Subject
    from quantization.runs.plan import Plan

__all__ = ["add", "run"]

OUTPUT_HELP = (
    "Every figure is written in each --format, and its numbers as CSV under the same name. With --out DIR the name is "
    "MODEL__KIND[__PREFIX][__TEXT][__OPTION], which leaves out what is as by default: __wikitext2-64x1024 for 64 "
    "pieces of 1024 tokens of another text, __eta32, __log, __seed5; text files and prefixes other than bos and prompt "
    "have digits of a hash behind their names. With --out FILE.png the name is that file's. A kind that draws several "
    "figures adds __PART (a layer, a tensor). A file that is there is replaced if this program "
    "wrote it. With --prefix a figure shows the text without the prefix and behind it; "
    "positions count the prefix, whose own tokens are not drawn."
)

# What an option adds to the name of a file when it is not as by default. Not here: --device, --dpi and --format, and
# what chooses among figures that each have a name of their own (--layers, --only-down-proj).
PARTS = {
    "text_seed": "seed{}",
    "bos_first": "bos-first",
    "log": "log",
    "pre_rope": "pre-rope",
    "outlier_object": "{}",
    "outlier_threshold": "eta{:.12g}",
    "dtype": "{}",
}
FILTER_PARTS = {
    "corpus": "{}",
    "protocol": "{}",
    "window": "window{}",
    "limit": "limit{}",
    "dtype": "{}",
    "device": "{}",
}  # of runs on record


@dataclass(frozen=True)
class Kind:
    """One kind of figure. declare: adds its options. draw: makes it."""

    help: str
    declare: Declare
    draw: Callable[[argparse.Namespace], "Output"]


def add(commands: Any) -> None:
    """Declare the subcommand and its options."""
    plot = commands.add_parser("plot", help="figures", description="Draw a figure, and write its data as CSV.")
    figures = plot.add_subparsers(dest="figure", required=True, metavar="KIND")
    for name, kind in KINDS.items():
        parser = figures.add_parser(name, help=kind.help, description=f"{kind.help}.", epilog=OUTPUT_HELP)
        kind.declare(parser)
        parser.set_defaults(default=parser.get_default)
        written = parser.add_argument_group("what is written")
        written.add_argument(
            "--out", type=values.path, metavar="DIR|FILE.png", help="see below (default: outputs/figures)"
        )
        written.add_argument(
            "--format", type=values.name, default="png,pdf", metavar="LIST", help="of png, pdf, svg (default: png,pdf)"
        )
        written.add_argument(
            "--dpi", type=values.count(10, 1200), default=200, help="dots per inch of what is no vector (default: 200)"
        )


def run(options: argparse.Namespace) -> None:
    """Draw the chosen figure and print the files written."""
    output = KINDS[options.figure].draw(options)
    print(*output.written, sep="\n")


def _output(options: argparse.Namespace, name: str) -> "Output":
    """Where this command writes. Raises UserError for what cannot be written."""
    from corpora.paths import outputs_dir
    from corpora.targets import check_written, inputs_of
    from eval.plots.canvas import output_for

    output = output_for(options.out or outputs_dir() / "figures", name, options.format, options.dpi)
    reads = inputs_of(value for option, value in vars(options).items() if option != "out")
    check_written((output.path("", ending) for ending in (*output.formats, "csv")), reads)
    return output


def _changed(options: argparse.Namespace, parts: dict[str, str]) -> list[str]:
    """What the options that are not as by default add to the name of a file."""
    given = {name: getattr(options, name, None) for name in parts}
    return [
        part.format(given[name])
        for name, part in parts.items()
        if given[name] is not None and given[name] != options.default(name)
    ]


def _plan(
    options: argparse.Namespace, default: "Callable[[Plan], CalibrationText]"
) -> tuple["Plan", "CalibrationText", "Output"]:
    """What will run on how much of which text, and where its figures go; all options are checked but the text's.

    default: the text of this kind for a model, of which the options may name another, or more or less.
    """
    from eval.plots.subject import figure_name, with_given
    from intactkv.architecture import architecture_of
    from quantization.programs.options import plan_of, show_log
    from quantization.runs.dense import read_config

    show_log()
    plan = plan_of(options)
    architecture_of(read_config(options.model))
    own = with_given(default(plan), None, options.default("samples"), options.default("tokens"))
    text = with_given(own, options.corpus, options.samples, options.tokens)
    return plan, text, _output(options, figure_name(plan, options.figure, text, own, _changed(options, PARTS)))


def _opening(options: argparse.Namespace, conversation: bool = True) -> tuple["Subject", list[int], "Output"]:
    """Model, layers and the beginning of its text."""
    from eval.plots.subject import chosen_layers, default_opening, load_subject, opening

    plan, text, output = _plan(
        options, lambda plan: default_opening(plan, options.default("tokens"), conversation=conversation)
    )
    layers = chosen_layers(options.layers, plan) if hasattr(options, "layers") else []
    return load_subject(plan, opening(plan, text, options.text_seed)), layers, output


def _scattered(options: argparse.Namespace) -> tuple["Subject", list[int], "Output"]:
    """Model, layers and random pieces of its text."""
    from eval.plots.subject import chosen_layers, default_pieces, load_subject, scattered

    plan, text, output = _plan(options, default_pieces)
    layers = chosen_layers(options.layers, plan) if hasattr(options, "layers") else []
    return load_subject(plan, scattered(plan, text, options.text_seed, options.bos_first)), layers, output


def _perplexity(options: argparse.Namespace) -> "Output":
    from eval.plots.canvas import file_name
    from eval.plots.perplexity import draw

    output = _output(options, file_name(options.model, "perplexity", *_changed(options, FILTER_PARTS)))
    draw(chosen_rows(options), output)
    return output


def _kv_bits(options: argparse.Namespace) -> "Output":
    from eval.plots.canvas import file_name
    from eval.plots.kv_bits import draw

    parts = FILTER_PARTS | {"weights": "{}", "prefix": "{}"}
    output = _output(options, file_name(options.model, "kv-bits", *_changed(options, parts)))
    draw([row for row in chosen_rows(options) if row.weights == options.weights], options.prefix, output)
    return output


def _kv_grid(options: argparse.Namespace) -> "Output":
    from eval.plots.kv_grid import draw_kv_grid

    subject, layers, output = _opening(options, conversation=False)
    draw_kv_grid(subject, layers, output)
    return output


def _hessian(options: argparse.Namespace) -> "Output":
    from eval.plots.hessian import PUBLISHED, draw_hessian
    from eval.plots.subject import default_pieces

    plan, text, output = _plan(options, lambda plan: default_pieces(plan, PUBLISHED))
    draw_hessian(plan, text, output)
    return output


def _pivots(options: argparse.Namespace) -> "Output":
    from eval.plots.pivots import draw_pivots

    subject, _, output = _opening(options, conversation=False)
    draw_pivots(subject, output)
    return output


def _act(options: argparse.Namespace) -> "Output":
    from eval.plots.activations import draw_activations

    subject, layers, output = _opening(options)
    draw_activations(subject, layers, options.log, output)
    return output


def _attn(options: argparse.Namespace) -> "Output":
    from eval.plots.attention import draw_attention

    subject, layers, output = _opening(options)
    draw_attention(subject, layers, output)
    return output


def _kv_smooth(options: argparse.Namespace) -> "Output":
    from eval.plots.kv_smoothness import draw_kv_smoothness
    from eval.tables.render import render

    subject, _, output = _opening(options)
    print(render([draw_kv_smoothness(subject, output)], "markdown"))
    return output


def _linear_input(options: argparse.Namespace) -> "Output":
    from eval.plots.linear_ranges import draw_linear_inputs

    subject, _, output = _scattered(options)
    draw_linear_inputs(subject, options.log, output)
    return output


def _linear_output(options: argparse.Namespace) -> "Output":
    from eval.plots.linear_ranges import draw_linear_outputs

    subject, _, output = _scattered(options)
    draw_linear_outputs(subject, options.pre_rope, options.log, output)
    return output


def _outliers(options: argparse.Namespace) -> "Output":
    from eval.plots import outliers

    detector = outliers.Detector(options.outlier_object, options.outlier_threshold)
    subject, _, output = _scattered(options)
    draw = {
        "outlier-layers": outliers.draw_outlier_layers,
        "outlier-count": outliers.draw_outlier_count,
        "outlier-position": outliers.draw_outlier_position,
        "outlier-content": outliers.draw_outlier_content,
    }[options.figure]
    draw(subject, detector, output)
    return output


def _layer_input(options: argparse.Namespace) -> "Output":
    from eval.plots.surfaces import draw_layer_inputs

    subject, layers, output = _scattered(options)
    draw_layer_inputs(subject, layers, options.only_down, options.log, output)
    return output


def _block_output(options: argparse.Namespace) -> "Output":
    from eval.plots.surfaces import draw_block_outputs

    subject, layers, output = _scattered(options)
    draw_block_outputs(subject, layers, options.log, output)
    return output


def _motivation(options: argparse.Namespace) -> "Output":
    """One load of the quantized model and its twin; the recipe is RTN with 3 bits unless another is named."""
    from tqdm import tqdm

    from corpora.catalog import CalibrationText, model_defaults
    from corpora.conversations import conversations
    from corpora.errors import UserError
    from corpora.sharegpt import VICUNA_PROMPT
    from eval.inside.motivation import losses_by_size
    from eval.plots.motivation import draw_motivation
    from eval.plots.subject import token_name
    from intactkv.pivots import hidden_magnitudes
    from quantization.labels import full_label
    from quantization.runs.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(options.model)
    if options.recipe is None and checkpoint.manifest is None:
        options.recipe, options.bits = "rtn", options.bits or 3
    if options.prefix is None:  # ShareGPT's conversations are in Vicuna's format, whatever the model's own may be
        name = checkpoint.family_name
        own = "vicuna" in name.lower() or model_defaults(name).default_conversations != "sharegpt"
        options.prefix = "prompt" if own else VICUNA_PROMPT

    def size(plan: "Plan") -> CalibrationText:
        source = model_defaults(plan.checkpoint.family_name).default_conversations
        return CalibrationText(source, *((8, 128) if source == "sample" else (128, 1024)))

    plan, text, output = _plan(options, size)
    if not plan.has_prefix:
        raise UserError("--prefix none: the curve is the loss against the size of a prefix; name one, such as prompt")
    if text.length <= len(plan.choice.ids) + 1:
        raise UserError(f"--tokens {text.length}: the prefix alone has {len(plan.choice.ids)}; give more")
    chats, _ = conversations(
        plan.tokenizer, text.corpus, samples=text.samples, held_out=0, max_length=text.length, min_assistant=50, seed=42
    )
    for chat in chats:
        if chat.ids[: len(plan.choice.ids)].tolist() != list(plan.choice.ids):
            raise UserError(
                f"--prefix {options.prefix}: the conversations of {text.corpus} do not start with its "
                f"{len(plan.choice.ids)} tokens, so no curve over its size can be drawn; leave it out, or give bos"
            )
    model = plan.load()
    assert model.prefix is not None
    twin = plan.twin()
    with tqdm(total=len(chats) * (len(model.prefix) + 1), desc="motivation", unit="pass") as bar:
        losses = losses_by_size(model.model, twin, model.prefix, chats, kv=model.kv, advance=bar.update)
    pivots = [i for i in hidden_magnitudes(twin, chats[0].ids).pivots() if i < len(model.prefix)]
    tokens = [token_name(plan.tokenizer, int(i)) for i in model.prefix.ids]
    caption = (
        f"{plan.checkpoint.name} {full_label(plan.recipe)}: {len(chats)} conversations of {text.corpus}, at most "
        f"{text.length} tokens"
    )
    draw_motivation(losses, tokens, pivots, caption, output)
    return output


def _needle(options: argparse.Namespace) -> "Output":
    from corpora.errors import UserError
    from eval.plots.canvas import file_name
    from eval.plots.needle import draw_needles

    lengths = options.lengths and list(options.lengths)
    records = [record for record in chosen_grids(options) if lengths in (None, record["settings"]["lengths"])]
    if not records:
        raise UserError(f"--lengths {','.join(map(str, lengths))}: no finished run has these lengths; leave it out")
    parts = ("-".join(map(str, lengths or ())), *_changed(options, FILTER_PARTS))
    output = _output(options, file_name(options.model, "needle", *parts))
    draw_needles(records, output)
    return output


def _calibration(options: argparse.Namespace) -> "Output":
    from eval.plots.calibration import draw_calibration
    from eval.plots.canvas import file_name

    names = [path.name.removesuffix(".curve.jsonl") for path in options.curves]
    output = _output(options, file_name("calibration", *names))
    draw_calibration(options.curves, output)
    return output


KINDS = {
    "perplexity": Kind("perplexity per setting, with and without IntactKV, from the records in outputs/runs/",
                       lambda parser: add_filters(parser, required=True), _perplexity),
    "needle": Kind("share of keys found in long texts, by length and depth, from the records in outputs/runs/",
                   needle_options, _needle),
    "kv-bits": Kind("perplexity against the bits of an element of the KV cache, for every policy, from the records",
                    kv_bits_options, _kv_bits),
    "kv-grid": Kind("keys and values over tokens and channels, and the error of a KV policy",
                    layer_options(opening_options(128, conversation=False)), _kv_grid),
    "pivots": Kind("largest activation of every token in every layer: the pivots stand out",
                   opening_options(48, conversation=False, prefix=False), _pivots),
    "hessian": Kind("the first token's share of every Hessian's trace, block by block", hessian_options, _hessian),
    "act": Kind("IntactKV: magnitudes of block outputs over token and channel, pivot tokens marked",
                layer_options(opening_options(128), log_option), _act),
    "attn": Kind("IntactKV: attention summed over heads, pivot tokens marked",
                 layer_options(opening_options(64, many=True)), _attn),
    "kv-smooth": Kind("IntactKV: how large and spread keys and values of pivot and other tokens are; prints a table",
                      opening_options(1024, prefix=False, many=True), _kv_smooth),
    "motivation": Kind("IntactKV: loss of a quantized model against the size of its intact prefix",
                       motivation_options, _motivation),
    "calibration": Kind("how prefixes were trained: losses of steps and of held-out conversations", calibration_options,
                        _calibration),
    "linear-input": Kind("PrefixQuant: token-wise maxima of the inputs of linears by layer", linear_options,
                         _linear_input),
    "linear-output": Kind("PrefixQuant: token-wise maxima of queries, keys and values by layer",
                          linear_output_options, _linear_output),
    "outlier-layers": Kind("PrefixQuant: mean number of outlier tokens per layer", outlier_options, _outliers),
    "outlier-count": Kind("PrefixQuant: how many outlier tokens a sequence has", outlier_options, _outliers),
    "outlier-position": Kind("PrefixQuant: at which positions outlier tokens stand", outlier_options, _outliers),
    "outlier-content": Kind("PrefixQuant: which tokens are outliers", outlier_options, _outliers),
    "layer-input-3d": Kind("PrefixQuant: magnitudes of the inputs of linears over token and channel",
                           layer_options(scattered_options(512, many=False), log_option, only_down_option),
                           _layer_input),
    "block-output-3d": Kind("PrefixQuant: magnitudes of block outputs over token and channel",
                            layer_options(scattered_options(512, many=False), log_option), _block_output),
}  # fmt: skip
