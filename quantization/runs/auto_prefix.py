"""`--prefix auto` and the program behind it: PrefixQuant's discovery on a checkpoint, done once and kept.

A discovery lies beside the model's prefixes, modelzoo/prefixes/MODEL/auto-IDENTITY.json. Its identity is that of the
dense checkpoint, the text's tokens, [BOS] and the threshold: where it computes and in which dtype is left out on
purpose, so that all runs of a model agree on one prefix.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corpora.catalog import CalibrationText, model_defaults
from corpora.errors import UserError
from quantization.programs.options import add_dtype_option, add_model_options

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantization.runs.plan import Checkpoint

__all__ = ["DESCRIPTION", "Found", "Search", "add_options", "default_search", "discover_prefix", "find"]

DESCRIPTION = """\
Find the prefix that `--prefix auto` stands for, PrefixQuant's: the tokens whose inputs of down_proj exceed the
threshold times the median, most frequent first, then [BOS]. Needs the dense full-precision model once; the result is
kept beside the model's prefixes and found again. Prints the tokens, and per block the largest ratio of a token to the
median before the prefix and behind it.
"""
PUBLISHED = CalibrationText("pile", 64, 512)  # PrefixQuant's; random pieces of it
SEED = 2  # PrefixQuant's

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """What is looked at: pieces of a text, drawn with a seed, and η."""

    text: CalibrationText
    seed: int = SEED
    threshold: float = 64.0


@dataclass(frozen=True)
class Found:
    """A discovery as it is kept. number, position_0, counts: see intactkv.pivots.OutlierTokens; counts: (id, count),
    the most frequent first. ratios: per block, without a prefix; behind: the same text behind the prefix, None as long
    as nobody looked."""

    prefix: tuple[int, ...]
    number: int
    position_0: int
    counts: tuple[tuple[int, int], ...]
    ratios: tuple[float, ...]
    behind: tuple[float, ...] | None
    made_of: dict[str, Any]
    file: Path

    def write(self) -> None:
        """Keep it in its file."""
        from corpora.storage import write_json

        write_json(self.file, {
            "prefix": list(self.prefix), "number": self.number, "position_0": self.position_0,
            "counts": [list(pair) for pair in self.counts], "ratios": list(self.ratios),
            "behind": None if self.behind is None else list(self.behind), "made_of": self.made_of,
        })  # fmt: skip


def default_search(name: str, corpus: str | None, context: int | None) -> Search:
    """What `auto` looks at for a model: 64 × 512 tokens of its own calibration corpus, or of the Pile.

    corpus: in its place. context: positions of the model; pieces take at most half of them.
    """
    own = model_defaults(name).default_calibration or PUBLISHED
    length = PUBLISHED.length if context is None else min(PUBLISHED.length, context // 2)
    return Search(CalibrationText(corpus or own.corpus, PUBLISHED.samples, length))


def pieces(search: Search, tokenizer: "PreTrainedTokenizerBase") -> "Tensor":
    """The text that is looked at, (samples, length), without [BOS]. Raises UserError if it is not there."""
    from corpora.text import calibration_segments

    text = search.text
    return calibration_segments(
        tokenizer, text.corpus, samples=text.samples, length=text.length, seed=search.seed, bos_first=False
    )


def find(
    checkpoint: "Checkpoint",
    tokenizer: "PreTrainedTokenizerBase",
    search: Search,
    open_dense: Callable[[Path], "PreTrainedModel"],
    advance: Callable[[int], Any] = lambda rows: None,
) -> Found:
    """The discovery of a model, from its file or made now.

    open_dense: loads a dense checkpoint; only called if there is no file. advance: told how many pieces are done.
    Raises UserError if the text is not there, or the dense checkpoint of a quantized one is not at hand.
    """
    from corpora.paths import modelzoo_dir
    from corpora.storage import identity, sha256_of_tensor
    from corpora.text import start_token_id
    from intactkv.discover import discover

    ids, start = pieces(search, tokenizer), start_token_id(tokenizer)
    key = {"source": checkpoint.fingerprint, "text": sha256_of_tensor(ids), "start": start,
           "threshold": search.threshold}  # fmt: skip
    file = modelzoo_dir() / "prefixes" / checkpoint.family_name / f"auto-{identity(key)}.json"
    if file.is_file():
        return _read(file)
    log.info("discovering the prefix of %s on %d × %d tokens of %s", checkpoint.family_name, *ids.shape,
             search.text.corpus)  # fmt: skip
    model = open_dense(dense_directory(checkpoint))
    outcome = discover(model, ids, start, threshold=search.threshold, linear=_down(model), advance=advance)
    described = {"corpus": _name(search.text.corpus), "samples": len(ids), "length": ids.shape[1], "seed": search.seed}
    found = Found(
        prefix=outcome.prefix,
        number=outcome.outliers.number,
        position_0=outcome.outliers.first,
        counts=tuple(outcome.outliers.ids.items()),
        ratios=outcome.ratios,
        behind=None,
        made_of={**key, "drawn": described, "dtype": str(model.dtype).removeprefix("torch.")},
        file=file,
    )
    found.write()
    words = [tokenizer.decode([token]) for token in found.prefix]
    log.info("the prefix is %s %s: %s", list(found.prefix), words, file)
    return found


def dense_directory(checkpoint: "Checkpoint") -> Path:
    """The dense checkpoint that outlier tokens are looked for in. Raises UserError if it is not at hand."""
    from corpora.storage import checkpoint_fingerprint
    from quantization.runs.checkpoint import read_config

    directory, manifest = checkpoint.directory, checkpoint.manifest
    if manifest is not None:
        dense = directory.parent / manifest["source"]["directory"]
        there = (dense / "config.json").is_file() and checkpoint_fingerprint(dense) == checkpoint.fingerprint
    else:
        config, dense = read_config(directory), directory
        there = not any(hasattr(config, name) for name in ("quantization_config", "intactkv"))
    if not there:
        raise UserError(
            f"--prefix auto looks for outlier tokens in the dense full-precision model of {directory}, which is not at "
            "hand; do it where that is (python -m intactkv discover --model DENSE_DIR), or give a prefix that was "
            "built there: --prefix FILE.safetensors"
        )
    return dense


def _read(file: Path) -> Found:
    """A discovery from its file. Raises UserError if it is damaged."""
    from corpora.storage import read_json

    content = read_json(file, "the discovery")
    try:
        behind = content["behind"]
        return Found(
            prefix=tuple(int(token) for token in content["prefix"]),
            number=int(content["number"]),
            position_0=int(content["position_0"]),
            counts=tuple((int(token), int(count)) for token, count in content["counts"]),
            ratios=tuple(map(float, content["ratios"])),
            behind=None if behind is None else tuple(map(float, behind)),
            made_of=dict(content["made_of"]),
            file=file,
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file} is no discovery of a prefix; delete it to discover again") from None


def _down(model: "PreTrainedModel") -> str:
    """Name within a block of the feed-forward part's last linear."""
    from intactkv.architecture import architecture_of

    return architecture_of(model.config).linears[-1][-1]


