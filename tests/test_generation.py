"""What of a model's generation_config reaches an answer, and that it is part of every record of generated answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import QUESTIONS, TEMPLATE, turns_of, write_questions
from common import every
from lm_eval.api.instance import Instance
from transformers import AutoConfig, Gemma3Config, GenerationConfig, LogitsProcessorList

from corpora.errors import UserError
from eval.__main__ import main
from eval.generation import Generation, own_generation
from eval.mtbench.answers import Answerer, warpers_of
from eval.tasks.lm import IntactLM
from intactkv.attach import attach
from quantization.runs.opening import load_model, load_tokenizer

ROOM = 2048
# What a model's file may say and our protocols do not: nothing of it changes an answer, or crashes.
STRANGE: list[dict[str, Any]] = [
    {"max_new_tokens": 5},
    {"max_length": 7},
    {"min_new_tokens": 9},
    {"return_dict_in_generate": True, "output_scores": True},
    {"num_return_sequences": 2, "do_sample": True},
    {"num_beams": 3, "length_penalty": 2.0},
    {"stop_strings": ["x"]},
    {"pad_token_id": -1},
    {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5]], "suppress_tokens": [6, 7]},
    {"forced_eos_token_id": 2, "begin_suppress_tokens": [9]},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"temperature": 0.01, "do_sample": True},
    {"eos_token_id": [2, 101, -1]},
]


@pytest.fixture
def model(intactkv_root: Path, tiny_checkpoint: Callable, tiny_tokenizer: Callable) -> Path:
    directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=ROOM)
    tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
    say(directory)
    return directory


def say(model: Path, **settings: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))


def task_answers(model: Path, **options: Any) -> list[str]:
    """What lm-eval's wrapper generates for three texts, as `eval tasks` opens the model."""
    tokenizer = load_tokenizer(model)
    opened = load_model(model, torch.float32, torch.device("cpu"))
    lm = IntactLM(attach(opened, None), tokenizer, (1,), batch_size=3, context=256,
                  generation=own_generation(model, tokenizer))  # fmt: skip
    kwargs = {"until": ["zzz"], "max_gen_toks": 32, **options}
    torch.manual_seed(0)
    return lm.generate_until(
        [Instance("generate_until", {}, (text, kwargs), i) for i, text in enumerate(["a fox", "b", "What is it?"])]
    )


def test_tasks_generate_alike_whatever_else_the_models_file_says(model: Path) -> None:
    expected = task_answers(model)
    assert len(set(expected)) == 3
    assert max(map(len, expected)) > 20
    failed = []
    for settings in STRANGE:
        say(model, **settings)
        if task_answers(model) != expected:
            failed.append(settings)
    assert failed == []


def test_answers_are_alike_whatever_else_the_models_file_says(model: Path, run_main: Callable, tmp_path: Path) -> None:
    call = ("mtbench", "--model", model, "--questions", write_questions(tmp_path / "q.jsonl", QUESTIONS[:3]),
            "--max-new-tokens", 12, "--prefix", "bos", "--out")  # fmt: skip
    assert run_main(main, *call, tmp_path / "plain.jsonl")[0] == 0
    expected = turns_of(tmp_path / "plain.jsonl")
    for i, settings in enumerate(STRANGE):
        say(model, **settings)
        code, _, err = run_main(main, *call, path := tmp_path / f"{i}.jsonl")
        assert code == 0, f"{settings}: {err}"
        assert turns_of(path) == expected, settings


def test_the_models_own_ends_and_sampling_do_count(model: Path) -> None:
    plain = task_answers(model)
    tokenizer = load_tokenizer(model)
    third = tokenizer(plain[2], add_special_tokens=False)["input_ids"][3]
    say(model, eos_token_id=[2, third])
    assert len(task_answers(model)[2]) < len(plain[2])
    say(model, top_k=1)
    drawn = {"do_sample": True, "temperature": 5.0}
    assert task_answers(model, **drawn) == plain  # of the one best token there is no choice
    assert task_answers(model, top_k=0, **drawn) != plain  # the task's word goes first
    say(model)
    assert task_answers(model, **drawn) != plain


def test_sampling_settings_shape_what_dialogues_are_drawn_from(tiny_model: Callable) -> None:
    own = Generation((2,), pad=0, top_k=4, top_p=0.5, min_p=0.3)
    template: Any = None
    one = Answerer(attach(tiny_model("llama"), None), template, own, seed=0, max_new_tokens=4, context=None)
    logits = torch.randn(1, 101, generator=torch.Generator().manual_seed(0))
    shaped = warpers_of(one.own, 0.7)(torch.ones(1, 1, dtype=torch.long), logits)
    probabilities = (logits[0] / 0.7).softmax(-1)
    kept = probabilities >= probabilities.topk(4).values[-1]
    order = probabilities.where(kept, 0.0).div(probabilities[kept].sum()).sort(descending=True)
    nucleus = order.values.cumsum(0) - order.values < 0.5  # the fewest tokens that hold half of what top-k left
    expected = set(order.indices[nucleus & (order.values >= 0.3 * order.values[0])].tolist())
    assert set(shaped[0].isfinite().nonzero().flatten().tolist()) == expected
    assert isinstance(warpers_of(one.own, 0.0), LogitsProcessorList)
    assert len(warpers_of(one.own, 0.0)) == 0


