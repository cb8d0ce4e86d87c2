"""Tables of finished runs: every setting's vanilla arm beside its IntactKV arm.

Figures of different protocols, windows or dtypes never share a table. Both arms score the same windows, so the change
carries a standard error from the windows' paired differences d: exp(mean d) − 1 ± exp(mean d) · sd(d) / √W.
Weights that were calibrated behind the prefix are a third arm: the same recipe but for that switch.
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

__all__ = [
    "ARMS",
    "BEHIND_COLUMNS",
    "HEAD",
    "Arm",
    "Row",
    "behind_of",
    "figures_of",
    "perplexity_rows",
    "print_table",
    "render",
]


@dataclass(frozen=True)
class Arm:
    """One way to run a setting: its perplexity, and the relative change against vanilla with the standard error over
    windows; None where there is nothing to compare with (or, for the error, only one window)."""

    perplexity: float | None = None
    change: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Row:
    """One setting: without the intact prefix, with it, and with weights calibrated behind it. Arms that were not run
    have no perplexity. cost: of quantizing (bits per weight, seconds, MB), where it is known."""

    caption: str
    model: str
    weights: str
    kv: str
    corpus: str
    prefix: str
    identity: str
    vanilla: Arm
    intact: Arm
    behind: Arm = Arm()
    cost: dict[str, Any] | None = None

    @property
    def visible(self) -> tuple[str, ...]:
        """What a reader of the table can tell rows apart by."""
        return self.caption, self.model, self.weights, self.kv, self.corpus, self.prefix


def kv_label(kv: dict[str, Any] | None) -> str:
    """`16` for a full-precision cache, else the bits and the policy's class."""
    return "16" if kv is None else f"{kv['bits']} {kv['kind']}"


def perplexity_rows(records: Iterable[dict[str, Any]]) -> list[Row]:
    """Join the records of all arms into rows; of several runs of one arm the newest counts.

    Arms belong together if the same weights (but for calibrating behind the prefix) and the same KV policy scored the
    same tokens, whatever their labels say.
    """
    cells: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        s = record["settings"]
        arm = "behind" if _is_behind(s) else "intact" if s["prefix"]["intact"] else "vanilla"
        cells.setdefault((_caption(s), _setting(s)), {})[arm] = record
    order = {key: i for i, key in enumerate(cells)}
    rows = [_row(cells[key]) for key in sorted(cells, key=lambda key: (key[0], order[key]))]
    # Settings that differ only where no column shows it (a convention, a text prefix) get their identity as a name.
    seen = Counter(row.visible for row in rows)
    return [replace(row, weights=f"{row.weights}-{row.identity}") if seen[row.visible] > 1 else row for row in rows]


def _is_behind(settings: dict[str, Any]) -> bool:
    return bool(settings["made_of"].get("calibrate_behind_prefix"))


def _setting(settings: dict[str, Any]) -> str:
    """Identity of what the arms of a row share."""
    arm = ("calibrate_behind_prefix", "prefix")
    made_of = {key: value for key, value in settings["made_of"].items() if key not in arm}
    return identity({"made_of": made_of, "kv": settings["kv"], "tokens": settings["tokens_sha256"]})


def _caption(settings: dict[str, Any]) -> str:
    limit = "all" if settings["limit"] is None else settings["limit"]
    return (
        f"protocol {settings['protocol']}, window {settings['window']}, windows {limit}, {settings['dtype']} on "
        f"{settings['device']}"
    )


def _row(arms: dict[str, dict[str, Any]]) -> Row:
    vanilla = arms.get("vanilla")
    first = arms.get("intact") or arms.get("behind") or arms["vanilla"]
    s = first["settings"]
    label = s["prefix"]["label"]
    if label == "none" and PROTOCOLS[s["protocol"]].bos_in_every_window:
        label = "[B]"  # every window starts with [BOS] anyway: the vanilla arm of [B]
    return Row(
        caption=_caption(s),
        model=s["model"],
        weights=s["weights"].removesuffix("-behind"),
        kv=kv_label(s["kv"]),
        corpus=s["corpus"],
        prefix=label,
        identity=_setting(s),
        vanilla=Arm(vanilla["perplexity"]) if vanilla else Arm(),
        intact=_arm(arms.get("intact"), vanilla),
        behind=_arm(arms.get("behind"), vanilla),
        cost=next((arm["quantization"] for arm in arms.values() if arm.get("quantization")), None),
    )


