"""What `reproduce` would do, without doing it: of declared tables, the ledger and file headers."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora.catalog import FAMILIES, model_defaults, model_directory
from corpora.paths import modelzoo_dir
from eval.tables.asked import Call, Run, calls_of, needed_first
from eval.tables.declared import NO_MODEL, Paper, Scope
from eval.tables.estimate import SOURCES, ModelSize, disk_of, seconds_of, size_of
from eval.tables.ledger import is_done
from eval.tables.render import Table

__all__ = ["changed_defaults", "place_of", "plan_tables", "staged"]


def place_of(name: str) -> Path:
    """Where a published model lies, or belongs: as the catalogue has it, else in modelzoo/FAMILY/ or modelzoo/."""
    for family, known in FAMILIES.items():
        size = name.removeprefix(f"{family}-")
        if size != name and size in known.sizes:
            return model_directory(family, size)
    found = sorted(modelzoo_dir().glob(f"*/{name}/config.json"))
    return found[0].parent if found else modelzoo_dir() / name


@dataclass(frozen=True)
class Stage:
    """Calls that go together. title: what they are."""

    title: str
    calls: tuple[Call, ...]


def staged(runs: Sequence[Run]) -> list[Stage]:
    """What is made once for others, and what only leaves a record."""
    artefacts, records = needed_first(runs)
    titles = ("made once: checkpoints, prefixes, answers", "measured")
    return [
        Stage(title, tuple(calls_of(part))) for title, part in zip(titles, (artefacts, records), strict=True) if part
    ]


def changed_defaults(models: Sequence[Path], scope: Scope) -> list[str]:
    """What a model's own defaults make of a published table, in words."""
    usual, lines = model_defaults(""), []
    for model in models:
        own = model_defaults(model.name)
        changes = []
        if own.default_corpora != usual.default_corpora and not scope.corpora:
            changes.append(f"perplexity on the corpus {', '.join(own.default_corpora)}")
        if own.default_group_size != usual.default_group_size:
            changes.append(f"groups of {own.default_group_size} where a method names no size")
        if own.default_calibration is not None and not scope.calibration:
            text = own.default_calibration
            changes.append(f"calibration on {text.samples} × {text.length} tokens of {text.corpus}")
        if own.default_task_data != usual.default_task_data and scope.data is None:
            changes.append(f"questions of {own.default_task_data}")
        if changes:
            lines.append(f"{model.name} has defaults of its own: {'; '.join(changes)}")
    return lines


def plan_tables(
    papers: Sequence[Paper],
    models: Sequence[Path],
    scope: Scope,
    runs: Sequence[Run],
    device: str = "auto",
    missing: Sequence[str] = (),
) -> tuple[Table, list[str]]:
    """The table of --dry-run, a row for every model and stage, and the command lines of what is left. missing: what
    `eval.doctor.lacking` names."""
    rows: list[tuple[str, ...]] = []
    lines: list[str] = []
    hours = disk = 0.0
    unknown: set[str] = set()
    for model in models:
        size = ModelSize(0, 0) if model == NO_MODEL else size_of(model)
        for stage in staged([run for run in runs if run.model == model]):
            left = [Call(tuple(run for run in call.runs if not is_done(run))) for call in stage.calls]
            left = [call for call in left if call.runs]
            number = sum(len(call.runs) for call in stage.calls)
            open_runs = sum(len(call.runs) for call in left)
            if size is None and left:
                unknown.add(model.name)
            seconds = sum(seconds_of(call, size) for call in left) if size else 0.0
            bytes_left = sum(disk_of(run, size) for call in left for run in call.runs) if size else 0.0
            hours, disk = hours + seconds / 3600, disk + bytes_left
            name = "–" if model == NO_MODEL else model.name
            rows.append((name, stage.title, str(number), str(number - open_runs), str(len(left)),
                         _size(bytes_left), f"{seconds / 3600:.2f}"))  # fmt: skip
            lines += [shlex.join(["python", *call.command(device)[1:]]) for call in left]
    rows.append(
        ("in all", "", *(str(sum(int(row[i]) for row in rows)) for i in (2, 3, 4)), _size(disk), f"{hours:.2f}")
    )
    notes = [f"GPU hours are an estimate: {SOURCES}"]
    if unknown:
        notes.append(f"no estimate for {', '.join(sorted(unknown))}: neither its files nor its name say its size")
    if scope.reduced:
        notes.append(f"not as published: {', '.join(scope.reduced)}")
    notes += changed_defaults(models, scope)
    notes += [f"lacking: {line}" for line in missing]
    head = ("model", "stage", "runs", "finished", "calls left", "disk", "GPU hours")
    caption = f"{', '.join(paper.name for paper in papers)}: what would run"
    return Table(caption, head, tuple(rows), words=2, notes=tuple(notes)), lines


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"
