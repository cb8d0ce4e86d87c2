"""Where local data, models and results live: beside the code, or under $INTACTKV_ROOT."""

import os
from pathlib import Path

from corpora.errors import UserError
from corpora.values import shown

__all__ = ["CHECKOUT", "datasets_dir", "modelzoo_dir", "outputs_dir", "root"]


CHECKOUT = Path(__file__).resolve().parents[1]  # what the project brings along lies here


def root() -> Path:
    """The directory that holds datasets/, modelzoo/ and outputs/: $INTACTKV_ROOT, or the checkout where that is not set
    or empty. Raises UserError if it names no directory."""
    word = os.environ.get("INTACTKV_ROOT")
    if word and not os.path.isdir(word):
        raise UserError(f"INTACTKV_ROOT={shown(word)} is no directory; make it, name another, or unset it")
    return Path(word or CHECKOUT)


def datasets_dir() -> Path:
    """Local data sets, laid out as datasets/README.md says."""
    return root() / "datasets"


def modelzoo_dir() -> Path:
    """Local models, {family}/{family}-{size}, and what is made from them."""
    return root() / "modelzoo"


def outputs_dir() -> Path:
    """Run records, figures and caches; everything here can be made again."""
    return root() / "outputs"
