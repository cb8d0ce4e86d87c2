"""Names of tasks that stand for others. No library is imported: tables are planned in an instant."""

__all__ = ["GROUPS"]

# A word that stands for other tasks, each with a record of its own.
GROUPS = {
    "qa": ("openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "hellaswag", "lambada_openai"),
    "csqa": ("boolq", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande"),
    "truthfulqa": ("truthfulqa_gen",),
    "bigbench": ("bbh",),  # BIG-Bench Hard: which of BIG-Bench's tasks the qllm pages mean is inferred from the score
}
