"""The same claims on a real model: SmolLM2-135M-Instruct, whose [BOS] is a true pivot."""

import pytest
import torch
from families import plain_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from intactkv.attach import attach
from intactkv.pivots import hidden_magnitudes
from intactkv.prefix import build_prefix
from quantization.kv_cache import PerHead
from quantization.runs.prefixes import choose_prefix

pytestmark = pytest.mark.slow

TEXT = (
    "The river had risen in the night, and by morning the lower field was a lake. Anna stood at the gate with her "
    "brother and counted the sheep that had made it to the hill: forty-one. There should have been forty-three."
)


@pytest.fixture(scope="module")
def model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def text(tokenizer) -> Tensor:
    return torch.tensor([tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]])


@pytest.fixture(scope="module")
def bos(model, tokenizer):
    return build_prefix(model, choose_prefix("bos", tokenizer, "smollm2-135m").ids)


def plain_text(model, prompt: Tensor, **options) -> Tensor:
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def test_the_hidden_state_of_bos_is_massive_and_of_no_other_token(model, text):
    magnitudes = hidden_magnitudes(model, text)
    assert magnitudes.pivots() == [0]
    assert magnitudes.largest[20, 0] == pytest.approx(24_800, rel=0.02)
    assert magnitudes.largest[20, 1:].max() < 0.05 * magnitudes.largest[20, 0]


def test_scores_behind_bos_are_the_plain_models(model, bos, text):
    truth = plain_logits(model, text)
    # Thirty layers with hidden values up to 24,800 in float32.
    assert (attach(model, bos).score(text[None])[0] - truth).norm() < 1e-4 * truth.norm()


def test_greedy_text_behind_bos_is_the_plain_models(model, bos, text):
    options = {"max_new_tokens": 32, "do_sample": False}
    output = attach(model, bos).generate(text[None], **options)
    assert torch.equal(output, plain_text(model, text[None], **options))


def test_a_chat_behind_the_prompt_prefix_is_the_plain_models_chat(model, tokenizer):
    choice = choose_prefix("prompt", tokenizer, "smollm2-135m")
    assert tokenizer.decode(choice.ids).startswith("<|im_start|>system\n")
    assert "<|im_start|>user" in tokenizer.decode(choice.ids)
    conversations = [
        [{"role": "user", "content": "Name three colours."}],
        [{"role": "user", "content": "What is the capital of France, and which river runs through it?"}],
    ]
    tokenizer.padding_side = "left"
    batch = tokenizer(
        [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    )
    options = {"max_new_tokens": 16, "do_sample": False}
    behind = attach(model, build_prefix(model, choice.ids))
    output = behind.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    width = batch["input_ids"].shape[1]
    for row, ids, mask in zip(output, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = plain_text(model, ids[mask.bool()][None], **options)[0]
        new = alone[int(mask.sum()) :]
        assert torch.equal(row[width : width + len(new)], new)  # a row that ends early is padded
        assert tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_intact_bos_lowers_the_error_of_a_quantized_cache(model, bos, text):
    truth = plain_logits(model, text)[1:]
    errors = [
        float((attach(model, prefix, PerHead(3)).score(text[None])[0, 1:] - truth).norm()) for prefix in (bos, None)
    ]
    assert errors[0] < errors[1]
