"""How a program that several processes may share begins: who am I, where do I compute, what will run."""

import argparse
import logging
from typing import TYPE_CHECKING

from corpora.errors import UserError

if TYPE_CHECKING:
    from eval.processes import Processes
    from quantization.runs.plan import Plan

__all__ = ["start"]


def start(options: argparse.Namespace) -> "tuple[Plan, Processes]":
    """The plan that the options of model, recipe, calibration and run make, and this process among its like.

    Raises UserError for options that cannot be.
    """
    from eval.processes import Processes
    from quantization.programs.options import ALL_GPUS, plan_of, show_log
    from quantization.runs.checkpoint import is_quantized, read_cost

    show_log()
    processes = Processes(on_cpu=options.device == "cpu")
    if options.device == ALL_GPUS and processes.count > 1:
        raise UserError(
            f"--device {ALL_GPUS} spreads one model over all GPUs, which `accelerate launch` has dealt out among "
            f"{processes.count} processes; use one or the other"
        )
    if not processes.is_first:
        logging.getLogger().setLevel(logging.WARNING)
    given = processes.device if options.device == "auto" else None
    plan = plan_of(options, several=True, device=given, shown=processes.is_first)
    if is_quantized(made := plan.directory_of(plan.recipe)):
        read_cost(made)  # which the record tells: what is wrong with it shows before the run, not behind it
    return plan, processes