def _arm(record: dict[str, Any] | None, vanilla: dict[str, Any] | None) -> Arm:
    """An arm beside the vanilla one."""
    if record is None or vanilla is None:
        return Arm(record["perplexity"]) if record else Arm()
    ratio = record["perplexity"] / vanilla["perplexity"]
    differences = [b - a for a, b in zip(vanilla["window_nll"], record["window_nll"], strict=True)]
    error = ratio * stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return Arm(record["perplexity"], ratio - 1, error)


HEAD = ("model", "weights", "KV bits", "corpus", "prefix")
ARMS = ("vanilla", "IntactKV", "change", "standard error")
BEHIND_COLUMNS = ("calibrated behind", "change", "standard error")
COSTS = ("bits per weight", "quantizing, s", "quantizing, MB")


def render(rows: list[Row], style: str, costs: bool = False) -> str:
    """Rows as text: `markdown` (a table per protocol, under its caption) or `csv` (one table, caption as a column).

    The third arm and the costs (if wanted) get columns where a row has them.
    """
    if style == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("protocol", *HEAD, *ARMS, *(f"behind: {name}" for name in BEHIND_COLUMNS), *COSTS))
        for row in rows:
            figures = [*figures_of(row), *behind_of(row), *_costs(row)]
            writer.writerow((*row.visible, *("" if x is None else f"{x:.6g}" for x in figures)))
        return out.getvalue()
    parts = []
    for caption in dict.fromkeys(row.caption for row in rows):
        mine = [row for row in rows if row.caption == caption]
        behind = any(row.behind.perplexity is not None for row in mine)
        costly = costs and any(row.cost for row in mine)
        head = (*HEAD, *ARMS, *(BEHIND_COLUMNS if behind else ()), *(COSTS if costly else ()))
        cells = []
        for row in mine:
            vanilla, intact, change, error = figures_of(row)
            line = [*row.visible[1:], _figure(vanilla), _figure(intact), _percent(change, "+"), _percent(error)]
            if behind:
                perplexity, change, error = behind_of(row)
                line += [_figure(perplexity), _percent(change, "+"), _percent(error)]
            if costly:
                bits, seconds, memory = _costs(row)
                line += ["n/a" if bits is None else f"{bits:.2f}"]
                line += ["n/a" if x is None else f"{x:.0f}" for x in (seconds, memory)]
            cells.append(tuple(line))
        parts.append(f"Perplexity ({caption})\n\n{_aligned([head, *cells])}")
    return "\n\n".join(parts) + "\n"


def figures_of(row: Row) -> tuple[float | None, ...]:
    """What stands under `ARMS`."""
    return row.vanilla.perplexity, row.intact.perplexity, row.intact.change, row.intact.error


def behind_of(row: Row) -> tuple[float | None, ...]:
    """What stands under `BEHIND_COLUMNS`."""
    return row.behind.perplexity, row.behind.change, row.behind.error


def _costs(row: Row) -> tuple[float | None, ...]:
    return tuple((row.cost or {}).get(key) for key in ("bits_per_weight", "seconds", "peak_memory_mb"))


def _percent(value: float | None, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}.1%}"


def _figure(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """A Markdown table whose source is aligned, too: words to the left, figures to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [i >= len(HEAD) for i in range(len(widths))]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    text = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], rule, *text[1:]])


def print_table(rows: list[Row], style: str = "markdown", costs: bool = False) -> None:
    """Print the rows on stdout."""
    print(render(rows, style, costs), end="")
