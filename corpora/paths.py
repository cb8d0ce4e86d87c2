"""Where local data, models and results live: beside the code, or under $INTACTKV_ROOT."""

import os
from pathlib import Path

__all__ = ["CHECKOUT", "datasets_dir", "modelzoo_dir", "outputs_dir", "root"]


CHECKOUT = Path(__file__).resolve().parents[1]  # what the project brings along lies here


def root() -> Path:
    """The directory that holds datasets/, modelzoo/ and outputs/: $INTACTKV_ROOT, or the checkout."""
    return Path(os.environ.get("INTACTKV_ROOT") or CHECKOUT)


def datasets_dir() -> Path:
    """Local data sets, laid out as datasets/README.md says."""
    return root() / "datasets"


def modelzoo_dir() -> Path:
    """Local models, {family}/{family}-{size}, and what is made from them."""
    return root() / "modelzoo"


def outputs_dir() -> Path:
    """Run records, figures and caches; everything here can be made again."""
    return root() / "outputs"
