"""What columns of texts are called, so that no two columns of a table share a name."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from corpora.catalog import CORPORA

__all__ = ["heads_of"]


def heads_of(corpora: Sequence[str], taken: Iterable[str]) -> dict[str, str]:
    """A head for every text: the name of one that has a name, of a file the shortest end of its path that no other has.

    taken: heads that are not for these. Letter case tells nothing apart, as --only does not.
    """
    names = {name: (name,) if name in (*CORPORA, "c4-old") else Path(name).absolute().parts for name in corpora}
    found: dict[str, str] = {}
    for name, parts in names.items():
        others = {head.lower() for head in taken}
        ends = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        for count, end in enumerate(ends, start=1):
            same = {"/".join(other[-count:]).lower() for key, other in names.items() if key != name}
            if end.lower() not in others | same:
                break
        found[name] = end
    return found
