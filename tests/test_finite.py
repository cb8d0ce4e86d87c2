"""What is no number is refused where it arises: no program scores it, answers with it or stores it."""

import json
import math
from pathlib import Path

import pytest
import torch
from chats import TEMPLATE
from safetensors.torch import load_file, save_file

from corpora.errors import UserError
from corpora.json_files import not_finite, write_json
from eval.__main__ import main
from eval.perplexity import perplexity_of
from eval.runs import all_records, record_of
from intactkv.attach import attach
from intactkv.finite import finite
from intactkv.prefix import build_prefix

WEIGHTS = "model.safetensors"


@pytest.fixture
def broken(intactkv_root: Path, tiny_checkpoint, tiny_tokenizer):
    """broken(tensor) -> a checkpoint of which one tensor is so large (its largest value at `top`) that products with it
    overflow float32."""

    def make(tensor: str, top: float = 3e38) -> Path:
        directory = tiny_checkpoint(intactkv_root / "modelzoo", "llama", max_position_embeddings=2048)
        tiny_tokenizer(chat_template=TEMPLATE).save_pretrained(directory)
        tensors = load_file(directory / WEIGHTS)
        tensors[tensor] = tensors[tensor] / tensors[tensor].abs().max() * top
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})
        return directory

    return make


CALLS = {
    "perplexity": ("ppl", "--corpus", "some text.txt", "--window", 64, "--limit", 1),
    "choices": ("tasks", "--tasks", "mmlu", "--data", "sample", "--limit", 1),
    "generated task": ("tasks", "--tasks", "gsm8k", "--data", "local", "--fewshot", 0, "--limit", 1),
    "answers": ("mtbench", "--questions", "sample", "--limit", 1, "--max-new-tokens", 4),
    "distances": ("stats", "distance", "--corpus", "some text.txt", "--window", 64, "--kv-bits", 4),
}
LOOKS = {
    "pivots": ("stats", "pivots", "--window", 64, "--corpus"),
    "cache": ("stats", "kv", "--kv-bits", 4, "--window", 64, "--corpus"),
    "activations": ("plot", "act", "--corpus"),
    "attention": ("plot", "attn", "--corpus"),
    "hessian": ("plot", "hessian", "--calibration-samples", 2, "--calibration-length", 64, "--calibration"),
}
DAMAGES = {"NaN": "model.layers.1.mlp.down_proj.weight", "infinite": "lm_head.weight"}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_computes_no_numbers_has_no_result(call, damage, broken, text, run_main, intactkv_root):
    model = broken(DAMAGES[damage])
    (intactkv_root / "datasets/gsm8k").mkdir(parents=True)
    row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
    (intactkv_root / "datasets/gsm8k/test.jsonl").write_text(json.dumps(row) + "\n")
    words = [str(intactkv_root / word) if word == "some text.txt" else word for word in CALLS[call]]
    code, out, err = run_main(main, words[0], *words[1:], "--model", model)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (2, "")
    assert "NaN" in line or "infinite" in line
    assert "tiny-llama" in line
    assert "--dtype float32" in line
    assert not list((intactkv_root / "outputs").rglob("*.jsonl"))
    assert not list((intactkv_root / "outputs").glob("runs/*"))


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_told_of_the_inside_of_such_a_model(look, broken, text, run_main, intactkv_root):
    model = broken("model.layers.1.mlp.up_proj.weight")
    code, out, err = run_main(main, *LOOKS[look], text, "--model", model)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (2, "")
    assert "NaN" in line or "infinite" in line
    assert not [file for file in (intactkv_root / "outputs").rglob("*") if file.suffix in (".json", ".csv", ".png")]


def test_the_library_refuses_them_too(tiny_model):
    model = tiny_model("llama")
    behind, ids = attach(model, build_prefix(model, [1])), torch.tensor([[1, 20, 33]])
    model.model.layers[1].mlp.down_proj.weight[3] = math.nan
    for call in (lambda: behind.score(ids), lambda: behind.generate(ids, max_new_tokens=3),
                 lambda: behind.generate(ids, max_new_tokens=3, num_beams=2)):  # fmt: skip
        with pytest.raises(UserError, match=r"logits .*the llama model.* are NaN, the first at \["):
            call()


def test_a_token_that_is_forbidden_by_a_logit_of_minus_infinity_is_no_mistake(tiny_model):
    model = tiny_model("llama")
    head = model.lm_head
    head.register_forward_hook(lambda _m, _args, out: out.index_fill(-1, torch.tensor([7]), -math.inf))
    behind, ids = attach(model, None), torch.tensor([[1, 20, 33]])
    assert behind.score(ids)[0, 0, 7] == -math.inf
    assert 7 not in behind.generate(ids, max_new_tokens=5, eos_token_id=None)[0, 3:]


def test_the_message_says_how_many_and_where():
    assert finite(good := torch.arange(6.0), "it") is good
    values = torch.zeros(2, 3)
    values[1, 2], values[1, 1] = math.nan, math.inf
    with pytest.raises(UserError, match=r"^it: 2 of 6 are NaN or infinite, the first at \[1, 1\]; .*--dtype float32"):
        finite(values, "it")


def test_a_perplexity_beyond_float64_is_refused_and_one_within_is_not():
    assert perplexity_of(torch.tensor([700.0, 706.0])) == pytest.approx(math.exp(703.0))
    with pytest.raises(UserError, match=r"mean loss is 800\.0 nats a token"):
        perplexity_of(torch.tensor([800.0, 800.0]))


def test_a_task_whose_perplexity_is_beyond_float64_is_refused(broken, run_main, intactkv_root):
    folder = intactkv_root / "datasets/lambada_openai/data"
    folder.mkdir(parents=True)
    row = {"text": "He saw a dog and some cats and called the dog"}
    (folder / "lambada_test_en.jsonl").write_text(json.dumps(row) + "\n")
    model = broken("lm_head.weight", 1e5)  # logits that are finite and of no use
    code, out, err = run_main(main, "tasks", "--tasks", "lambada_openai", "--data", "local", "--model", model)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (2, "")
    assert "a score of lambada_openai is beyond float64" in line
    assert not list((intactkv_root / "outputs").glob("runs/*"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_file_of_json_holds_what_json_has_no_word_for(value, tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=rf"a\.json is not written.*rows\.1\.x = {value}"):
        write_json(path, {"text": "nan", "rows": [{"x": 1.0}, {"x": value}]})
    assert list(tmp_path.iterdir()) == []
    assert not_finite({"a": [1, 2.5, None, "inf", (0.0,)], "b": {}}) is None


def test_a_figure_that_is_no_number_makes_no_record_and_an_old_one_is_not_read(intactkv_root):
    with pytest.raises(UserError, match="accuracy = nan"):
        record_of("tasks", "m", {"model": "m"}, lambda: {"metrics": {"accuracy": math.nan}})
    assert all_records("tasks") == []
    path = Path(record_of("tasks", "m", {"model": "m"}, lambda: {"metrics": {"accuracy": 0.33}})["path"])
    path.write_text(path.read_text().replace("0.33", "NaN"))
    with pytest.raises(UserError, match=r"its 'metrics\.accuracy' is nan; delete"):
        record_of("tasks", "m", {"model": "m"}, dict)
    assert all_records("tasks") == []
