"""PrefixQuant's outlier tokens: how many per layer and per sequence, at which positions, and which tokens.

A token is an outlier of a layer if its token-wise maximum is more than η times the median over the tokens of its
sequence (intactkv/pivots.py). Departs from the published code: all four figures look at the detector's own tensor, the
input of the feed-forward part's last linear, and its own η, and behind a prefix they leave out the prefix's tokens and
no others.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator
from torch import Tensor

from corpora.errors import UserError
from eval.plots.canvas import GREY, INTACT, VANILLA, Output, literal, plt
from eval.plots.subject import Arm, Subject, token_name
from intactkv.architecture import DOWN_PROJ
from intactkv.observe import BLOCK_OUTPUT, down_input, token_maxima
from intactkv.pivots import OutlierTokens, outlier_ratios, outlier_tokens

__all__ = ["OBJECTS", "Detector", "draw_outlier_content", "draw_outlier_count", "draw_outlier_layers",
           "draw_outlier_position", "shares"]  # fmt: skip

OBJECTS = (DOWN_PROJ, "hidden_state")
OTHERS = "others"


@dataclass(frozen=True)
class Detector:
    """Whose token-wise maxima count, and from which ratio to the median on (η)."""

    tensor: str
    threshold: float

    def __post_init__(self) -> None:
        if self.tensor not in OBJECTS:
            raise UserError(f"--outlier-object {self.tensor} is not known; choose {' or '.join(OBJECTS)}")
        if not self.threshold > 1:
            raise UserError(f"--outlier-threshold {self.threshold:g}: a ratio to the median has to exceed 1")

    @property
    def rule(self) -> str:
        """What is looked at, in words for the figure."""
        tensor = f"input of {DOWN_PROJ}" if self.tensor == DOWN_PROJ else "output of the block"
        return f"outlier: max |{tensor}| of a token above {self.threshold:g} × the median over tokens"

    def maxima(self, subject: Subject, arm: Arm, advance: Callable[[int], Any]) -> Tensor:
        """Token-wise maxima of an arm: (L, N, T)."""
        site = down_input(subject.architecture) if self.tensor == DOWN_PROJ else BLOCK_OUTPUT
        return token_maxima(arm.model, arm.ids, (site,), advance=advance)[site.name]


def shares(counts: Counter[str], most: int) -> list[tuple[str, int, float]]:
    """The `most` most common values with their count and percentage, then what is left as `others`, if anything is.

    Equally frequent values come in the order in which they were counted.
    """
    total = counts.total()
    common = counts.most_common(most)
    if rest := total - sum(count for _, count in common):
        common.append((OTHERS, rest))
    return [(value, count, 100 * count / total) for value, count in common]


def draw_outlier_layers(subject: Subject, detector: Detector, output: Output) -> None:
    """Mean number of outlier tokens per sequence, layer by layer."""
    found = _maxima(subject, detector)
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    rows: list[tuple[Any, ...]] = []
    for arm, maxima, colour, marker in zip(subject.arms, found, _colours(subject), ("o", "s"), strict=False):
        means = (outlier_ratios(maxima) > detector.threshold).sum(dim=-1).double().mean(dim=-1)
        axes.plot(means.numpy(), color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=arm.title)
        rows += [(arm.label, layer, f"{mean:.6g}") for layer, mean in enumerate(means.tolist())]
    axes.set_xlabel("block")
    axes.set_ylabel("mean number of outlier tokens\nper sequence")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(subject.arms) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{subject.caption}\n{detector.rule}", fontsize=9)
    output.save(figure, ("prefix", "block", "mean number of outlier tokens"), rows)


def draw_outlier_count(subject: Subject, detector: Detector, output: Output) -> None:
    """Outlier tokens of a sequence, in the layer that has most: how many sequences have how many."""

    def counted(_arm: Arm, maxima: Tensor) -> Counter[str]:
        largest = (outlier_ratios(maxima) > detector.threshold).sum(dim=-1).amax(dim=0)
        return Counter(str(count) for count in largest.tolist())

    _bars(subject, detector, counted, 3, "outlier tokens in a sequence\n(largest over blocks)", "sequences", output)


def draw_outlier_position(subject: Subject, detector: Detector, output: Output) -> None:
    """Positions of all outlier tokens of all layers and sequences, the prefix counted."""

    def counted(arm: Arm, maxima: Tensor) -> Counter[str]:
        places = (outlier_ratios(maxima) > detector.threshold).nonzero()[:, 2] + arm.start
        return Counter(str(place) for place in sorted(places.tolist()))

    _bars(subject, detector, counted, 2, "position of the token", "outliers (blocks × sequences)", output)


def draw_outlier_content(subject: Subject, detector: Detector, output: Output) -> None:
    """The outlier tokens themselves, position 0 apart: any first token becomes one, whatever it says."""

    def counted(arm: Arm, maxima: Tensor) -> Counter[str]:
        tokens = _tokens(arm, maxima, detector)
        counts: Counter[str] = Counter()
        for token, count in tokens.ids.items():  # different ids can read the same
            counts[f"'{token_name(subject.tokenizer, token)}'"] += count
        return counts

    def note(arm: Arm, maxima: Tensor) -> str:
        tokens = _tokens(arm, maxima, detector)
        apart = "" if arm.start else f"; position 0 apart: {tokens.first} times"
        return f"outlier tokens per sequence: o = {tokens.number}{apart}"

    _bars(subject, detector, counted, 5, "token", "outliers (blocks × sequences)", output, note)


def _tokens(arm: Arm, maxima: Tensor, detector: Detector) -> OutlierTokens:
    return outlier_tokens(maxima, arm.ids, detector.threshold, arm.start)


def _maxima(subject: Subject, detector: Detector) -> list[Tensor]:
    """Token-wise maxima of every arm."""
    with subject.progress("outlier tokens") as bar:
        return [detector.maxima(subject, arm, bar.update) for arm in subject.arms]


def _colours(subject: Subject) -> Sequence[str]:
    """The colours of the arms: without an intact prefix, behind one."""
    return [INTACT if arm.start else VANILLA for arm in subject.arms]


def _bars(
    subject: Subject, detector: Detector, counted: Callable[[Arm, Tensor], Counter[str]], most: int, what: str,
    of: str, output: Output, note: Callable[[Arm, Tensor], str] | None = None,
) -> None:  # fmt: skip
    """A panel per arm: the most common values and all others, in per cent and, in brackets, how many they are."""
    found = _maxima(subject, detector)
    arms = subject.arms
    figure, panels = plt.subplots(
        1, len(arms), figsize=(max(4.8 * len(arms), 5.6), 3.9), squeeze=False, sharey=True, layout="constrained"
    )
    rows: list[tuple[Any, ...]] = []
    for axes, arm, maxima, colour in zip(panels[0], arms, found, _colours(subject), strict=True):
        bars = shares(counted(arm, maxima), most)
        names = [name for name, _, _ in bars]
        if bars:
            colours = [GREY if name == OTHERS else colour for name in names]
            drawn = axes.bar(range(len(bars)), [percent for _, _, percent in bars], width=0.6, color=colours)
            axes.bar_label(drawn, [f"{percent:.1f} % ({count})" for _, count, percent in bars], fontsize=8, padding=2)
        else:
            where = "" if note is None or arm.start else " behind position 0"
            axes.text(0.5, 0.5, f"no outlier token{where}", transform=axes.transAxes, ha="center", color=GREY)
        long = max(map(len, names), default=0) > 8
        axes.set_xticks(
            range(len(names)), map(literal, names), rotation=25 if long else 0, ha="right" if long else "center"
        )
        axes.set_xlim(-0.7, max(len(names), 1) - 0.3)
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.set_xlabel(what)
        title = [arm.title, note(arm, maxima) if note else ""]
        axes.set_title("\n".join(line for line in title if line), fontsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
        rows += [(arm.label, name, count, f"{percent:.6g}") for name, count, percent in bars]
    panels[0][0].set_ylabel(f"% of {of}")
    figure.suptitle(f"{subject.caption}\n{detector.rule}", fontsize=9)
    output.save(figure, ("prefix", what.partition("\n")[0], "count", "percent"), rows)
