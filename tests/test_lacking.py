"""What a plan says is lacking, without torch, beside what the recipes and files themselves say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from corpora.errors import UserError
from eval.doctor.fits import misfits, uneven
from eval.doctor.lacking import lacking, refuse_lacking, texts_of
from eval.doctor.recipe_facts import group_of, text_of
from eval.tables.asked import Run
from quantization.named import RECIPES


def asked(recipe: str, model: Path, *more: str, program: str = "quantization") -> Run:
    return Run(program, model, "", ("--recipe", recipe, *more))


def model_of(folder: Path, **sizes: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def test_facts_are_those_of_the_recipes() -> None:
    for name, named in RECIPES.items():
        recipe = named.recipe
        assert text_of(name) == (recipe.calibration.corpus if recipe.calibrates else ""), name
        assert group_of(name) == (-1 if recipe.weights is None else recipe.weights.grid.group_size), name


def test_the_text_of_a_method_is_the_one_that_is_named_the_models_own_or_the_recipes() -> None:
    llama, small = Path("modelzoo/llama-2/llama-2-7b"), Path("modelzoo/smollm2/smollm2-135m")
    assert texts_of([asked("gptq", llama), asked("awq", llama), asked("rtn", llama)]) == ["c4", "pile"]
    assert texts_of([asked("gptq", small), asked("awq", small)]) == ["sample"]
    assert texts_of([asked("gptq", llama, "--calibration", "mine.txt")]) == []


def test_groups_that_do_not_divide_the_channels_are_told_once_with_one_that_does(tmp_path: Path) -> None:
    llama = model_of(tmp_path / "odd", hidden_size=208, intermediate_size=560)  # the largest power of two in both: 16
    opt = model_of(tmp_path / "even", hidden_size=256, ffn_dim=1024)
    (line,) = uneven([asked("rtn", llama), asked("gptq", llama, "--bits", "3"), asked("rtn", opt)])
    assert "groups of 128 do not divide the 208 and 560 channels of odd" in line
    assert '--options "--group-size 16"' in line
    assert uneven([asked("rtn", llama, "--group-size", "16"), asked("rtn", llama, "--group-size=-1")]) == []
    assert uneven([asked("smoothquant-w8a8", llama), asked("fp16", llama), asked("rtn", tmp_path / "none")]) == []


def test_what_the_runs_would_miss_is_named_with_the_way_to_get_it(intactkv_root: Path) -> None:
    model = intactkv_root / "modelzoo" / "llama-2" / "llama-2-7b"
    runs = [
        asked("gptq", model), Run("ppl", model, "ptb", ("--recipe", "gptq")), Run("tasks", model, "piqa", ()),
    ]  # fmt: skip
    said = "\n".join(lacking(runs))
    for words in (
        "no model in modelzoo/llama-2/llama-2-7b; bash scripts/prepare/model.sh llama-2 7b",
        "text ptb for evaluation", "questions of piqa", "text c4 for calibration", "--calibration NAME|FILE",
    ):  # fmt: skip
        assert words in said
    with pytest.raises(UserError, match="text ptb for evaluation"):
        refuse_lacking([], runs)


def test_a_name_in_place_of_a_directory_is_told_where_the_model_lies(intactkv_root: Path) -> None:
    model_of(intactkv_root / "modelzoo" / "smollm2" / "smollm2-135m", hidden_size=64, intermediate_size=64)
    (line,) = lacking([Run("ppl", Path("smollm2-135m"), __file__, ())])
    assert line == "no model in smollm2-135m; name --model modelzoo/smollm2/smollm2-135m"


def test_a_family_that_no_recipe_quantizes_is_lacking_with_its_recipes(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = tiny_checkpoint(tmp_path, "helium", num_hidden_layers=1)
    (line,) = lacking([asked(name, model, "--group-size", "16") for name in ("rtn", "rtn-w8a8", "fp16")])
    assert line.startswith("tiny-helium does not take rtn, rtn-w8a8: model_type 'helium' is not in the")


def test_what_does_not_fit_a_models_configuration_is_told_with_what_does(tmp_path: Path) -> None:
    small = model_of(tmp_path / "small", max_position_embeddings=512, hidden_size=64, num_attention_heads=4)
    large = model_of(tmp_path / "large", max_position_embeddings=131072, head_dim=128, hidden_size=4096)
    unknown = tmp_path / "none"

    def runs(model: Path) -> list[Run]:
        return [
            Run("ppl", model, "c4", ("--window", "5000")), Run("needle", model, "", ("--published", "--lines", "40")),
            asked("gptq", model, "--calibration-length", "2048"),
            Run("tasks", model, "piqa", ("--kv", "kivi", "--kv-group-size", "32")),
        ]  # fmt: skip

    assert misfits([*runs(large), *runs(unknown)]) == []
    window, needle, length, group = misfits([*runs(small), *runs(small)])
    assert window == "windows of 5000 tokens do not fit the 512 positions of small; --window 512 or fewer"
    assert needle == "needles in more than 8000 tokens do not fit the 512 positions of small; --window 512 or fewer"
    assert length.endswith("--calibration-length 512 or fewer")
    assert "groups of 32 of the KV cache do not divide the 16 channels of a head of small" in group
    assert '--options "--kv-group-size 16"' in group
    fitting = ("--window", "512", "--kv-group-size", "8"), ("--window", "512", "--kv-group-size=-1")
    assert misfits(Run("ppl", small, "c4", words) for words in fitting) == []


def test_a_conversation_lacks_a_chat_template_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    base, vicuna = model_of(tmp_path / "base"), model_of(tmp_path / "vicuna-v1.5-7b")
    for model in (base, vicuna):
        (model / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    prompt = ("--prefix", "prompt")
    (line,) = misfits(
        [Run("chat", base, "Hello", ()), Run("mtbench", base, "", prompt), Run("ppl", base, "c4", prompt)]
    )
    assert line.startswith("base has no chat template")
    assert misfits([Run("mtbench", vicuna, "", prompt), Run("mtbench", base, "", ("--template", "vicuna_v1.1"))]) == []
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert misfits([Run("chat", base, "Hello", ())]) == []


def test_a_prefix_file_that_is_not_there_is_lacking(tmp_path: Path) -> None:
    here, gone = tmp_path / "here.safetensors", tmp_path / "gone.safetensors"
    here.touch()
    (tmp_path / "text.txt").touch()
    model, text = model_of(tmp_path / "tiny"), str(tmp_path / "text.txt")
    said = lacking([Run("ppl", model, text, ("--prefix", str(file))) for file in (here, gone)])
    (line,) = [line for line in said if "--prefix" in line]
    assert line.startswith(f"--prefix {gone}: there is no such file; make it with `python -m intactkv build`")
