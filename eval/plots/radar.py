"""Scores per category as a radar chart: one spoke a category, one line a model."""

import math
from collections.abc import Collection, Mapping

from corpora.errors import UserError
from eval.plots.canvas import GREY, SERIES, Output, literal, plt

__all__ = ["check_categories", "draw"]

HIGHEST = 10.0  # of a judge's grade
STYLES = ("-", "--", ":", "-.")  # when there are more models than colours
THIN, THICK = 1.2, 5.0  # points: lines below are thicker, so that none is hidden where grades are equal


def check_categories(categories: Collection[str]) -> None:
    """Raise UserError for fewer than three categories: they span no area."""
    if len(categories) < 3:
        raise UserError(
            f"a radar chart needs at least 3 categories, these scores have {len(categories)}: leave --plot out"
        )


def draw(scores: Mapping[str, Mapping[str, float | None]], output: Output, title: str = "") -> None:
    """Draw and write the chart and its numbers.

    scores: the mean grade, 0 to 10, by model and category; None where nothing was scored, which leaves a gap in the
    line. Raises UserError for fewer than three categories.
    """
    categories = list(dict.fromkeys(name for row in scores.values() for name in row))
    check_categories(categories)
    angles = [2 * math.pi * i / len(categories) for i in range(len(categories))]
    figure, axes = plt.subplots(figsize=(6.0, 5.6), subplot_kw={"projection": "polar"})
    axes.set(theta_offset=math.pi / 2, theta_direction=-1)  # the first spoke points up, the others follow clockwise
    for number, (model, row) in enumerate(scores.items()):
        values = [math.nan if (value := row.get(name)) is None else value for name in categories]
        colour, style = SERIES[number % len(SERIES)], STYLES[number // len(SERIES) % len(STYLES)]
        width = THICK - (THICK - THIN) * (number + 1) / len(scores)
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], style, color=colour, linewidth=width, marker="o",
            markersize=width + 1.8, label=literal(model),
        )  # fmt: skip
        axes.fill(angles, [0 if math.isnan(value) else value for value in values], color=colour, alpha=0.06)
    axes.set_ylim(0, HIGHEST)
    axes.set_yticks(range(2, int(HIGHEST) + 1, 2))
    axes.tick_params(axis="y", labelsize=7, labelcolor=GREY)
    axes.set_xticks(angles, categories, fontsize=9)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = round(math.sin(angle), 6)  # a word begins, or ends, at its spoke
        label.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
    if title:
        axes.set_title(title, fontsize=9, pad=18)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    rows = [(model, name, row.get(name)) for model, row in scores.items() for name in categories]
    output.save(figure, ("model", "category", "score"), rows)
