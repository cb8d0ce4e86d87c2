"""Perplexity against the bits that an element of the KV cache takes, for every policy, without and behind a prefix."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.ticker import FuncFormatter

from corpora.errors import UserError
from eval.plots.canvas import BEHIND, GREY, INTACT, ORANGE, VANILLA, Output, literal, plt
from eval.tables.perplexities import Row

__all__ = ["draw"]

# Okabe and Ito's purple, sky blue and yellow-brown behind the other figures' four colours; a marker each.
STYLES = tuple(zip((INTACT, VANILLA, BEHIND, ORANGE, "#cc79a7", "#56b4e9", "#8c6d31", "0.2"), "osD^vP*X", strict=True))
FULL = "16"
LARGEST_RATIO = 12  # of the axis: what is worse is no text any more


def draw(rows: Sequence[Row], prefix: str, output: Output) -> None:
    """Draw rows of one protocol, model, corpus and kind of weights: a dashed line with open marks for every policy
    without an intact prefix, a full one with filled marks behind it, bits apart.

    prefix: the one to draw, of several. Raises UserError for rows that mix the others, and without a KV policy.
    """
    for what in ("caption", "model", "corpus"):
        found = sorted({str(getattr(row, what)) for row in rows})
        if len(found) > 1:
            raise UserError(
                f"one figure shows one {what}, but the runs have {len(found)}: {'; '.join(found)}; narrow them down "
                "with --corpus, --window and --limit"
            )
    policies: dict[str, list[Row]] = {}
    for row in rows:
        if row.cache is not None:
            policies.setdefault(_policy(row), []).append(row)
    if not policies:
        raise UserError("no run on record has a KV policy and says its bits; run python -m eval ppl with --kv first")
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    table = []
    for number, (policy, mine) in enumerate(sorted(policies.items())):
        colour, marker = STYLES[number % len(STYLES)]
        mine = sorted(mine, key=_bits)
        for intact in (False, True):
            arm = [(row, (row.intact if intact else row.vanilla).perplexity) for row in mine if row.prefix == prefix]
            places = [(_bits(row), perplexity) for row, perplexity in arm if perplexity is not None]
            table += [
                (policy, row.kv, row.prefix if intact else "none", f"{_bits(row):.4f}", perplexity)
                for row, perplexity in arm
                if perplexity is not None
            ]
            if places:
                axes.plot(
                    *zip(*places, strict=True), color=colour, marker=marker, markersize=6, linewidth=1.2,
                    linestyle="-" if intact else "--", markerfacecolor=colour if intact else "white",
                    label=literal(policy) if intact or all(row.intact.perplexity is None for row in mine) else None,
                )  # fmt: skip
    full = [row.vanilla.perplexity for row in rows if row.kv == FULL and row.vanilla.perplexity is not None]
    if full:
        axes.axhline(full[0], color=GREY, linewidth=0.8, linestyle=":")
        axes.text(0.01, full[0], "full-precision cache", color=GREY, fontsize=8, va="top", ha="left",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        table.append((FULL, FULL, "none", "16", full[0]))
    axes.set_yscale("log")
    shown = [float(line[-1]) for line in table]
    highest = LARGEST_RATIO * min(shown)
    if max(shown) > highest:
        axes.set_ylim(top=highest)
    axes.set_ylim(bottom=min(shown) / 1.25)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FuncFormatter(lambda perplexity, _: "" if f"{perplexity:g}"[0] in "789" else f"{perplexity:g}"))
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_xlabel("bits that an element of the KV cache takes, scales and exact tokens included")
    axes.set_ylabel(f"perplexity on {rows[0].corpus} (log scale)")
    axes.set_title(
        f"{rows[0].model}, weights {rows[0].weights}: {rows[0].caption}\n"
        f"filled: behind the intact prefix {literal(prefix)}; open: without"
        + (f"; above {highest:.0f}: only in the CSV" if max(shown) > highest else ""),
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    output.save(figure, ("policy", "KV", "prefix", "bits an element", "perplexity"), table)


def _policy(row: Row) -> str:
    """The policy without its bits: `2g32 kivi final` is `g32 kivi final`."""
    return row.kv.lstrip("0123456789,").strip()


def _bits(row: Row) -> float:
    assert row.cache is not None
    return fmean(row.cache["bits_per_element"])
