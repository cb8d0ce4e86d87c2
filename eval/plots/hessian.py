"""Who owns the Hessian: the first token's share of its trace, per block and set of linears, on a logarithmic axis."""

from matplotlib.ticker import FuncFormatter

from corpora.catalog import CalibrationText
from corpora.text import calibration_segments, corpus_label
from eval.inside.analysis import first_token_share
from eval.plots.canvas import SERIES, Output, plt
from eval.plots.subject import check_size
from quantization.runs.plan import Plan

__all__ = ["PUBLISHED", "draw_hessian"]

PUBLISHED = CalibrationText("c4", 16, 2048)  # enough of GPTQ's text for a picture
STARTS = {False: "text from anywhere, as published", True: "[BOS] in front of every piece"}


def draw_hessian(plan: Plan, text: CalibrationText, output: Output) -> None:
    """Run calibration text through the full-precision model and draw tr H's share of position 0, two starts beside
    each other. Raises UserError if the text is absent, too short, or does not fit the model."""
    check_size(plan, text, ("--calibration-samples", "--calibration-length"))
    corpus, samples, length = text.corpus, text.samples, text.length
    starts = {
        title: calibration_segments(plan.tokenizer, corpus, samples=samples, length=length, seed=42, bos_first=first)
        for first, title in STARTS.items()
    }
    model = plan.load().model
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), sharey=True)
    rows: list[tuple[object, ...]] = []
    for axes, (title, segments) in zip(panels, starts.items(), strict=True):
        shares = first_token_share(model, segments)
        for colour, (name, share) in zip(SERIES, shares.items(), strict=False):
            axes.plot(share.numpy(), color=colour, marker="o", markersize=3, linewidth=1.2, label=name)
            rows += [(title, name, block, f"{value:.6g}") for block, value in enumerate(share.tolist())]
        axes.axhline(1 / length, color="0.5", linewidth=0.8, linestyle="--")
        axes.annotate(f"an even share: 1/{length}", (0.99, 1 / length), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize=7.5, color="0.4")  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("block")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("the first token's share of tr H")
    figure.legend(
        *panels[0].get_legend_handles_labels(), ncols=len(SERIES), loc="lower center", bbox_to_anchor=(0.5, -0.07),
        frameon=False, fontsize=8,
    )  # fmt: skip
    size = f"{samples} × {length} tokens of {corpus_label(corpus)}"
    figure.suptitle(f"{plan.checkpoint.name}: Hessians of the inputs of …, {size}", fontsize=9)
    output.save(figure, ("start", "input of", "block", "share"), rows)
