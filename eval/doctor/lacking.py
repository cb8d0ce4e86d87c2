"""What runs of published tables lack before anything runs, in lines. Only a family without a row loads torch here."""

from collections.abc import Iterable
from pathlib import Path

from corpora.catalog import model_defaults
from corpora.errors import UserError
from corpora.paths import root
from eval.doctor.files import calibrated_on, model, scored
from eval.doctor.fits import misfits, said, told, uneven
from eval.doctor.recipe_facts import text_of
from eval.tables.asked import Run
from eval.tables.declared import Paper
from eval.tables.preview import place_of
from intactkv.architecture import ARCHITECTURES

__all__ = ["lacking", "refuse_lacking", "texts_of"]


def lacking(runs: Iterable[Run]) -> list[str]:
    """What is not here and no run makes: models, texts that are scored or calibrated on, questions, judges, prefix
    files; what does not fit a model; and families that no recipe quantizes. A line for each, with the way out."""
    runs = [run for run in runs if run.program != "latency"]
    lines = [
        f"no model in {found.found.removesuffix(' is missing')}; {_another(directory) or found.way_out}"
        for directory in dict.fromkeys(run.model for run in runs)
        if (found := model(directory)).verdict == "lacks"
    ]
    for found, option in (
        *((one, "--corpus") for one in scored(runs)),
        *((one, "--calibration") for one in calibrated_on(runs, texts_of(runs))),
    ):
        if found.verdict == "lacks":
            other = f", or another: {option} NAME|FILE" if found.what.startswith("text ") else ""
            lines.append(f"{found.what}: {found.found}; {found.way_out}{other}")
    return lines + _prefix_files(runs) + uneven(runs) + misfits(runs) + _without_row(runs)


def _prefix_files(runs: Iterable[Run]) -> list[str]:
    """Prefix files that runs name and that are not there."""
    files = dict.fromkeys(said(run, "--prefix") for run in runs)
    return [
        f"--prefix {file}: there is no such file; make it with `python -m intactkv build`, or name another"
        for file in files
        if file.endswith(".safetensors") and not Path(file).exists()
    ]


def _another(directory: Path) -> str:
    """Where the model lies whose name was given in place of its directory; empty if it is not there."""
    place = place_of(directory.name)
    there = place != directory and (place / "config.json").is_file()
    return f"name --model {place.relative_to(root()) if place.is_relative_to(root()) else place}" if there else ""


def refuse_lacking(papers: Iterable[Paper], runs: Iterable[Run]) -> None:
    """Raise UserError, with all that is lacking, if runs could not be made."""
    if missing := lacking(runs):
        raise UserError(f"{', '.join(paper.name for paper in papers)} cannot run: {'; '.join(missing)}")


def texts_of(runs: Iterable[Run]) -> list[str]:
    """The corpora that recipes calibrate on where no run names another."""
    found: dict[str, None] = {}
    for run in runs:
        text = text_of(said(run, "--recipe"))
        if text and not said(run, "--calibration"):
            own = model_defaults(run.model.name).default_calibration
            found[text if own is None else own.corpus] = None
    return list(found)


def _without_row(runs: Iterable[Run]) -> list[str]:
    """Models of a family without a row, and the recipes of runs that refuse it; a line for each model."""
    asked: dict[Path, dict[str, None]] = {}
    for run in runs:
        family = told(run.model).get("model_type")
        if (name := said(run, "--recipe")) and isinstance(family, str) and family not in ARCHITECTURES:
            asked.setdefault(run.model, {})[name] = None
    return [line for directory, names in asked.items() for line in _refusals(directory, list(names))]


def _refusals(directory: Path, names: list[str]) -> list[str]:
    """The recipes that a model refuses, by its reasons. These load torch: only a model that will not run asks."""
    from quantization.named import RECIPES
    from quantization.runs.dense import empty_model_of, read_config
    from quantization.runs.suited import refusal

    try:
        model = empty_model_of(read_config(directory))
    except UserError as error:
        return [f"{directory.name}: {error}"]
    found: dict[str, list[str]] = {}
    for name in names:
        if name in RECIPES and (reason := refusal(model, RECIPES[name].recipe)) is not None:
            found.setdefault(reason, []).append(name)
    return [f"{directory.name} does not take {', '.join(refused)}: {reason}" for reason, refused in found.items()]
