"""Tables of finished runs: every setting's vanilla arm beside its IntactKV arm.

Figures of different protocols, windows or dtypes never share a table. Both arms score the same windows, so the change
carries a standard error from the windows' paired differences d: exp(mean d) − 1 ± exp(mean d) · sd(d) / √W.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import stdev
from typing import Any

from corpora.storage import identity
from corpora.text import PROTOCOLS

__all__ = ["Row", "perplexity_rows", "print_table", "render"]


@dataclass(frozen=True)
class Row:
    """One setting: perplexity without and with the intact prefix, and the relative change with its standard error over
    windows; None where no run exists (or, for the error, where there is only one window)."""

    caption: str
    model: str
    weights: str
    kv: str
    corpus: str
    prefix: str
    identity: str
    vanilla: float | None
    intact: float | None
    change: float | None = None
    error: float | None = None

    @property
    def visible(self) -> tuple[str, ...]:
        """What a reader of the table can tell rows apart by."""
        return self.caption, self.model, self.weights, self.kv, self.corpus, self.prefix


def kv_label(kv: dict[str, Any] | None) -> str:
    """`16` for a full-precision cache, else the bits and the policy's class."""
    return "16" if kv is None else f"{kv['bits']} {kv['kind']}"


def perplexity_rows(records: Iterable[dict[str, Any]]) -> list[Row]:
    """Join the records of both arms into rows; of several runs of one arm the newest counts.

    Two arms belong together if the same weights and KV policy scored the same tokens, whatever their labels say.
    """
    cells: dict[tuple[str, ...], dict[bool, dict[str, Any]]] = {}
    for record in records:
        s = record["settings"]
        same = identity({"made_of": s["made_of"], "kv": s["kv"], "tokens": s["tokens_sha256"]})
        cells.setdefault((_caption(s), same), {})[s["prefix"]["intact"]] = record
    order = {key: i for i, key in enumerate(cells)}
    rows = [_row(cells[key]) for key in sorted(cells, key=lambda key: (key[0], order[key]))]
    # Settings that differ only where no column shows it (a convention, a text prefix) get their identity as a name.
    seen = Counter(row.visible for row in rows)
    return [replace(row, weights=f"{row.weights}-{row.identity}") if seen[row.visible] > 1 else row for row in rows]


def _caption(settings: dict[str, Any]) -> str:
    limit = "all" if settings["limit"] is None else settings["limit"]
    return (
        f"protocol {settings['protocol']}, window {settings['window']}, windows {limit}, {settings['dtype']} on "
        f"{settings['device']}"
    )


def _row(arms: dict[bool, dict[str, Any]]) -> Row:
    vanilla, intact = arms.get(False), arms.get(True)
    s = (intact or arms[False])["settings"]
    label = s["prefix"]["label"]
    if label == "none" and PROTOCOLS[s["protocol"]].bos_in_every_window:
        label = "[B]"  # every window starts with [BOS] anyway: the vanilla arm of [B]
    row = Row(
        caption=_caption(s),
        model=s["model"],
        weights=s["weights"],
        kv=kv_label(s["kv"]),
        corpus=s["corpus"],
        prefix=label,
        identity=identity({"made_of": s["made_of"], "kv": s["kv"], "tokens": s["tokens_sha256"]}),
        vanilla=vanilla["perplexity"] if vanilla else None,
        intact=intact["perplexity"] if intact else None,
    )
    if vanilla is None or intact is None:
        return row
    ratio = intact["perplexity"] / vanilla["perplexity"]
    differences = [b - a for a, b in zip(vanilla["window_nll"], intact["window_nll"], strict=True)]
    error = ratio * stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return replace(row, change=ratio - 1, error=error)


HEAD = ("model", "weights", "KV bits", "corpus", "prefix", "vanilla", "IntactKV", "change", "standard error")


def render(rows: list[Row], style: str) -> str:
    """Rows as text: `markdown` (a table per protocol, under its caption) or `csv` (one table, caption as a column)."""
    if style == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("protocol", *HEAD))
        for row in rows:
            writer.writerow(
                (
                    row.caption,
                    row.model,
                    row.weights,
                    row.kv,
                    row.corpus,
                    row.prefix,
                    *("" if x is None else f"{x:.6g}" for x in (row.vanilla, row.intact, row.change, row.error)),
                )
            )
        return out.getvalue()
    parts = []
    for caption in dict.fromkeys(row.caption for row in rows):
        cells = [
            (
                r.model,
                r.weights,
                r.kv,
                r.corpus,
                r.prefix,
                _figure(r.vanilla),
                _figure(r.intact),
                "n/a" if r.change is None else f"{r.change:+.1%}",
                "n/a" if r.error is None else f"{r.error:.1%}",
            )
            for r in rows
            if r.caption == caption
        ]
        parts.append(f"Perplexity ({caption})\n\n{_aligned([HEAD, *cells])}")
    return "\n\n".join(parts) + "\n"


def _figure(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """A Markdown table whose source is aligned, too: words to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [i >= len(widths) - 4 for i in range(len(widths))]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    text = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], rule, *text[1:]])


def print_table(rows: list[Row], style: str = "markdown") -> None:
    """Print the rows on stdout."""
    print(render(rows, style), end="")
