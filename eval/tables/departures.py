"""What of a figure is not as published, in words: the model, the text and how much of it, options, how it was computed.

A published size that is asked for in words (`--window 2048`) is the published size; how much was scored is read from
the records, so that a truncated or replaced text is noticed, too. Figures of 32 bits compare with published ones of 16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from corpora.catalog import catalog_name
from eval.tables.asked import Cell
from eval.tables.declared import Measure, Paper, Scope, Words

__all__ = ["QUESTIONS", "computed", "departures", "windows_of"]

# How many questions the published accuracies are of: MMLU's test files, and the splits that lm-eval scores.
QUESTIONS: Mapping[str, int] = {
    "mmlu": 14042, "openbookqa": 500, "winogrande": 1267, "arc_challenge": 1172, "arc_easy": 2376, "boolq": 3270,
    "hellaswag": 10042, "lambada_openai": 5153, "piqa": 1838, "gsm8k": 1319, "truthfulqa_gen": 817, "bbh": 6511,
}  # fmt: skip
JUDGEMENTS = 160  # two turns of MT-bench's 80 questions
JUDGE = "gpt-4-0125-preview"  # inferred from the reference answers

WINDOW = 2048  # tokens, of every published perplexity
# Windows of WikiText-2's test by the tokenizer, known by the start of a model's name, the first that fits: 288,937,
# 341,469 (twice) and 287,645 tokens.
WIKITEXT2: Mapping[str, int] = {"llama-3": 141, "llama-": 166, "vicuna-": 166, "opt-": 140}
C4 = 256  # windows at most
TOLERANCE = 0.05  # of a number of windows: a slow tokenizer and a fast one differ by less


def windows_of(corpus: str, model: str) -> tuple[int, int] | None:
    """The fewest and the most windows of 2048 tokens that a published text has for a model; None for other texts.

    GPTQ's draw of C4 is 256 segments. The first 1100 texts of C4 reach the limit of 256 windows with LLaMA's tokenizer;
    with one that needs fewer tokens there may be fewer windows, in proportion to WikiText-2's.
    """
    known = next((count for start, count in WIKITEXT2.items() if catalog_name(model).startswith(start)), None)
    fewest, most = (known, known) if known else (min(WIKITEXT2.values()), max(WIKITEXT2.values()))
    match corpus:
        case "wikitext2":
            return fewest, most
        case "c4":
            return C4 * fewest // WIKITEXT2["llama-"], C4
        case "c4-old":
            return C4, C4
    return None


def departures(
    paper: Paper, model: str, cell: Cell, scope: Scope, answers: Sequence[Mapping[str, Any] | None]
) -> tuple[str, ...]:
    """What of a cell is not as published. answers: the record of each of its runs, None for one that is not there."""
    measure, method = cell.measure, cell.row.method
    records = [record for record in answers if record is not None]
    words = [] if not paper.models or catalog_name(model) in paper.models else [f"model {model}"]
    if measure not in paper.measures:
        words.append(f"{'corpus' if measure.program == 'ppl' else 'task'} {measure.item}")
    sized = measure.program == "needle" or (measure.program == "ppl" and scope.window != WINDOW)
    given = {
        "window": scope.window if sized else None,
        "perplexity by": _otherwise(measure, scope.scoring) if measure.program == "ppl" else (),
        "tasks by": _otherwise(measure, scope.asking) if measure.program == "tasks" else (),
        "MMLU by": _otherwise(measure, scope.mmlu) if measure.item == "mmlu" else (),
        "calibration": scope.calibration if method.calibrates else (),
        "options": scope.options_of(method),
        "training": scope.training if cell.row.arm.trains else (),
    }  # fmt: skip
    for name, value in given.items():
        if value:
            words.append(f"{name} {' '.join(value) if isinstance(value, tuple) else value}")
    for record in records:
        words += [*_amount(measure, record, model, scope), *_not_published(measure, record, scope)]
    if 0 < len(records) < len(answers):
        words.append(f"{len(records)} of {len(answers)} seeds")
    return tuple(dict.fromkeys(words))


def _otherwise(measure: Measure, words: Words) -> Words:
    """Options that say something else than the column's own; a batch size changes no figure but in its last bits."""
    own = dict(zip(measure.options[::2], measure.options[1::2], strict=True))
    pairs = zip(words[::2], words[1::2], strict=True)
    return tuple(word for pair in pairs if pair[0] != "--batch-size" and own.get(pair[0]) != pair[1] for word in pair)


def _amount(measure: Measure, record: Mapping[str, Any], model: str, scope: Scope) -> list[str]:
    """How much a record scores, where that is not the published amount. A limit counts where it left something out."""
    whole: tuple[int, int] | None
    match measure.program:
        case "ppl":
            count, whole = len(record["window_nll"]), windows_of(measure.item, model)
            told = f"{count} windows of {measure.item}, about {_range(whole)} expected"
            slack, sized = TOLERANCE, record["settings"]["window"] == WINDOW
        case "tasks":
            count, known = record["samples"], QUESTIONS.get(measure.item)
            whole, told = (known, known) if known else None, f"{count} of {known} questions"
            slack, sized = 0, record["settings"]["data"] != "sample"
        case "judge":
            judged = sum(grades["judgements"] for grades in record["models"].values())
            count, whole = min(judged, JUDGEMENTS), (JUDGEMENTS, JUDGEMENTS)  # more: several answers to a question
            told, slack, sized = f"{count} of {JUDGEMENTS} judgements", 0, True
        case _:
            return []
    if scope.limit is not None and count >= scope.limit and (whole is None or count < whole[-1]):
        return [f"limit {scope.limit}"]
    if whole is None or not sized or (1 - slack) * whole[0] <= count <= (1 + slack) * whole[1]:
        return []
    return [told]


def _not_published(measure: Measure, record: Mapping[str, Any], scope: Scope) -> list[str]:
    """What else a record says that is not as published, and was not asked for."""
    settings = record["settings"]
    if measure.program == "ppl" and scope.window in (None, WINDOW) and settings["window"] != WINDOW:
        return [f"windows of {settings['window']} tokens"]
    if measure.program == "tasks" and settings["data"] == "sample":
        return ["data sample"]
    if measure.program == "latency" and measure.metric.endswith(" ms"):
        return [f"milliseconds on {settings['gpu']}"]
    if measure.program == "judge":
        words = [] if settings["judge"] == JUDGE and "endpoint" not in settings else [f"judge {settings['judge']}"]
        return words if settings["questions"] == "mt_bench" else [*words, f"questions {settings['questions']}"]
    return []


def _range(whole: tuple[int, int] | None) -> str:
    return "" if whole is None else " to ".join(map(str, sorted(set(whole))))


def computed(record: Mapping[str, Any]) -> str:
    """In what format and on what kind of device a record was computed; empty for one of no model."""
    settings = record["settings"]
    return f"{settings['dtype']} on {settings['device']}" if "dtype" in settings else ""
