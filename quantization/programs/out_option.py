"""--out of the programs: what it must not name, before the work."""

import argparse
from pathlib import Path

__all__ = ["check_out"]

PREFIX_SUFFIX = ".safetensors"


def check_out(options: argparse.Namespace, kind: str, *more: Path) -> None:
    """Refuse an --out that must not be written, before the work (`corpora.targets`); without --out nothing. Raises
    UserError.

    kind: "directory" (a new one), "checkpoint" (a new one, or one of ours, which is gone on with), "prefix" and "kv"
    (replace an older prefix, or KV artefact, and nothing else), or the ending of a file: .pt (a new one), .csv
    (`check_written`), .jsonl (whose program knows its own). more: files that are written beside it.
    """
    from corpora.errors import UserError
    from corpora.targets import check_target, check_written, inputs_of

    out: Path | None = options.out
    if out is None:
        return
    reads = inputs_of(value for name, value in vars(options).items() if name != "out")
    if kind in ("directory", "checkpoint"):
        if check_target(out, directory=True, reads=reads):
            from quantization.runs.checkpoint import is_quantized

            if kind == "directory" or not is_quantized(out):
                raise UserError(f"--out {out} exists already; choose another directory or remove it")
        return
    suffix = PREFIX_SUFFIX if kind in ("prefix", "kv") else kind
    if out.suffix != suffix:
        ends = {"prefix": "a prefix file ends", "kv": "a KV artefact's file ends"}
        what = ends.get(kind, "give a file that ends")
        raise UserError(f"--out {out}: {what} in {suffix}")
    if kind == ".csv":
        check_written((out, *more), reads)
        return
    there = check_target(out, reads=reads)
    for file in more:
        if check_target(file, reads=reads) and kind == "prefix" and not there:
            raise UserError(f"--out {out} would replace {file}, which belongs to no prefix; move it, or name another")
    if kind == "prefix" and there:
        from intactkv.prefix import Prefix

        try:
            Prefix.load(out)
        except UserError:
            raise UserError(f"--out {out} is there and no whole prefix file; remove it, or name another") from None
    if kind == "kv" and there:
        from quantization.runs.kv_artefact import KVArtefact

        try:
            KVArtefact.load(out)
        except UserError:
            raise UserError(f"--out {out} is there and no whole KV artefact; remove it, or name another") from None
    if kind == ".pt" and there:
        raise UserError(f"--out {out} exists already; name another file or remove it")
