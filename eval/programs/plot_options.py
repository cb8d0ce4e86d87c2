"""Options of the figures: which model, which text, what of it."""

import argparse
from collections.abc import Callable

from corpora import values
from eval.programs.table import add_filters
from intactkv.architecture import DOWN_PROJ
from quantization.programs.options import add_plan_options, add_text_seed

__all__ = ["Declare", "calibration_options", "hessian_options", "kv_bits_options", "layer_options", "linear_options",
           "linear_output_options", "log_option", "motivation_options", "needle_options", "only_down_option",
           "opening_options", "outlier_options", "scattered_options"]  # fmt: skip

Declare = Callable[[argparse.ArgumentParser], None]


def _text_options(
    parser: argparse.ArgumentParser, own: str, tokens: int | None, *, prefix: bool
) -> argparse._ArgumentGroup:
    """Model, recipe and text. own: what the text is by default. tokens: the default, None for the model's own."""
    add_plan_options(parser, prefix=prefix, run=False)
    text = parser.add_argument_group("text")
    text.add_argument("--corpus", type=values.name, metavar="NAME|FILE", help=f"text to run (default: {own})")
    length = str(tokens) if tokens else "the model's own, or 1024"
    text.add_argument(
        "--tokens", type=values.count(), default=tokens, metavar="T", help=f"of a sequence (default: {length})"
    )
    return text


def opening_options(tokens: int, *, conversation: bool = True, prefix: bool = True, many: bool = False) -> Declare:
    """Options of kinds that look at the beginning of a text. many: of several sequences, if wanted."""
    own = "a conversation of sharegpt in Vicuna's format, unless the model has a text of its own"

    def declare(parser: argparse.ArgumentParser) -> None:
        text = _text_options(parser, own if conversation else "the model's own", tokens, prefix=prefix)
        if many:
            text.add_argument("--samples", type=values.count(), default=1, metavar="N", help="sequences (default: 1)")
        else:
            parser.set_defaults(samples=1)
        add_text_seed(text, 1, "of the order of ShareGPT's conversations")

    return declare


def scattered_options(tokens: int | None = None, *, many: bool = True) -> Declare:
    """Options of kinds that look at random pieces of text. tokens: None takes the model's own. many: several pieces."""

    def declare(parser: argparse.ArgumentParser) -> None:
        text = _text_options(parser, "the model's own calibration text, or pile", tokens, prefix=True)
        if many:
            text.add_argument(
                "--samples", type=values.count(), metavar="N", help="pieces (default: the model's own, or 64)"
            )
        else:
            parser.set_defaults(samples=1)
        add_text_seed(text, 0, "of the pieces' draw")
        text.add_argument(
            "--bos-first",
            action="store_true",
            help="put [BOS] at position 0 of every piece (default: pieces as they stand, as published)",
        )

    return declare


def layer_options(declare: Declare, *more: Declare) -> Declare:
    """The options of `declare`, --layers and others."""

    def declare_all(parser: argparse.ArgumentParser) -> None:
        declare(parser)
        parser.add_argument(
            "--layers", type=values.name, default="step:8", metavar="LIST|step:N",
            help="0,8,16, or every N-th block from 0 on (default: step:8)",
        )  # fmt: skip
        for add_more in more:
            add_more(parser)

    return declare_all


def log_option(parser: argparse.ArgumentParser) -> None:
    """--log."""
    parser.add_argument("--log", action="store_true", help="logarithmic axis of magnitudes")


def linear_options(parser: argparse.ArgumentParser) -> None:
    """Options of ranges of linears."""
    scattered_options()(parser)
    log_option(parser)


def linear_output_options(parser: argparse.ArgumentParser) -> None:
    """The same, and --pre-rope."""
    linear_options(parser)
    parser.add_argument("--pre-rope", action="store_true", help="Q and K before the rotation by position")


def only_down_option(parser: argparse.ArgumentParser) -> None:
    """--only-down-proj."""
    parser.add_argument("--only-down-proj", dest="only_down", action="store_true", help=f"inputs of {DOWN_PROJ} alone")


def outlier_options(parser: argparse.ArgumentParser) -> None:
    """Options of outlier tokens, and their detector."""
    scattered_options()(parser)
    detector = parser.add_argument_group("detector")
    detector.add_argument("--outlier-object", type=values.name, default=DOWN_PROJ, metavar=f"{DOWN_PROJ}|hidden_state",
                          help=f"inputs of {DOWN_PROJ}, or outputs of blocks (default: %(default)s)")  # fmt: skip
    detector.add_argument(
        "--outlier-threshold",
        type=values.number(above=1, like="64"),
        default=64.0,
        metavar="RATIO",
        help="to the median over tokens, above which a token is an outlier (default: 64)",
    )


def hessian_options(parser: argparse.ArgumentParser) -> None:
    """The text that calibration sees."""
    add_plan_options(parser, recipe=False, calibration=False, prefix=False, run=False, dtype=False)
    parser.add_argument("--calibration", dest="corpus", type=values.name, metavar="NAME|FILE",
                        help="text to run (default: the model's own, or c4)")  # fmt: skip
    parser.add_argument("--calibration-samples", dest="samples", type=values.count(), metavar="N",
                        help="pieces of text (default: the model's own, or 16)")  # fmt: skip
    parser.add_argument("--calibration-length", dest="tokens", type=values.count(), metavar="T",
                        help="tokens of a piece (default: the model's own, or 2048)")  # fmt: skip


def kv_bits_options(parser: argparse.ArgumentParser) -> None:
    """Which runs on record, of which weights, and which prefix they are compared behind."""
    add_filters(parser, required=True)
    parser.add_argument(
        "--weights",
        type=values.name,
        default="full",
        metavar="NAME",
        help="only runs with these weights, as `python -m eval table` names them (default: full)",
    )
    parser.add_argument(
        "--prefix",
        type=values.name,
        default="[B]",
        metavar="[B]|[P]|…",
        help="the intact prefix to compare behind, as the table names it (default: [B])",
    )


def calibration_options(parser: argparse.ArgumentParser) -> None:
    """The curves to draw."""
    parser.add_argument("--curves", type=values.path, nargs="+", required=True, metavar="FILE.curve.jsonl",
                        help="what `python -m intactkv calibrate` wrote; several are drawn together")  # fmt: skip


def motivation_options(parser: argparse.ArgumentParser) -> None:
    """Model, prefix and conversations of the motivation curve."""
    add_plan_options(parser, run=False)
    parser.set_defaults(corpus=None)
    text = parser.add_argument_group("conversations")
    text.add_argument("--samples", type=values.count(), metavar="N", help="how many (default: 128; smollm2: 8)")
    text.add_argument(
        "--tokens", type=values.count(), metavar="T", help="of one, at most (default: 1024; smollm2: 128)"
    )


def needle_options(parser: argparse.ArgumentParser) -> None:
    """Which finished grids to draw."""
    parser.add_argument("--model", type=values.name, required=True, metavar="NAME", help="for example smollm2-135m")
    parser.add_argument("--dtype", type=values.name, metavar="NAME", help="only runs computed in this dtype")
    parser.add_argument("--device", type=values.name, metavar="cpu|cuda", help="only runs on this kind of device")
    parser.add_argument("--lengths", type=values.several(values.count()), metavar="TOKENS,…",
                        help="only runs with these lengths")  # fmt: skip
