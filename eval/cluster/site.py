"""cluster.env: all that a site wants to be told, in one file that git ignores.

A line is KEY=VALUE, or a comment. Nothing here is evaluated by a shell but SETUP, which stands in the batch script as
it is. What Slurm is asked for reaches sbatch through its own variables, so no script of ours names a site's accounts.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpora import values
from corpora.errors import UserError
from corpora.files import open_text
from corpora.paths import root

__all__ = ["EXAMPLE", "LIMITS", "Site", "read_site", "site_file"]

EXAMPLE = "scripts/cluster/cluster.env.example"
# Keys that sbatch reads from its environment, with the variable and what the value must be.
ASKED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "PARTITION": ("SBATCH_PARTITION", values.plain),
    "ACCOUNT": ("SBATCH_ACCOUNT", values.plain),
    "QOS": ("SBATCH_QOS", values.plain),
    "CONSTRAINT": ("SBATCH_CONSTRAINT", values.plain),
    "RESERVATION": ("SBATCH_RESERVATION", values.plain),
    "GRES": ("SBATCH_GRES", values.plain),
    "TIME": ("SBATCH_TIMELIMIT", values.duration),
    "MEM": ("SBATCH_MEM_PER_NODE", values.memory),
}
LIMITS = {"time": ASKED["TIME"][0], "mem": ASKED["MEM"][0]}  # which options may raise
OWN: dict[str, Callable[[str], Any]] = {
    "CPUS": values.count(1, 4096),
    "PYTHON": values.name,
    "LAUNCH": values.words,
    "SETUP": values.name,
}


@dataclass(frozen=True)
class Site:
    """What a cluster wants. asked: variables of sbatch. cpus: of a task. setup: lines of bash that load modules and
    environments. launch: words in front of the interpreter, such as a container's. python: the interpreter."""

    asked: Mapping[str, str] = field(default_factory=dict)
    cpus: int | None = None
    setup: tuple[str, ...] = ()
    launch: tuple[str, ...] = ()
    python: str = sys.executable


def site_file() -> Path:
    """Where the settings of the site are expected."""
    return root() / "cluster.env"


def read_site() -> Site:
    """The settings of cluster.env. Raises UserError if it is missing, or for a line that is wrong."""
    path = site_file()
    if not path.is_file():
        raise UserError(f"{path} is missing; copy {EXAMPLE} to it and say there what your cluster wants")
    found: dict[str, str] = {}
    setup: list[str] = []
    with open_text(path, "the settings of the cluster") as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, 1):
        key, _, word = (part.strip() for part in line.partition("="))
        if not line.strip() or key.startswith("#"):
            continue
        if key not in ASKED and key not in OWN:
            known = ", ".join([*ASKED, *OWN])
            raise UserError(f"{path}, line {number}: {values.shown(key)} is not known; choose from {known}")
        if key in found:
            raise UserError(f"{path}, line {number}: {key} stands there twice; only SETUP may")
        if not word:
            continue
        try:
            (OWN[key] if key in OWN else ASKED[key][1])(word)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{path}, line {number}: {key}={error}") from None
        if key == "SETUP":
            setup.append(word)
        else:
            found[key] = word
    return Site(
        asked={ASKED[key][0]: word for key, word in found.items() if key in ASKED},
        cpus=int(found["CPUS"]) if "CPUS" in found else None,
        setup=tuple(setup),
        launch=values.words(found["LAUNCH"]) if "LAUNCH" in found else (),
        python=found.get("PYTHON", sys.executable),
    )
