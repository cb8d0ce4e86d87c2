"""What a model type without a row resembles: by its name, and by the matrices that its blocks hold."""

from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches

from accelerate import init_empty_weights
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from corpora.errors import UserError, built
from intactkv.parts import Architecture, Row

__all__ = ["matrices_of", "nearest"]

SHOWN = 4


def nearest(config: PreTrainedConfig, rows: Mapping[str, Row]) -> str:
    """A sentence on the families of the table that a model is most like, for an error message: whatever they share,
    with the difference."""
    names = get_close_matches(config.model_type, rows, n=2, cutoff=0.7)
    said = [f"nearest by its name: {', '.join(names)}"] if names else []
    own = _matrices(config)
    found = {family: _of_family(family, row) for family, row in rows.items()}
    family = max(found, key=lambda name: len(own & found[name]))  # the first of several: the plainer one
    if own & found[family]:
        said.append(f"nearest by its blocks: {family}, {_difference(own, found[family])}")
    sentence = "; ".join(said or ["no family there has a name or blocks like it"])
    return f"{sentence[0].upper()}{sentence[1:]}."


def matrices_of(row: Architecture) -> frozenset[str]:
    """Modules of transformers' own block that hold matrices to round, by a row."""
    fused = {f"{one.module}.{part}": one.module for one in row.fused for part in one.parts}
    experts = "" if row.experts is None else f"{row.experts.module}."
    linears = (linear for names in row.linears for linear in names)
    return frozenset(
        row.experts.module if row.experts and name.startswith(experts) else fused.get(name, name) for name in linears
    )


def _of_family(family: str, row: Row) -> frozenset[str]:
    """The same of a family's published sizes; empty where its row refuses them."""
    with suppress(UserError), built(f"no configuration of {family}", ""):
        return matrices_of(row(CONFIG_MAPPING[family]()))
    return frozenset()


def _matrices(config: PreTrainedConfig) -> frozenset[str]:
    """Modules with matrices of a model's first block; empty where transformers makes no causal model of it, or none
    with a list of blocks."""
    with suppress(UserError), built(f"no model of {config.model_type}", ""), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        count = config.get_text_config(decoder=True).num_hidden_layers
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
        if (blocks := next(lists, None)) is not None:
            named = blocks[0].named_parameters()
            return frozenset(name.rpartition(".")[0] for name, parameter in named if parameter.ndim > 1)
    return frozenset()


def _difference(own: frozenset[str], theirs: frozenset[str]) -> str:
    """In what two blocks differ, in words."""
    lacks, more = sorted(theirs - own), sorted(own - theirs)
    parts = [
        f"{word} {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}"
        for word, names in (("without", lacks), ("with", more))
        if names
    ]
    return " ".join(parts) or "whose blocks hold matrices of the same names"
