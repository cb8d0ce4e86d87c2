"""A model type without a row: the error names the families that it is most like, and what works without one."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedConfig, PreTrainedModel

from corpora.errors import UserError
from intactkv.architecture import ARCHITECTURES, architecture_of
from intactkv.nearest import matrices_of


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("helium", "Nearest by its blocks: llama, whose blocks hold matrices of the same names."),
        ("arcee", "Nearest by its blocks: llama, without mlp.gate_proj."),
        ("starcoder2", "Nearest by its blocks: llama, without mlp.down_proj, mlp.gate_proj, mlp.up_proj with mlp.c_fc"),
        ("phi", "Nearest by its name: phi3; nearest by its blocks: llama, without "),
        ("mpt", "No family there has a name or blocks like it."),
        ("mamba", "No family there has a name or blocks like it."),
    ],
)
def test_the_nearest_families_are_named_by_name_and_by_blocks(
    kind: str, said: str, tiny_config: Callable[..., PreTrainedConfig]
) -> None:
    with pytest.raises(UserError) as refused:
        architecture_of(tiny_config(kind))
    message = str(refused.value)
    assert f"model_type '{kind}' is not in the architecture table. " in message
    assert said in message
    assert f"docs/models.md lists the {len(ARCHITECTURES)} families, docs/extending.md" in message
    assert len(message) < 400  # one line that is read to its end
    assert "\n" not in message


def test_what_transformers_makes_no_model_of_is_like_nothing() -> None:
    with pytest.raises(UserError, match=r"'bert_like' is not in the architecture table.*No family there"):
        architecture_of(PreTrainedConfig(model_type="bert_like"))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_row_names_modules_that_transformers_own_block_has(
    family: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family)
    row = architecture_of(model.config)
    block = row.blocks_of(model)[0]
    there = {name.rpartition(".")[0] for name, parameter in block.named_parameters() if parameter.ndim > 1}
    assert matrices_of(row) <= there
    beside = there - matrices_of(row)
    routers = {reader for feed in row.feeds for reader in feed.routers}
    assert {name for name in beside if "norm" not in name} == {name for name in routers if name in there}
