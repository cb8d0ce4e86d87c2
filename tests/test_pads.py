"""Models that place a token by its slot in the batch: their rows are run without pads, and say what they say alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chats import CONTEXT, QUESTIONS, TEMPLATE
from common import every
from families import plain_logits
from lm_eval.api.instance import Instance
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.roformer import modeling_roformer

from corpora.errors import UserError
from eval.generation import Generation
from eval.mtbench.answers import Answerer
from eval.mtbench.chat_templates import chat_template
from eval.tasks.lm import IntactLM
from intactkv.architecture import ABSOLUTE_SLOTS, RELATIVE_SLOTS
from intactkv.attach import attach
from intactkv.prefix import build_prefix

pytestmark = pytest.mark.usefixtures("no_grad")

BOS = 1
SIZES = {
    "vocab_size": 101, "d_model": 64, "hidden_size": 64, "n_embd": 64, "intermediate_size": 96, "ffn_dim": 96,
    "decoder_ffn_dim": 96, "n_layers": 2, "num_layers": 2, "n_layer": 2, "num_hidden_layers": 2, "decoder_layers": 2,
    "n_heads": 4, "num_heads": 4, "n_head": 4, "num_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 4, "rotary_dim": 8,
    "max_seq_len": 1024, "max_position_embeddings": 1024, "n_positions": 1024, "is_decoder": True,
    "pad_token_id": 0, "bos_token_id": BOS, "eos_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "falcon": {"alibi": True},
}
# In transformers 5.17 a roformer sees the tokens behind it, so nothing can stand in front of it once for all.
BOTH_WAYS = {"roformer"} if not hasattr(modeling_roformer, "create_causal_mask") else set()
SHIFTED = sorted((ABSOLUTE_SLOTS | RELATIVE_SLOTS) - BOTH_WAYS)
OTHERS = ["bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "phi", "stablelm", "xglm"]


def small(kind: str) -> PreTrainedModel:
    """A random model of a type, with wide activations."""
    known = AutoConfig.for_model(kind)
    sizes = {name: size for name, size in SIZES.items() if hasattr(known, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **MORE.get(kind, {})})).eval()
    for parameter in model.parameters():
        parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows that start with [BOS], of 24, 20 and 20 tokens, padded on the left: ids and mask."""
    ids = torch.randint(3, 101, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0
    ids[0, 0] = ids[1, 4] = ids[2, 4] = BOS
    return ids * mask, mask


@every("kind", [*SHIFTED, *OTHERS])
def test_a_padded_row_scores_as_it_does_alone_whatever_the_model_counts(kind: str) -> None:
    model = small(kind)
    ids, mask = padded()
    for prefix in (None, build_prefix(model, [BOS])):
        got = attach(model, prefix).score(ids, mask)
        for row in range(len(ids)):
            expected = plain_logits(model, ids[row][mask[row].bool()])
            error = float((got[row, mask[row].bool()] - expected).abs().max() / expected.abs().max())
            assert error < 1e-5, f"row {row}, prefix {prefix is not None}: {error:.1e}"


@every("kind", ["bart", "gpt_neo", "mpt"])
def test_pads_are_refused_where_they_would_shift_tokens(kind: str) -> None:
    model = small(kind)
    ids, mask = padded()
    behind = attach(model, build_prefix(model, [BOS]))
    for call in (
        lambda: behind.generate(ids, mask, max_new_tokens=3),
        lambda: behind.feed(ids[:, 1:], mask[:, 1:]),
    ):
        with pytest.raises(UserError, match=f"a {kind} model places tokens by their slot.*rows of equal length"):
            call()
    assert behind.generate(ids[1:, 4:], mask[1:, 4:], max_new_tokens=3, do_sample=False).shape[0] == 2


@pytest.fixture
def mpt() -> PreTrainedModel:
    return small("mpt")


def test_dialogues_of_several_lengths_are_answered_as_alone(mpt: PreTrainedModel, tiny_tokenizer: Callable) -> None:
    chat = chat_template("auto", tiny_tokenizer(chat_template=TEMPLATE), "tiny")
    one = Answerer(
        attach(mpt, build_prefix(mpt, [BOS])), chat, Generation((2,), pad=0), seed=42, max_new_tokens=8, context=CONTEXT
    )
    together = [line["choices"] for line in one.lines(QUESTIONS, "m")]
    assert together == [line["choices"] for question in QUESTIONS for line in one.lines([question], "m")]
    assert any(turn for choices in together for turn in choices[0]["turns"])


def test_tasks_generate_for_several_lengths_as_alone(mpt: PreTrainedModel, tiny_tokenizer: Callable) -> None:
    texts = ["a short one", "one that is longer than the others", "another one"]
    requests = [Instance("generate_until", {}, (text, {"until": ["zzz"], "max_gen_toks": 12}), i)
                for i, text in enumerate(texts)]  # fmt: skip
    said = [
        IntactLM(
            attach(mpt, build_prefix(mpt, [BOS])), tiny_tokenizer(), (BOS,), batch_size=size, context=256,
            generation=Generation((2,), pad=0),
        ).generate_until(requests)
        for size in (1, 3)
    ]  # fmt: skip
    assert said[0] == said[1]
    assert all(said[0])