def test_a_configuration_that_says_all_of_it_is_read_where_there_is_no_other_file(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 9], "top_k": 7, "max_length": 5}))
    assert own_generation(model, tokenizer) == Generation((2, 9), pad=0, top_k=7)


def test_ids_that_the_embedding_lacks_neither_end_nor_pad(model: Path, tiny_tokenizer: Callable) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<x>"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 101
    say(model, eos_token_id=[500, 9, 2], pad_token_id=101)
    assert own_generation(model, tokenizer) == Generation((2, 9), pad=2)
    tokenizer.save_pretrained(model)
    assert all(task_answers(model))  # rows of several lengths: pads are fed


@every(
    ("settings", "named"),
    [
        ({"top_k": -1}, r"top_k is -1; give a whole number, 0 for all tokens"),
        ({"top_k": 2.5}, r"top_k is 2\.5"),
        ({"top_k": True}, r"top_k is True"),
        ({"top_p": 1.5}, r"top_p is 1\.5; give a number from 0 to 1"),
        ({"min_p": "a"}, r"min_p is 'a'"),
        ({"eos_token_id": "</s>"}, r"eos_token_id' '</s>' is no token id"),
        ({"eos_token_id": [2, True]}, r"eos_token_id' \[2, True\] is no token id"),
        ({"max_new_tokens": -1}, r"generation_config\.json does not say how to generate .*max_new_tokens"),
    ],
)
def test_what_cannot_be_meant_is_one_line(settings: dict[str, Any], named: str, checkpoint: Callable, tmp_path_factory):
    tokenizer = load_tokenizer(checkpoint())
    model = tmp_path_factory.mktemp("strange")
    (model / "config.json").write_text((checkpoint() / "config.json").read_text())
    say(model, **settings)
    with pytest.raises(UserError, match=named):
        own_generation(model, tokenizer)
    for text in ("[]", "{", '"a"'):
        (model / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json is (damaged|not readable JSON)"):
            own_generation(model, tokenizer)


def test_ends_are_found_where_transformers_finds_them(tmp_path: Path, tiny_tokenizer: Callable) -> None:
    """Without a file of its own a model of several parts says them in the configuration of its text part."""
    Gemma3Config(text_config={"eos_token_id": [7, 9], "vocab_size": 101}).save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    assert {7, 9} <= set(GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path)).eos_token_id)
    assert {7, 9} <= set(own_generation(tmp_path, tokenizer).stops)


def test_generated_answers_have_it_in_their_identity_and_nothing_else_does(
    model: Path, run_main: Callable, intactkv_root: Path, text: Path
) -> None:
    (intactkv_root / "datasets/gsm8k").mkdir(parents=True)
    row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
    (intactkv_root / "datasets/gsm8k/test.jsonl").write_text(json.dumps(row) + "\n")
    calls = {
        "gsm8k": ("tasks", "--tasks", "gsm8k", "--data", "local", "--fewshot", 0),
        "mmlu": ("tasks", "--tasks", "mmlu", "--data", "sample", "--limit", 1),
        "ppl": ("ppl", "--corpus", text, "--window", 64, "--limit", 1),
    }

    def records() -> dict[str, dict[str, Any]]:
        return {name: json.loads(run_main(main, *call, "--model", model, "--json")[1]) for name, call in calls.items()}

    first = records()
    assert first["gsm8k"]["settings"]["generation"] == {"stops": [2], "top_k": 50, "top_p": None, "min_p": None}
    say(model, max_new_tokens=5, stop_strings=["x"])  # nothing that is read
    assert records() == first
    say(model, top_k=-1)  # what no task can be generated by hinders no other
    del calls["gsm8k"]
    assert records() == {name: first[name] for name in calls}
    calls["gsm8k"] = ("tasks", "--tasks", "gsm8k", "--data", "local", "--fewshot", 0)
    say(model, eos_token_id=[2, 30], top_p=0.9)
    second = records()
    assert second["gsm8k"]["identity"] != first["gsm8k"]["identity"]
    assert {name: second[name] for name in ("mmlu", "ppl")} == {name: first[name] for name in ("mmlu", "ppl")}
    assert all("generation" not in second[name]["settings"] for name in ("mmlu", "ppl"))
