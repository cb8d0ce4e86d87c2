"""What Slurm is asked and told: sbatch, squeue, sacct, scancel. Tasks are called 123_4, as Slurm calls them.

squeue knows what waits and runs. sacct knows how the others ended, but many sites do not run it.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpora.errors import UserError, one_line

__all__ = ["Queued", "cancel", "ended", "queue", "submit"]

PATIENCE = 120  # seconds; a busy controller takes its time


@dataclass(frozen=True)
class Queued:
    """A task in the queue. state: Slurm's word. reason: why it waits."""

    state: str
    reason: str = ""

    @property
    def waits(self) -> bool:
        """Whether it does not run yet, or not any more for now."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "SPECIAL_EXIT")


def _asked(command: Sequence[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """The stdout of a command of Slurm. Raises UserError if it is not installed, or refuses."""
    try:
        done = subprocess.run(
            command, env={**os.environ, **(environment or {})}, cwd=cwd, capture_output=True, text=True,
            errors="replace", timeout=PATIENCE, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not on this machine's PATH; go to a login node of the cluster (or add --dry-run, or use "
            "`python -m eval reproduce` where there is no Slurm)"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {PATIENCE} s; try again later") from None
    if done.returncode != 0:
        if re.search("contact slurm controller|connect", done.stderr, re.IGNORECASE):
            raise UserError(f"{command[0]} does not reach Slurm's controller; try again later")
        said = one_line(done.stderr)[-300:] or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} refused: {said}; mend cluster.env or ask the cluster's administrators")
    return done.stdout


def submit(script: Path, options: Sequence[str], environment: Mapping[str, str]) -> str:
    """Submit a batch script from its own directory; returns the job id. environment: sbatch's variables of the site."""
    said = _asked(["sbatch", "--parsable", *options, script.name], environment=environment, cwd=script.parent)
    found = re.fullmatch(r"(\d+)(;.*)?", said.strip())
    if found is None:
        raise UserError(
            f"sbatch printed {one_line(said)[:100]!r} in place of a job id; submit {script} by hand to see why"
        )
    return found[1]


def queue() -> dict[str, Queued]:
    """This user's tasks that wait or run. Raises UserError if squeue is missing or does not answer."""
    said = _asked(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F_%K|%T|%r"])
    rows = [line.split("|", 2) for line in said.splitlines() if line.count("|") >= 2]
    return {job: Queued(state, "" if reason == "None" else reason) for job, state, reason in rows}


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """How tasks ended, in sacct's words (OUT_OF_MEMORY, TIMEOUT, NODE_FAIL, …); nothing where it does not answer."""
    ids = sorted({job.partition("_")[0] for job in jobs}, key=int)
    if not ids:
        return {}
    try:
        said = _asked(
            ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={','.join(ids)}"]
        )
    except UserError:  # off at many sites
        return {}
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 1]
    return {job: state.split()[0] for job, state in rows if state.strip()}  # "CANCELLED by 0"


def cancel(jobs: Iterable[str]) -> None:
    """End tasks. Those that have ended meanwhile are no error."""
    if found := sorted(jobs):
        _asked(["scancel", *found])
