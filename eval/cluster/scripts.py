"""The batch script of an array: all that a task does on its node. What sbatch is told besides stands in
no file: which tasks are left, what they wait for, and what the site asks for; `submit --dry-run` prints it.

    sbatch ──▶ the script ──▶ python -m eval cluster run NAME TASK ──▶ the program, as `reproduce` calls it

Slurm tells the script when time runs out or the node is needed (USR1, TERM), and the script tells the program. What the
program has finished stays. A task that was told to stop leaves with the code 75 and is queued again.
"""

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from corpora.paths import CHECKOUT
from eval.cluster.site import Site
from eval.cluster.tasks import Array, folder_of

__all__ = ["RESTARTS", "WARNING", "indices", "script_of"]

WARNING = 120  # seconds before the time is up; an interrupted program gets 60 to end cleanly
RESTARTS = 10  # a task that is stopped more often does nothing else


def indices(numbers: Iterable[int], at_once: int | None = None) -> str:
    """Numbers as --array has them: 0-3,7, with %K for how many run at once."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts) + (f"%{at_once}" if at_once else "")


def script_of(name: str, array: Array, site: Site, at_once: int | None, device: str) -> str:
    """The text of an array's script. Site's partition, account and limits are sbatch's variables, not part of it."""
    tasks = array.tasks
    needs = ", ".join(map(str, tasks[0].needs)) or "nothing"
    what = f"task {array.first}" if len(tasks) == 1 else f"tasks {array.first} to {tasks[-1].index}"
    program = shlex.join([*site.launch, site.python, "-m", "eval", "cluster", "run", "--device", device, name])
    root = os.environ.get("INTACTKV_ROOT", "")
    setup = "\n".join(("# From cluster.env", *site.setup, "")) if site.setup else ""
    return f"""\
#!/bin/bash
# {what.capitalize()} of tasks.jsonl beside this file. Needs: {needs}. `python -m eval cluster submit` gives sbatch
# what this file does not say: the tasks that are left, the jobs to wait for, cluster.env's resources. With --dry-run it
# prints these lines. Logs are relative to the directory that sbatch is called in, which is the one of this file.
#SBATCH --job-name={name}.{array.number:02}
#SBATCH --array={indices(range(len(tasks)), at_once)}
#SBATCH --output=logs/%x_%A_%a.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{WARNING}
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
PROJECT_ROOT={shlex.quote(str(CHECKOUT))} # where Slurm puts its copy of this script tells nothing
cd {shlex.quote(os.getcwd())} || exit 1
export PYTHONPATH="$PROJECT_ROOT${{PYTHONPATH:+:$PYTHONPATH}}"
export INTACTKV_ROOT={shlex.quote(str(Path(root).absolute()) if root else "")} HF_HUB_OFFLINE=1
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_ON_NODE:-1}}}}"
{setup}
code=127 program='' told=''
trap 'told=USR1; [ -z "$program" ] || kill -USR1 "$program"' USR1
trap 'told=TERM; [ -z "$program" ] || kill -TERM "$program"' TERM
{program} "$(({array.first} + SLURM_ARRAY_TASK_ID))" &
program=$!
[ -z "$told" ] || kill -"$told" "$program" # it came in between
while true; do # a signal ends `wait`, and not the program
    told=''
    wait "$program"
    ended=$?
    [ "$ended" = 127 ] || code=$ended
    [ "$told" ] || break
done
trap '' USR1 TERM

# 75: it was told to stop and goes on later. Above 128: it was killed, which may be the machine's fault once.
again=0 restarts=${{SLURM_RESTART_COUNT:-0}}
[ "$code" != 75 ] || again={RESTARTS}
[ "$code" -le 128 ] || again=1
if [ "$restarts" -lt "$again" ]; then
    job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
    # Who cancelled the job does not want it back.
    [ "$(squeue -h -j "$job" -o %T)" != RUNNING ] || scontrol requeue "$job"
fi
exit "$code"
"""


def script_path(name: str, array: Array) -> Path:
    """Where an array's script lies."""
    return folder_of(name) / array.file_name