def _name(corpus: str) -> str:
    """A corpus' name, or a file's without its directory."""
    return Path(corpus).name if Path(corpus).exists() else corpus


# The program ----------------------------------------------------------------------------------------------------------


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `discover`."""
    add_model_options(command)
    add_dtype_option(command)
    text = command.add_argument_group("text")
    text.add_argument(
        "--corpus", metavar="NAME|FILE", help="random pieces of which text (default: the model's own, or pile)"
    )
    text.add_argument("--samples", type=int, metavar="N", help="pieces (default: 64)")
    text.add_argument("--length", type=int, metavar="T",
                      help="tokens of a piece (default: 512, at most half the model's positions)")  # fmt: skip
    text.add_argument("--seed", type=int, default=SEED, metavar="S", help="of the draw (default: %(default)s)")
    command.add_argument(
        "--threshold", type=float, default=64.0, metavar="R", help="an outlier exceeds R × the median (default: 64)"
    )
    command.add_argument("--ablate", type=int, metavar="N", help="look behind the first N tokens of the prefix only")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write the prefix, too (*.safetensors), for --prefix FILE; what "
        "--prefix auto finds needs none"
    )  # fmt: skip


def discover_prefix(options: argparse.Namespace) -> None:
    """Discover, look behind the prefix, print both."""
    from tqdm import tqdm

    from intactkv.discover import down_maxima, largest_ratios
    from intactkv.prefix import Prefix, build_prefix
    from quantization.programs.options import chosen_device, chosen_dtype, show_log
    from quantization.recipes.recipe import Recipe
    from quantization.runs.plan import find_checkpoint, plan_run

    show_log()
    if options.out is not None and options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: a prefix file ends in .safetensors")
    if options.out is not None and options.out.exists():
        Prefix.load(options.out)  # replaces an older prefix, and refuses to replace anything else
    plan = plan_run(
        dense_directory(find_checkpoint(options.model)),
        Recipe(),
        device=chosen_device(options.device),
        dtype=chosen_dtype(options.dtype),
    )
    search = default_search(plan.checkpoint.family_name, options.corpus, plan.context)
    text = replace(
        search.text,
        samples=search.text.samples if options.samples is None else options.samples,
        length=search.text.length if options.length is None else options.length,
    )
    if plan.context is not None and 2 * text.length > plan.context:
        raise UserError(
            f"--length {text.length}: pieces take at most half of the {plan.context} positions of "
            f"{plan.checkpoint.name}; use {plan.context // 2} or fewer"
        )
    if options.ablate is not None and options.ablate < 1:
        raise UserError(f"--ablate {options.ablate}: give 1 token or more, or leave it out")
    search = Search(text, options.seed, options.threshold)
    loaded: list[PreTrainedModel] = []

    def dense(_directory: Path) -> "PreTrainedModel":
        if not loaded:
            loaded.append(plan.load().model)
        return loaded[0]

    with tqdm(total=2 * text.samples, desc="outlier tokens", unit="piece") as bar:
        found = find(plan.checkpoint, plan.tokenizer, search, dense, bar.update)
        kept = found.prefix if options.ablate is None else found.prefix[: options.ablate]
        behind = found.behind if kept == found.prefix else None
        if behind is None or options.out is not None:
            model = dense(plan.checkpoint.directory)
            prefix = build_prefix(model, kept)
            if behind is None:
                ids = pieces(search, plan.tokenizer)
                behind = largest_ratios(down_maxima(model, ids, prefix, linear=_down(model), advance=bar.update))
            if kept == found.prefix and found.behind is None:
                replace(found, behind=behind).write()
            if options.out is not None:
                prefix.save(options.out)
        bar.update(bar.total - bar.n)
    print(_table(found, kept, behind, plan.tokenizer))
    print(options.out or found.file)


def _table(found: Found, kept: tuple[int, ...], behind: tuple[float, ...], tokenizer: Any) -> str:
    """Tokens and ratios, to be read."""

    def word(token: int) -> str:
        return repr(tokenizer.decode([token]))

    drawn, threshold = found.made_of["drawn"], found.made_of["threshold"]
    lines = [
        f"{drawn['samples']} × {drawn['length']} tokens of {drawn['corpus']}, outliers above {threshold:g} × median: "
        f"o = {found.number} per sequence; position 0, apart, {found.position_0} times",
        "",
        f"{'id':>7}  {'token':<16}  {'count':>6}",
        *(f"{token:>7}  {word(token):<16}  {count:>6}" for token, count in found.counts[:10]),
        "",
        f"prefix: {list(kept)}  {' '.join(map(word, kept))}",
        "",
        f"{'block':>7}  {'largest ratio':>13}  {'behind it':>9}",
        *(f"{i:>7}  {a:>13.1f}  {b:>9.1f}" for i, (a, b) in enumerate(zip(found.ratios, behind, strict=True))),
        f"{'all':>7}  {max(found.ratios):>13.1f}  {max(behind):>9.1f}",
    ]
    return "\n".join(lines)
