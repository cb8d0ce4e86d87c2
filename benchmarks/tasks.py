"""Requests per second of the task wrapper beside lm-eval's own HFLM, on the same requests and batch size.

Without a prefix both read the same ids. With one, ours reads the text behind the cached prefix, and HFLM the prefix
tokens in the text. Requests: the sample's HellaSwag items: many answers of several tokens.
"""

import argparse
import logging
from pathlib import Path

from lm_eval.models.huggingface import HFLM

from benchmarks.measure import alternating, ratio, report
from corpora.task_data import TASK_DATA, task_rows
from corpora.text import evaluation_stream, protocol
from corpora.tokens import encode, start_token_id
from eval.tasks.lm import IntactLM, Request
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.named import named_recipe
from quantization.programs.options import chosen_device
from quantization.runs.plan import plan_run

PREFIX = 34  # tokens; Vicuna's [P]


def main() -> None:
    """Score the same requests with both wrappers, in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("modelzoo/smollm2/smollm2-135m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device = chosen_device(options.device)
    plan = plan_run(options.model, named_recipe("fp16"), device=device)
    model = plan.load().model
    context = plan.context or 2048
    rows = task_rows("hellaswag", TASK_DATA["hellaswag"], sample=True).splits["validation"][: options.questions]
    pairs = [(row["ctx"], " " + ending) for row in rows for ending in row["endings"]]
    stream = evaluation_stream(plan.tokenizer, "sample", window=2048, protocol=protocol("intactkv"))
    stock = HFLM(model, "causal", tokenizer=plan.tokenizer, batch_size=options.batch_size, max_length=context)

    for lead in ((), (start_token_id(plan.tokenizer),), tuple(stream.ids[:PREFIX].tolist())):
        intact = attach(model, build_prefix(model, lead) if lead else None)
        ours = IntactLM(intact, plan.tokenizer, lead, batch_size=options.batch_size, context=context)
        requests: list[Request] = [
            (None, [*lead, *encode(plan.tokenizer, text)], encode(plan.tokenizer, answer)) for text, answer in pairs
        ]
        times = alternating(
            lambda ours=ours, requests=requests: ours._loglikelihood_tokens(requests, disable_tqdm=True),
            lambda requests=requests: stock._loglikelihood_tokens(requests, disable_tqdm=True),
            options.rounds,
            device.type,
        )
        middle = options.rounds // 2
        report(
            benchmark="tasks",
            prefix_tokens=len(lead),
            requests=len(requests),
            batch_size=options.batch_size,
            device=device.type,
            requests_per_second=round(len(requests) / sorted(times[0])[middle], 2),
            stock_requests_per_second=round(len(requests) / sorted(times[1])[middle], 2),
            speed_ratio=round(1 / ratio(*times), 3),
        )


if __name__ == "__main__":
    main()
