"""The pivot itself: the largest activation of every token after every block, as a heat map with a logarithmic scale."""

from pathlib import Path

from matplotlib.colors import LogNorm

from corpora.catalog import model_defaults
from corpora.errors import UserError
from corpora.text import evaluation_stream, protocol
from eval.plots.canvas import VANILLA, plt, save
from intactkv.pivots import hidden_magnitudes
from quantization.loading import plan_run
from quantization.options import chosen_device
from quantization.recipe import named_recipe

__all__ = ["draw_pivots"]


def draw_pivots(model_directory: Path, corpus: str | None, tokens: int, device: str, path: Path) -> None:
    """Run the first `tokens` tokens of a corpus through the model and draw max |hidden state|, token by layer."""
    plan = plan_run(model_directory, named_recipe("fp16"), device=chosen_device(device))
    corpus = corpus or model_defaults(plan.checkpoint.family_name).default_corpora[0]
    if tokens < 2:
        raise UserError(f"--tokens {tokens}: a picture needs at least 2")
    stream = evaluation_stream(plan.tokenizer, corpus, window=max(tokens, 3), protocol=protocol("intactkv"))
    ids = stream.windows(1)[0, :tokens]
    magnitudes = hidden_magnitudes(plan.load().model, ids)
    largest = magnitudes.largest  # (L + 1, T)
    names = [str(plan.tokenizer.decode([int(i)])).replace("\n", "\\n") or "?" for i in ids]

    figure, axes = plt.subplots(figsize=(max(6.0, 0.2 * len(ids) + 2.0), 5.2))
    image = axes.pcolormesh(largest.numpy(), norm=LogNorm(), cmap="viridis")
    pivots = magnitudes.pivots()
    axes.set_xticks([i + 0.5 for i in range(len(ids))], names, rotation=90, fontsize=6.5)
    for i, tick in enumerate(axes.get_xticklabels()):
        if i in pivots:
            tick.set_color(VANILLA)
            tick.set_fontweight("bold")
    axes.set_yticks([i + 0.5 for i in range(0, len(largest), 5)], [str(i) for i in range(0, len(largest), 5)])
    axes.set_ylabel("output of block (0: embeddings)")
    axes.set_xlabel("token; pivots (over 100 and over 1000 × the layer's median) in bold")
    axes.set_title(
        f"{plan.checkpoint.name}: largest |activation| per token and layer, up to "
        f"{largest.max():,.0f}; pivots at {pivots or 'no position'}",
        fontsize=9,
    )
    figure.colorbar(image, label="max over channels of |hidden state|")
    save(
        figure,
        path,
        ("layer", "median", *names),
        [
            (layer, f"{median:.6g}", *(f"{x:.6g}" for x in row))
            for layer, (median, row) in enumerate(zip(magnitudes.median.tolist(), largest.tolist(), strict=True))
        ],
    )
