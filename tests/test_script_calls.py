"""What the scripts call: every published call, and the arguments of the programs that it becomes.

No program runs: the scripts see a `python` that writes down what it is asked for.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from common import ROOT, every, refusals

from corpora.catalog import FAMILIES, model_defaults
from eval.__main__ import parser as eval_parser
from eval.execution import Worker
from eval.programs.asked import asked_for
from eval.tables.preview import staged
from quantization.kv_cache import KV_POLICIES
from quantization.named import RECIPES
from quantization.programs.options import chosen_recipe
from quantization.programs.quantize import quantize_parser
from quantization.programs.train import add_train_options
from quantization.recipes.recipe import Recipe, describe
from quantization.runs.checkpoint import Checkpoint

FAKE = """#!/usr/bin/env bash
case "$*" in
    *device_count*) echo 8 ;;
    "-c "*) PYTHONPATH={root} exec {python} "$@" ;;
    *) printf '%s\\x1f' "${{@:2}}" >> "$CALLS"; echo >> "$CALLS" ;;
esac
case "$*" in *--json*) echo '{{"perplexity": 1.0}}' ;; esac
"""
Call = list[str]
Calls = Callable[..., list[Call]]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts, with that python in its environment."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE.format(root=ROOT, python=sys.executable))
    python.chmod(0o755)
    return tmp_path


def run(project: Path, call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    script, *arguments = call.split()
    environment = {name: value for name, value in os.environ.items() if name not in ("LIMIT", "WINDOW", "CORPUS")}
    return subprocess.run(
        ["bash", f"scripts/{script}.sh", *arguments],
        cwd=project,
        env=environment | {"CALLS": str(project / "calls")} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def calls(project: Path) -> Calls:
    """calls("script argument…", **variables) -> the programs that it ran, each as its words; of a table what measures,
    and with `artefacts=True` what is made for that before."""

    def made(call: str, *, artefacts: bool = False, **variables: str) -> list[Call]:
        (project / "calls").unlink(missing_ok=True)
        done = run(project, call, **variables)
        assert done.returncode == 0, done.stderr
        return ran_by(project, artefacts)

    return made


def ran_by(project: Path, artefacts: bool = False) -> list[Call]:
    """What was written down, with the programs that tables become."""
    ran = [line.split("\x1f")[:-1] for line in (project / "calls").read_text().splitlines()]
    return [words for made in ran for words in ([made] if "reproduce" not in made else becomes(made, artefacts))]


def becomes(call: Call, artefacts: bool = False) -> list[Call]:
    """The programs that `python -m eval reproduce` calls, as words behind `python -m`."""
    options = eval_parser().parse_args([*call[1:], "--dry-run"])
    asked, _, _ = asked_for(options)
    stages, worker = staged(asked), Worker(options.device, max_memory=options.max_memory)
    made = [worker.command(made)[2:] for stage in (stages if artefacts else stages[-1:]) for made in stage.calls]
    return [[word for word in words if word != "--json"] for words in made]


def recipe_of(call: Call) -> Recipe:
    """The recipe that a call's options spell for a model of the zoo, as its program reads them."""
    program, *words = call
    parsed = (eval_parser() if program == "eval" else quantize_parser(False)).parse_args(words)
    return chosen_recipe(parsed, Checkpoint(parsed.model, parsed.model.name, "", None))


def rows(made: list[Call]) -> list[str]:
    """Program, recipe's options and prefix of what a script ran, without its tables and the arms BOS, which read what
    [B] reads (`with_bos` has these); each recipe must be one."""
    found = []
    for call in made:
        if "table" in call or "--vanilla" in call:
            continue
        recipe_of(call)
        words = call[call.index("--recipe") :] if "--recipe" in call else []
        end = next((i for i, word in enumerate(words) if word in ("--protocol", "--tasks", "--prefix")), len(words))
        prefix = f" / {call[call.index('--prefix') + 1]}" if "--prefix" in call else ""
        behind = " behind" if "--calibrate-behind-prefix" in call else ""
        found.append(" ".join([call[1] if call[0] == "eval" else call[0], *words[1:end]]) + prefix + behind)
    return found


def with_bos(made: list[Call]) -> list[str]:
    """The same of the arms BOS, as rows of [B]."""
    return rows([[word for word in call if word != "--vanilla"] for call in made if "--vanilla" in call])


def protocols(made: list[Call]) -> set[str]:
    return {f"{call[1]} {call[call.index('--protocol') + 1]}" for call in made if "--protocol" in call}


def said_of(project: Path, names: Iterable[str], test: str) -> list[str]:
    """The names, as $name, of which a line of bash with the scripts' functions is true."""
    source = f"source scripts/common.sh; for name in $NAMES; do ({test}) 2> /dev/null && echo $name; done; true"
    done = subprocess.run(["bash", "-c", source], cwd=project, env=os.environ | {"NAMES": " ".join(names)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout.split()


def test_the_scripts_know_which_methods_have_weights_and_look_at_text_as_the_table_of_recipes_does(
    project: Path,
) -> None:
    calibrating = [name for name, row in RECIPES.items() if row.recipe.calibrates]
    assert said_of(project, RECIPES, "calibrates --recipe $name --bits 3") == calibrating
    whole = [name for name, row in RECIPES.items() if row.recipe.weights is None]
    assert said_of(project, RECIPES, "choose_recipe $name 16 model") == whole
    rounding = [name for name, row in RECIPES.items() if row.recipe.kv_cache is not None]
    said = said_of(
        project, RECIPES, "! (read_kv $name 16) || (read_kv $name 16; [ ${#kv[@]} -gt 0 ])"
    )  # refused, or --kv none
    assert said == rounding
    calibrating = [name for name, policy in KV_POLICIES.items() if policy.calibrates]
    assert said_of(project, KV_POLICIES, "calibrates --kv $name --kv-bits 3") == calibrating


@pytest.mark.parametrize(
    "part",
    ["--set weights=gptq", "--weights gptq-w3", "--weights=gptq-w3", "--set transforms=smooth", "--transform smooth",
     "--set kv_cache=static", "--kv static", "--set attention=omniquant-w4a4", "--activations rtn-w8a8",
     "--set activations=prefixquant-w4a4kv4-static", "--set tuning=zeroquant-w4a4-lkd"],
)  # fmt: skip
def test_parts_of_other_recipes_get_the_text_and_the_program_decides(project: Path, calls: Calls, part: str) -> None:
    given = {"OPTIONS": part, "CALIBRATION_SAMPLES": "2", "SEED": "7", "BEHIND": "bos"}
    call = "eval/eval llama-2 7b rtn 3 16 ppl 29500 cpu"
    vanilla, intact, behind = (" ".join(words) for words in calls(call, **given) if "--recipe" in words)
    assert all(f"{part} --calibration-samples 2 --seed 7" in words for words in (vanilla, intact, behind))
    assert "--prefix bos --calibrate-behind-prefix" in behind
    assert "no text" not in run(project, call, **given).stderr


SIXTEEN = [
    ("eval/eval llama-2 7b rtn 16 16 ppl 29500 cpu", "BITS 16 is full precision, METHOD 'rtn' is not"),
    ("eval/eval llama-2 7b fp16 3 16 ppl 29500 cpu", "METHOD 'fp16' has weights in full precision, but BITS is '3'"),
    ("eval/gen_mtbench_answer vicuna-v1.5 7b awq 16 cpu", "METHOD 'awq' is not"),
    ("eval/gen_mtbench_answer vicuna-v1.5 7b fp16 4 cpu", "METHOD 'fp16'"),
    ("eval/stats llama-2 7b gptq 16 cpu", "METHOD 'gptq' is not"),
    ("train/train vicuna-v1.5 7b rtn 16 cpu", "METHOD 'rtn' is not"),
    ("quantization/auto_gptq vicuna-v1.5 vicuna-v1.5-7b 16 128 cpu", "METHOD 'gptq' is not"),
    ("quantization/llm_awq vicuna-v1.5 7b 16 128 cpu", "METHOD 'awq' is not"),
    ("quantization/omniquant llama-2 7b 16 128 cpu", "METHOD 'omniquant' is not"),
]


def test_a_model_that_is_not_called_by_its_family_is_refused_before_python_starts(project: Path) -> None:
    (project / "modelzoo" / "mine" / "tiny").mkdir(parents=True)
    for call in ("quantization/auto_gptq mine tiny 4 32 cpu", "eval/eval mine tiny rtn 4 16 ppl 29500 cpu"):
        done = run(project, call)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "modelzoo/mine/mine-tiny is missing; a model is called FAMILY/FAMILY-SIZE" in done.stderr
        assert not (project / "calls").exists()


@pytest.mark.parametrize(("call", "named"), SIXTEEN)
def test_sixteen_bits_and_a_method_for_weights_are_refused(project: Path, call: str, named: str) -> None:
    done = run(project, call)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert named in done.stderr
    assert not (project / "calls").exists()


MODEL = "modelzoo/llama-2/llama-2-7b"
INSTRUCT = "modelzoo/llama-3.1-instruct/llama-3.1-instruct-8b"
CUT = "--set weights.groups=4096"


def arms(program: str, recipe: str, *prefixes: str) -> list[str]:
    return [f"{program} {recipe} / {prefix}" for prefix in prefixes or ("none", "bos")]


KVQUANT = " ".join(f"--set kv_cache.{field}" for field in (
    "outliers=0.01", "sinks=1", "levels=nuq", "qnorm=false", "weighting=fisher"
))  # fmt: skip
PIECES = "--calibration wikitext2 --calibration-samples 16 --calibration-length 2048 --seed 0"
DISTILLED = PIECES.replace("samples 16", "samples 128")
ALPHA = " --set transforms.smooth.alpha=0.55"


# The calls of the published pages: what they become, and by which protocol.
PUBLISHED: dict[str, tuple[list[str], set[str]]] = {
    "quantization/auto_gptq vicuna-v1.5 vicuna-v1.5-7b 3 128 cpu": (
        ["quantization gptq --group-size 128 --bits 3"], set(),
    ),
    "quantization/llm_awq vicuna-v1.5 7b 3 128 0": (["quantization awq --group-size 128 --bits 3"], set()),
    "eval/eval llama-2 7b awq 3 16 ppl 29500 0": (arms("ppl", "awq --bits 3"), {"ppl intactkv"}),
    "eval/eval vicuna-v1.5 7b awq 3 16 mmlu 29500 0": (arms("tasks", "awq --bits 3"), {"tasks hendrycks"}),
    "eval/eval vicuna-v1.5 7b awq 3 16 qa 29500 0": (arms("tasks", "awq --bits 3"), set()),
    "eval/eval llama-2 7b awq 3 4 ppl 29500 0": (arms("ppl", "awq --bits 3 --kv-bits 4"), {"ppl intactkv"}),
    "eval/eval vicuna-v1.5 7b awq 3 4 mmlu 29500 0": (arms("tasks", "awq --bits 3 --kv-bits 4"), {"tasks hendrycks"}),
    "eval/eval vicuna-v1.5 7b awq 3 4 qa 29500 0": (arms("tasks", "awq --bits 3 --kv-bits 4"), set()),
    "eval/gen_mtbench_answer vicuna-v1.5 7b awq 3 0": (arms("mtbench", "awq --bits 3", "none", "prompt") * 3, set()),
    "eval/quarot llama-2 7b 0": (["ppl fp16 / none", *arms("ppl", "quarot")], {"ppl intactkv"}),
    "visualization/motivation llama-2 7b 0": (["plot rtn --bits 3"], set()),
    "visualization/plot_act llama-2 7b 0": (["plot fp16"] * 3, set()),
    f"run_gptq 0 {MODEL}": (
        arms("ppl", "gptq-row --bits 4 --set weights.act_order=true --group-size -1"), {"ppl gptq"},
    ),
    f"run_smoothquant 0 {MODEL}": (
        [row for bits in ("w8a8", "w6a6") for method, words in (("rtn", ""), ("smoothquant", ALPHA))
         for row in arms("ppl", f"{method}-{bits}-qllm{words}")], {"ppl gptq"},
    ),
    f"run_lutgemm 0 {MODEL} 3": (
        arms("ppl", "bcq-row --bits 4 --group-size -1 --set weights.rounds=30 --set weights.rounds=3"), {"ppl gptq"},
    ),
    f"run_spqr 0 {MODEL}": (arms("ppl", "spqr"), {"ppl gptq"}),
    f"run_kivi 0 {MODEL}": (
        [row for bits in (4, 2) for row in arms("ppl", f"fp16 --kv kivi --kv-bits {bits} --kv-group-size 32 "
         "--set kv_cache.residual=128 --set kv_cache.prefill=final")], {"ppl gptq"},
    ),
    "eval/eval llama-2 7b awq 3 2 ppl 29500 cpu": (arms("ppl", "awq --bits 3 --kv-bits 2"), {"ppl intactkv"}),
    f"run_kvquant 0 {MODEL}": (
        [row for bits in (4, 3, 2) for row in arms("ppl", f"fp16 --kv kvquant --kv-bits {bits} {KVQUANT} {PIECES}")],
        {"ppl gptq"},
    ),
    f"run_zeroquant 0 {INSTRUCT}": (
        [row for name in ("w8a8", "w4-8a16", "w4-8a8", "w4a4") for row in arms("ppl", f"zeroquant-{name} {CUT}")]
        + [row for name, rate, counts in (("w4-8a16", "5e-6", (100, 200, 400, 600)), ("w4a4", "1e-6", (100, 200, 400)))
           for steps in counts
           for row in arms("ppl", f"zeroquant-{name}-lkd --set tuning.blocks=last --set tuning.lr={rate} "
                           f"--set tuning.steps={steps} --set tuning.batch=4 {CUT} {DISTILLED}")], {"ppl gptq"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", PUBLISHED)
def test_a_published_call_runs_what_it_ran_in_its_own_project(calls: Calls, call: str) -> None:
    made = calls(call)
    ran, by = PUBLISHED[call]
    assert rows(made) == ran
    assert protocols(made) == by
    plain = by == {"ppl gptq"}  # alone, windows and prompts open without [BOS]
    assert with_bos(made) == ([row for row in ran if row.endswith("/ bos")] if plain else [])


def test_kivi_lets_tasks_that_generate_see_their_prompt_as_it_is(calls: Calls) -> None:
    made = [" ".join(call) for call in calls(f"run_kivi cpu {MODEL}", BITS="2", TASKS="boolq,gsm8k") if "--kv" in call]
    for task, mode in (("--tasks boolq", "final"), ("--tasks gsm8k", "fp"), ("eval ppl", "final")):
        mine = [call for call in made if task in call]
        assert len(mine) == 3  # alone, BOS, [B]
        assert all(f"prefill={mode}" in call for call in mine)
    told = calls(f"run_kivi cpu {MODEL}", BITS="2", PREFILL="exact", TASKS="gsm8k")
    assert all("kv_cache.prefill=exact" in call for call in told if "--kv" in call)


def test_the_policy_of_the_cache_is_that_of_kv(calls: Calls) -> None:
    call = "eval/eval llama-2 7b rtn 3 2 ppl 29500 cpu"
    assert rows(calls(call, KV="kivi")) == arms("ppl", "rtn --bits 3 --kv kivi --kv-bits 2")
    given, text = {"CALIBRATION_SAMPLES": "2", "BEHIND": "bos"}, "--calibration-samples"
    both = arms("ppl", "rtn --bits 3 --kv static --kv-bits 2 --calibration-samples 2")
    calibrated, plain = calls(call, KV="static", **given), calls(call, KV="kivi", **given)
    assert rows(calibrated) == [*both, f"{both[-1]} behind"]
    assert rows(plain) == arms("ppl", "rtn --bits 3 --kv kivi --kv-bits 2")
    assert [text in words for words in calibrated if "--recipe" in words] == [True] * 3
    assert not any(text in words for words in plain)


def test_kvquant_calibrates_on_the_published_text_or_on_what_it_is_told(calls: Calls) -> None:
    for told, text in (({}, ("wikitext2", 0)), ({"CALIBRATION": "c4", "SEED": "3"}, ("c4", 3))):
        made = parsed(calls(f"run_kvquant 0 {MODEL}", BITS="2", **told))
        assert len(made) == 3
        assert {(one.calibration, one.seed) for one in made} == {text}
        assert {(one.calibration_samples, one.calibration_length) for one in made} == {(16, 2048)}
    (own,) = {(one.calibration, one.seed) for one in parsed(calls("run_kvquant cpu modelzoo/smollm2/smollm2-135m"))}
    assert own == (None, None)  # the embedded model's own text


def test_the_tables_of_the_paper_run_its_methods_as_it_did(calls: Calls) -> None:
    for table in ("table1", "table2", "table3"):
        made = [recipe_of(call) for call in calls(f"table/{table} cpu {MODEL}")]
        full, *others = dict.fromkeys(recipe for recipe in made)
        assert full.weights is None
        names = {recipe.method for recipe in others}
        assert names == {"rtn", "gptq", "omniquant", "awq"}
        grids = {(recipe.weights.grid.bits, recipe.weights.grid.group_size) for recipe in others}
        assert (grids, len(others), len(made)) == ({(3, 128)}, 8, 9), table


def test_train_and_the_figures_of_prefixquant_are_called_as_published(calls: Calls) -> None:
    (call,) = calls("train/train vicuna-v1.5 7b awq 3 0")
    assert call[:2] == ["intactkv", "calibrate"]
    assert " ".join(call[call.index("--recipe") :]) == (
        "--recipe awq --bits 3 --prefix prompt --out modelzoo/prefixes/vicuna-v1.5-7b-awq-w3-cal.safetensors"
    )
    made = calls(f"run_prefixquant 0 {MODEL}")
    recipe = "prefixquant-w4a4kv4-static"
    ran = rows([call for call in made if "plot" not in call])
    assert ran == ["ppl fp16 / none", *arms("ppl", recipe, "none", "auto")]
    assert protocols(made) == {"ppl gptq"}
    figures = [call[2] for call in made if "plot" in call]
    assert figures == ["linear-input", "linear-output", "outlier-layers", "outlier-count", "outlier-position",
                       "outlier-content", "layer-input-3d", "block-output-3d"]  # fmt: skip


def test_gptqs_protocol_has_its_own_draw_of_c4_and_the_sample_stays_what_smollm2_is_measured_on() -> None:
    own = {name: [model_defaults(f"{name}-7b").corpora_of(by) for by in ("intactkv", "gptq")] for name in FAMILIES}
    assert own.pop("smollm2") == [("sample",)] * 2
    assert all(both == [("wikitext2", "c4"), ("wikitext2", "c4-old")] for both in own.values())


def test_the_protocol_of_a_table_is_chosen(calls: Calls) -> None:
    for given, protocol in (({}, "gptq"), ({"PROTOCOL": "intactkv"}, "intactkv")):
        assert {one.protocol for one in parsed(calls(f"run_gptq 0 {MODEL}", **given))} == {protocol}


def test_the_protocol_is_chosen_and_printed(project: Path) -> None:
    call = "eval/eval llama-2 7b rtn 3 16 ppl 29500 0"
    for given, protocol in (({}, "intactkv"), ({"PROTOCOL": "gptq"}, "gptq")):
        done = run(project, call, **given)
        assert f"perplexity by --protocol {protocol}, MMLU by" in done.stderr
        assert done.stdout == ""  # it is the programs'


@pytest.mark.parametrize("call", ["run_lutgemm cpu model 1", "run_zeroquant cpu model", "run_smoothquant cpu model",
                                  "eval/gen_mtbench_answer llama-2 7b fp16 16 cpu"])  # fmt: skip
def test_what_a_script_says_is_not_on_the_stdout_of_its_programs(project: Path, call: str) -> None:
    done = run(project, call)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_mmlu_of_qllm_is_that_of_lm_eval_without_shots_and_other_tasks_keep_theirs(calls: Calls) -> None:
    made = [call for call in calls(f"run_gptq 0 {MODEL}", TASKS="boolq,mmlu,gsm8k") if call[1] == "tasks"]
    told = {call[call.index("--tasks") + 1]: call for call in made}
    assert set(told) == {"boolq,gsm8k", "mmlu"}
    assert "--fewshot" not in told["boolq,gsm8k"]
    assert " ".join(told["mmlu"]).count("--protocol lm-eval --fewshot 0") == 1
    made = parsed(calls(f"run_gptq 0 {MODEL}", TASKS="mmlu", MMLU_PROTOCOL="hendrycks"))
    assert {one.protocol for one in made if one.command == "tasks"} == {"hendrycks"}


@pytest.mark.parametrize("script", ["run_gptq", "run_lutgemm", "run_spqr", "run_zeroquant", "run_smoothquant",
                                    "run_prefixquant", "run_kivi"])  # fmt: skip
def test_every_method_is_scored_on_the_tasks_that_are_named(calls: Calls, script: str) -> None:
    made = calls(f"{script} cpu {MODEL}", TASKS="piqa,winogrande", DATA="sample", BATCH_SIZE="2", LIMIT="3", PLOTS="0")
    of = {program: [row.removeprefix(program) for row in rows(made) if row.startswith(program)]
          for program in ("ppl", "tasks")}  # fmt: skip
    assert of["ppl"] == of["tasks"]
    scored = [call for call in made if call[1] == "tasks"]
    assert all("--tasks piqa,winogrande" in " ".join(call) and "--limit 3" in " ".join(call) for call in scored)


def test_rows_of_the_published_tables_that_no_default_makes(calls: Calls) -> None:
    made = rows(calls("run_gptq cpu modelzoo/opt/opt-125m", BITS="4 3", ACT_ORDER="false", BESIDE="full rtn"))
    gptq = [
        row for bits in (4, 3)
        for row in arms("ppl", f"gptq-row --bits {bits} --set weights.act_order=false --group-size -1")
    ]  # fmt: skip
    rtn = [row for bits in (4, 3) for row in arms("ppl", f"rtn --bits {bits} --group-size -1")]
    assert sorted(made) == sorted([*gptq, "ppl fp16 / none", *rtn])  # in the order of the table
    made = rows(calls(f"run_lutgemm cpu {INSTRUCT}", BITS="3", GROUP_SIZE="128", BESIDE="rtn gptq"))
    assert [row.split()[1] for row in made] == ["rtn", "rtn", "gptq", "gptq", "bcq", "bcq"]
    assert all("--bits 3" in row and "--group-size 128" in row for row in made)
    dynamic = ["weights.static_groups=false" in row for row in made]
    assert dynamic == [False] * 2 + [True] * 2 + [False] * 2
    made = rows(calls(f"run_spqr cpu {INSTRUCT}", RECIPES="spqr spqr-w2"))
    assert made == [*arms("ppl", "spqr"), *arms("ppl", "spqr-w2")]
    made = rows(calls(f"run_zeroquant cpu {MODEL}"))  # cut for another model's shapes
    assert not any("weights.groups" in row for row in made)  # the recipes' own: one grid per row
    made = rows(calls(f"run_zeroquant cpu {MODEL}", RUNS="8", STEPS="3", LR="1e-4", BESIDE="full rtn"))
    of = {name: [row for row in made if name in row] for name in ("zeroquant", "lkd", "fp16", "rtn")}
    assert [len(mine) for mine in of.values()] == [12, 4, 1, 2]
    assert all("weights.groups=8" in row for row in of["zeroquant"])
    assert all("--set tuning.blocks=last --set tuning.steps=3 --set tuning.lr=1e-4" in row for row in of["lkd"])
    both = rows(calls(f"run_gptq cpu {MODEL}", ACT_ORDER="true false"))
    assert [row.split("act_order=")[1].split()[0] for row in both] == ["true", "true", "false", "false"]


def test_spqr_at_three_bits_has_the_published_numbers() -> None:
    weights = RECIPES["spqr-w2"].recipe.weights
    found = (weights.grid.bits, weights.scale_bits, weights.zero_bits, weights.grid.group_size, weights.scale_group)
    assert found == (2, 3, 3, 32, 16)  # b_w, b_s, b_z, β1, β2


@pytest.mark.parametrize(("rounds", "coding"), [("", 30), ("0", 0), ("1", 1), ("3", 3)])
def test_the_third_argument_of_lutgemm_is_the_number_of_rounds(calls: Calls, rounds: str, coding: int) -> None:
    weights = recipe_of(calls(f"run_lutgemm cpu {MODEL} {rounds}")[0]).weights
    assert (weights.rounds, weights.grid.bits, weights.grid.group_size) == (coding, 4, -1)


def test_options_reach_every_step_of_the_recipe(calls: Calls) -> None:
    given = {"OPTIONS": "--set weights.damp=0.5 --dtype float16"}
    for call in (f"run_gptq cpu {MODEL}", "eval/eval llama-2 7b gptq 3 16 ppl 29500 cpu",
                 "eval/gen_mtbench_answer llama-2 7b gptq 3 cpu", "eval/stats llama-2 7b gptq 3 cpu",
                 "train/train llama-2 7b gptq 3 cpu"):  # fmt: skip
        ran = [" ".join(words) for words in calls(call, **given) if "--recipe" in words]
        assert ran, call
        assert all(given["OPTIONS"] in words for words in ran), call
    (made,) = calls("quantization/auto_gptq llama-2 7b 3 128 cpu", OPTIONS="--set weights.damp=0.5")
    assert recipe_of(made).weights.damp == 0.5


def test_options_reach_every_row_of_a_table_or_those_of_the_method_that_they_name(calls: Calls) -> None:
    damp = "--set weights.damp=0.5"
    made = calls(f"run_gptq cpu {MODEL}", BESIDE="full rtn", OPTIONS="--set gptq:weights.damp=0.5 --dtype float16")
    told = [(row.split()[1], damp in row, "--dtype float16" in row) for row in rows(made)]
    assert told == [("fp16", False, False), *[("rtn", False, True)] * 2, *[("gptq-row", True, True)] * 2]


def test_the_one_call_of_a_trainable_prefix_becomes_the_programs_beside_it(project: Path) -> None:
    """Both as docs/prefixquant.md writes them out, read as the programs read them."""
    page = (ROOT / "docs" / "prefixquant.md").read_text(encoding="utf-8")
    call, alone = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    exported = call.split("RECIPE=")[0]

    def read(commands: str) -> list[dict[str, Any]]:
        (project / "calls").unlink(missing_ok=True)
        path = f"{project / '.venv' / 'bin'}:{os.environ['PATH']}"
        subprocess.run(["bash", "-euc", commands], cwd=project, check=True, capture_output=True,
                       env=os.environ | {"CALLS": str(project / "calls"), "PATH": path, "LIMIT": ""})  # fmt: skip
        made = ran_by(project)
        training, *scored = [words for words in made if "train-prefix" in words or any("-ft" in w for w in words)]
        train = argparse.ArgumentParser()
        add_train_options(train)
        parsed = [train.parse_args(training[2:]), *(eval_parser().parse_args(words[1:]) for words in scored)]
        assert {one.prefix for one in parsed[1:]} == {str(parsed[0].out)}
        for one in parsed:
            one.settings = describe(chosen_recipe(one, Checkpoint(one.model, "llama-2-7b", "", None))) | {"prefix": ""}
        # Where the files lie, and on which device, is the caller's.
        places = {"model", "device", "out", "run"}
        return [{k: v for k, v in vars(one).items() if k not in places} for one in parsed]

    ran, told = read(call), read(exported + alone)
    assert (ran[0]["samples"], ran[0]["held_out"], len(ran)) == (512, 64, 3)
    # The search of the prefix reads --corpus; the twin itself looks at no text.
    for training in (ran[0], told[0]):
        for name in ("calibration", "calibration_samples", "calibration_length", "seed"):
            training.pop(name)
        training["settings"].pop("calibration")
    for scoring in ran[1:] + told[1:]:
        scoring.pop("prefix")
    assert ran == told


def test_a_trainable_prefix_is_trained_and_scored_in_one_call(calls: Calls) -> None:
    given = {
        "RECIPE": "prefixquant-w4a8kv4-dynamic", "TRAINABLE": "1", "PREFIX_LEN": "8", "PREFIX_EPOCHS": "20", "FT": "1",
        "EPOCHS": "10", "CALIBRATION": "c4", "CALIBRATION_SAMPLES": "512", "CALIBRATION_LENGTH": "1024", "SEED": "42",
        "TRAIN_OPTIONS": "--prefix-lr 1e-3 --batch-size 4", "MSE_INIT_SIZE": "8", "TASKS": "piqa", "BATCH_SIZE": "16",
        "OPTIONS": "--group-size 128 --set weights.grid.convention=gptq-asym", "MAX_MEMORY": "65GiB", "PLOTS": "0",
    }  # fmt: skip
    training, *scored = [" ".join(call) for call in calls(f"run_prefixquant all {MODEL}", **given)]
    assert training.startswith("intactkv train-prefix --model")
    for words in ("--device cuda:0", "--prefix-len 8 --prefix-epochs 20 --corpus c4 --samples 512 --length 1024",
                  "--training-seed 42", "--prefix-lr 1e-3 --batch-size 4", given["OPTIONS"]):  # fmt: skip
        assert words in training
    out = training.split("--out ")[1]
    quantized = [call for call in scored if "--recipe prefixquant" in call]
    assert [call.split("--prefix ")[1].split()[0] for call in quantized] == ["none"] * 2 + [out] * 4
    assert all(given["OPTIONS"] in call and "--seed 42" in call for call in quantized)
    assert all("tuning.epochs=10" in call for call in quantized if "-ft " in call)
    assert sum("-ft " in call for call in quantized) == 2
    assert all("--device cuda:all --max-memory 65GiB" in call for call in scored if "eval table" not in call)


def parsed(made: list[Call]) -> list[argparse.Namespace]:
    return [eval_parser().parse_args(words[1:]) for words in made]


def test_needles_are_looked_for_in_caches_of_fewer_bits_with_and_without_the_prefix(calls: Calls) -> None:
    *ran, table, plot = parsed(calls(f"eval/needle 0 {INSTRUCT}", LENGTHS="1024,4096", KEYS="3"))
    policies = [("none", None), ("per_head", 4), ("per_head", 2)]
    wanted = [(*policy, prefix) for policy in policies for prefix in ("none", "bos")]
    assert [(one.kv, one.kv_bits, one.prefix) for one in ran] == wanted
    assert all((one.lengths, one.keys, one.published) == ((1024, 4096), 3, False) for one in ran)
    assert (table.which, table.model, plot.figure, plot.lengths) == (
        "needle", ["llama-3.1-instruct-8b"], "needle", (1024, 4096),
    )  # fmt: skip
    given = {"PUBLISHED": "1", "UNITS": "1", "KV_BITS": "2", "KV": "rotated", "PREFIXES": "none", "UNIT_LINES": "9"}
    (one, *_) = parsed(calls(f"eval/needle cpu {MODEL}", OPTIONS="--recipe rtn-w4", **given))
    assert (one.published, one.units, one.lines, one.kv, one.kv_bits, one.recipe) == (
        True, 1, 9, "rotated", 2, "rtn-w4",
    )  # fmt: skip


def test_a_chat_is_one_call_of_the_program_with_what_the_environment_says(
    project: Path, calls: Calls, tmp_path: Path
) -> None:
    (plain,) = parsed(calls(f"eval/chat cpu {MODEL}"))
    assert (plain.recipe, plain.kv_bits, plain.prompt, plain.script, plain.compare) == (None, None, None, None, False)
    given = {"METHOD": "gptq", "BITS": "3", "KV_BITS": "4", "PREFIX": "prompt", "PROMPTS": "riddle distillation",
             "COMPARE": "1", "MAX_NEW_TOKENS": "9", "OUT": "a b.json", "CALIBRATION_SAMPLES": "2"}  # fmt: skip
    (one,) = parsed(calls(f"eval/chat all {MODEL}", **given))
    assert (one.recipe, one.bits, one.kv_bits, one.prefix) == ("gptq", 3, 4, "prompt")
    assert (one.prompt, one.compare, one.max_new_tokens) == (["riddle", "distillation"], True, 9)
    assert (one.out, one.device, one.calibration_samples) == (project / "a b.json", "cuda:all", 2)
    (one,) = parsed(calls(f"eval/chat 0 {MODEL}", SCRIPT="lines.txt", KV_BITS="16"))
    assert (one.script, one.kv) == (project / "lines.txt", "none")
    assert "device '0,1' shares work among GPUs" in run(project, f"eval/chat 0,1 {MODEL}").stderr


def test_all_gpus_are_for_what_is_evaluated(project: Path) -> None:
    refused = run(project, "quantization/auto_gptq llama-2 7b 3 128 all")
    assert "device 'all' spreads a model that is evaluated" in refused.stderr
    done = run(project, "eval/eval llama-2 7b rtn 3 16 ppl 29500 0", MAX_MEMORY="65GiB")
    assert (done.returncode, "MAX_MEMORY is of DEVICE all" in done.stderr) == (2, True)


def test_a_linked_model_is_one_model_by_the_name_of_its_link(project: Path, calls: Calls) -> None:
    place = project / "modelzoo" / "llama-2"
    place.mkdir(parents=True)
    (project / "elsewhere").mkdir()
    (place / "llama-2-7b").symlink_to(project / "elsewhere")
    for call in ("eval/eval llama-2 7b rtn 3 16 ppl 29500 cpu", f"run_gptq cpu {MODEL}",
                 f"run_spqr cpu ./modelzoo/../{MODEL}/", f"table/table1 cpu {MODEL} rtn",
                 f"table/weights cpu {MODEL} rtn", f"table/seeds cpu {MODEL} gptq-w3",
                 f"visualization/prefixquant cpu {MODEL}", f"eval/chat cpu {MODEL}"):  # fmt: skip
        ran = [words for words in calls(call) if words[1] != "table"]
        assert {words[words.index("--model") + 1] for words in ran} == {str(place / "llama-2-7b")}, call


def test_answers_are_also_made_behind_the_prefix_that_train_has_trained(project: Path, calls: Calls) -> None:
    train, answer = (f"{script} vicuna-v1.5 7b awq 3 cpu" for script in ("train/train", "eval/gen_mtbench_answer"))
    for group in ({}, {"GROUP_SIZE": "64"}):
        (trained,) = calls(train, **group)
        out = project / trained[trained.index("--out") + 1]
        before = calls(answer, SEEDS="42", **group)
        assert [call[call.index("--prefix") + 1] for call in before] == ["none", "prompt"]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
        after = calls(answer, SEEDS="42", **group)
        assert [call[call.index("--prefix") + 1] for call in after] == ["none", "prompt", str(out.relative_to(project))]


@pytest.mark.parametrize("name", ["vicuna-v1.5/vicuna-v1.5-7b", "vicuna-v1.5-7b", "vicuna-7b-v1.5"])
def test_awq_takes_the_file_of_the_zoo_where_the_published_code_keeps_it(
    project: Path, calls: Calls, name: str
) -> None:
    file = project / "modelzoo" / "llm-awq" / f"{name}-w3-g128.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    setting = f"weights.file={file.relative_to(project)}"
    for call in ("eval/eval vicuna-v1.5 7b awq 3 16 ppl 29500 cpu", "train/train vicuna-v1.5 7b awq 3 cpu",
                 "eval/gen_mtbench_answer vicuna-v1.5 7b awq 3 cpu",
                 "quantization/llm_awq vicuna-v1.5 7b 3 128 cpu"):  # fmt: skip
        assert f"AWQ: scales and clip limits are those of {file.relative_to(project)}" in run(project, call).stderr
        assert all(setting in made for made in calls(call) if made[1] != "table"), call
    others = calls("eval/eval vicuna-v1.5 7b awq 4 16 ppl 29500 cpu")  # of other bits
    others += calls("eval/eval vicuna-v1.5 7b rtn 3 16 ppl 29500 cpu")
    others += calls("eval/eval vicuna-v1.5 7b awq 3 16 ppl 29500 cpu", CALIBRATION="c4")  # a search
    assert not [made for made in others if setting in made]


@pytest.mark.parametrize("script", ["eval/stats", "eval/eval", "train/train", "eval/gen_mtbench_answer"])
def test_what_is_said_of_calibration_reaches_methods_that_calibrate_and_no_other(
    project: Path, calls: Calls, script: str
) -> None:
    rest = "3 16 ppl 29500 cpu" if script == "eval/eval" else "3 cpu"
    given = {"CALIBRATION_SAMPLES": "2", "SEED": "7"}
    for method, reached in (("gptq", True), ("rtn", False), ("bcq", False)):
        call = f"{script} llama-2 7b {method} {rest}"
        ran = [" ".join(words) for words in calls(call, **given) if "--recipe" in words]
        assert {"--calibration-samples 2 --seed 7" in words for words in ran} == {reached}
        assert (f"do not reach {method}: it looks at no text" in run(project, call, **given).stderr) is not reached


@pytest.mark.parametrize("script", ["eval/chat", "eval/needle"])
def test_what_is_said_of_calibration_reaches_a_cache_that_calibrates(calls: Calls, script: str) -> None:
    given = {"KV": "static", "KV_BITS": "4", "CALIBRATION_SAMPLES": "2", "SEED": "7"}
    for kv, reached in (("static", True), ("kivi", False)):
        ran = [one for one in parsed(calls(f"{script} cpu {MODEL}", **(given | {"KV": kv}))) if hasattr(one, "kv")]
        assert {(one.kv, one.kv_bits) for one in ran} == {(kv, 4)}
        assert {(one.calibration_samples, one.seed) for one in ran} == {(2, 7) if reached else (None, None)}


@every("given", [{"METHOD": "kv4"}, {"KV": "kivi"}])
def test_a_chat_whose_method_rounds_the_cache_refuses_sixteen_bits(project: Path, given: dict[str, str]) -> None:
    done = run(project, f"eval/chat cpu {MODEL}", KV_BITS="16", **given)
    assert done.returncode == 2
    assert "rounds the KV cache, but KV_BITS is 16" in done.stderr
    assert not (project / "calls").exists()


def test_a_chat_takes_the_file_of_a_calibrated_cache_without_bits(calls: Calls) -> None:
    (one,) = parsed(calls(f"eval/chat cpu {MODEL}", KV="made.safetensors", METHOD="rtn-w4", BITS="4"))
    assert (one.kv, one.kv_bits) == ("made.safetensors", None)


def test_figures_take_a_quantized_model_its_cache_and_its_text(calls: Calls) -> None:
    given = {"METHOD": "gptq", "BITS": "3", "KV_BITS": "2", "CALIBRATION_SAMPLES": "2"}
    for call in ("plot_act llama-2 7b cpu", "motivation llama-2 7b cpu", f"prefixquant cpu {MODEL}"):
        for made in calls(f"visualization/{call}", **given):
            recipe = recipe_of(made)
            assert (recipe.weights.name, recipe.kv_cache.bits, recipe.calibration.samples) == ("gptq", 2, 2)


def test_mt_bench_is_fetched_with_intactkvs_own_reference_answers(project: Path) -> None:
    sources = {}
    for variable, files in (("MTBENCH_SOURCE", ("mt_bench/question.jsonl", "mt_bench/reference_answer/gpt-4.jsonl",
                                                "judge_prompts.jsonl")),
                            ("INTACTKV_SOURCE", ("mt_bench/reference_answer/gpt-4-0125-preview.jsonl",))):  # fmt: skip
        for file in files:
            place = project / variable / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file)
        sources[variable] = f"file://{project / variable}"
    fake = project / ".venv" / "bin" / "python"
    shutil.copy(shutil.which("true") or "/bin/true", fake)  # the check of their form is not this test's
    done = run(project, "prepare/mtbench", **sources)
    assert done.returncode == 0, done.stderr
    there = {str(path.relative_to(project / "fastchat/data/mt_bench"))
             for path in (project / "fastchat").rglob("*.jsonl")}  # fmt: skip
    assert there == {"question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl",
                     "reference_answer/gpt-4-0125-preview.jsonl"}  # fmt: skip
    assert "No checked hash of these files is known here" in done.stdout


# What the environment and the arguments say ---------------------------------------------------------------------------


def test_a_word_of_a_variable_is_no_pattern_and_quotes_keep_spaces_together(project: Path, calls: Calls) -> None:
    (project / "star.txt").touch()
    given = {"OPTIONS": "--corpus 'my *.txt' --set weights.damp=0.1\n  --prefix \"a b\"", "BEHIND": "* of spaces"}
    made = calls("eval/eval llama-2 7b gptq 3 16 ppl 29500 cpu", **given)
    for words in (words for words in made if "--recipe" in words):
        assert words[words.index("--corpus") + 1] == "my *.txt"
        assert words[words.index("--set") + 1] == "weights.damp=0.1"
        assert "a b" in words
    behind = next(words for words in made if "--calibrate-behind-prefix" in words)
    assert behind[behind.index("--calibrate-behind-prefix") - 1] == "* of spaces"
    (made,) = calls("quantization/auto_gptq llama-2 7b 3 128 cpu", BEHIND="* of spaces")
    assert made[made.index("--prefix") + 1] == "* of spaces"
    scored = calls(f"run_gptq cpu {MODEL}", CORPUS="a *.txt", OPTIONS="--set 'weights.damp=0.1'\n --dtype float16")
    assert {words[words.index("--corpus") + 1] for words in scored} == {"a *.txt"}
    assert {words[words.index("--dtype") + 1] for words in scored} == {"float16"}
    answered = calls("eval/gen_mtbench_answer llama-2 7b fp16 16 cpu", SEEDS="* 7", PREFIXES="'a b' *")
    assert [words[words.index("--prefix") + 1] for words in answered] == ["a b", "*"] * 2
    seeds = [words[words.index("--answer-seed") + 1] for words in answered]
    assert seeds == ["*", "*", "7", "7"]


@pytest.mark.parametrize("variable", ["OPTIONS", "BITS", "TRAIN_OPTIONS", "RECIPES", "PREFIXES"])
def test_a_quote_that_is_not_closed_is_one_line(project: Path, variable: str) -> None:
    call = {"TRAIN_OPTIONS": f"run_prefixquant cpu {MODEL}", "RECIPES": f"run_smoothquant cpu {MODEL}",
            "PREFIXES": "eval/gen_mtbench_answer llama-2 7b fp16 16 cpu"}  # fmt: skip
    done = run(project, call.get(variable, f"run_gptq cpu {MODEL}"), **{variable: "rtn 'open", "TRAINABLE": "1"})
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(said)) == (2, 1), done.stderr
    assert f"{variable}: a quote is not closed" in said[0]


DEVICES = [",", "0,", ",0", "0,0", "1,01", "all,1", "-1", " ", "", "*", "0 1", "cpu,0", "9" * 20, "0x1", "٣"]
WITH_DEVICE = [("run_gptq", "DEVICE", MODEL), ("run_prefixquant", "DEVICE", MODEL), ("table/table1", "DEVICE", MODEL),
               ("eval/quarot", "llama-2", "7b", "DEVICE"), ("train/train", "llama-2", "7b", "awq", "3", "DEVICE"),
               ("eval/eval", "llama-2", "7b", "rtn", "3", "16", "ppl", "29500", "DEVICE")]  # fmt: skip


def said_by(project: Path, script: str, *arguments: str) -> str:
    """The one line that refuses arguments, which may be empty or have spaces; nothing runs."""
    done = subprocess.run(
        ["bash", f"scripts/{script}.sh", *arguments], cwd=project, capture_output=True, text=True, check=False,
        env=os.environ | {"CALLS": str(project / "calls"), "TRAINABLE": "1"},
    )  # fmt: skip
    said = refusals(done.stderr)
    assert (done.returncode, len(said)) == (2, 1), (script, done.stderr)
    assert not (project / "calls").exists(), script
    return said[0]


@every("device", DEVICES)
def test_a_device_that_is_none_is_refused_before_anything_runs(project: Path, device: str) -> None:
    for script, *arguments in WITH_DEVICE if device == "," else WITH_DEVICE[:2]:
        given = [device if word == "DEVICE" else word for word in arguments]
        assert f"error: device '{device}' " in said_by(project, script, *given), script


WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "a switch that is neither on nor off": (f"run_prefixquant cpu {MODEL}", {"FT": "yes"}, "FT='yes' is not allowed"),
    "figures, perhaps": (f"run_prefixquant cpu {MODEL}", {"PLOTS": "2"}, "PLOTS='2' is not allowed; give 1 or 0"),
    "memory, perhaps": ("train/train llama-2 7b awq 3 cpu", {"CHECKPOINTING": "x"}, "CHECKPOINTING='x' is not allowed"),
    "tasks without names": (f"run_prefixquant cpu {MODEL}", {"TASKS": ","}, "TASKS=',' are no names"),
    "tasks with spaces": (f"run_prefixquant cpu {MODEL}", {"TASKS": "piqa mmlu"}, "give them joined by commas"),
    "an order": (
        f"run_gptq cpu {MODEL}",
        {"ACT_ORDER": "no"},
        "ACT_ORDER='no' is not allowed; give true, false or both",
    ),
    "rounds": (f"run_lutgemm cpu {MODEL} x", {}, "ROUNDS 'x' is no number"),
    "a port": ("eval/eval llama-2 7b rtn 3 16 ppl x cpu", {}, "PORT 'x' is no port; give 1 to 65535, such as 29500"),
    "a large port": ("eval/eval llama-2 7b rtn 3 16 ppl 65536 cpu", {}, "PORT '65536' is no port; give 1 to 65535"),
    "a root that is not there": (
        f"run_gptq cpu {MODEL}",
        {"INTACTKV_ROOT": "/no/where"},
        "'/no/where' is no directory",
    ),
    "an install of nothing known": ("setup prod", {}, "usage: setup.sh [dev|oldest] (got 'prod')"),
    "a demo of something": ("demo smollm2", {}, "usage: demo.sh (got 1 of 0 arguments)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_script_cannot_take_is_one_line_before_anything_runs(project: Path, case: str) -> None:
    call, given, said = WRONG[case]
    done = run(project, call, **given)
    found = refusals(done.stderr)
    assert (done.returncode, len(found)) == (2, 1), done.stderr
    assert said in found[0]
    assert not (project / "calls").exists()


def test_an_empty_word_in_place_of_a_model_is_refused(project: Path) -> None:
    for script, *arguments in (("run_gptq", "cpu", ""), ("eval/quarot", "llama-2", "", "cpu"),
                               ("train/train", "", "7b", "awq", "3", "cpu"), ("table/weights", "cpu", "")):  # fmt: skip
        assert "is empty; give" in said_by(project, script, *arguments)


def test_a_switch_that_is_off_is_not_on(calls: Calls) -> None:
    given = {value: calls("train/train llama-2 7b awq 3 cpu", CHECKPOINTING=value)[0] for value in ("1", "0", "")}
    assert ["--checkpointing" in given[value] for value in ("1", "0", "")] == [True, False, False]


@pytest.mark.parametrize("spelled", ["{root}", "here/../root of it"])
def test_scripts_find_models_where_the_programs_do(project: Path, calls: Calls, spelled: str) -> None:
    """Under INTACTKV_ROOT, with spaces and relative to where the script is called."""
    root = project / "root of it"
    (project / "here").mkdir()
    file = root / "modelzoo" / "llm-awq" / "llama-2-7b-w3-g128.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    given = {"INTACTKV_ROOT": spelled.format(root=root)}
    for call in ("eval/eval llama-2 7b awq 3 16 ppl 29500 cpu", "train/train llama-2 7b awq 3 cpu",
                 "quantization/llm_awq llama-2 7b 3 128 cpu"):  # fmt: skip
        for words in calls(call, **given):
            if "--model" in words and "table" not in words:
                assert words[words.index("--model") + 1] == f"{root}/modelzoo/llama-2/llama-2-7b"
                assert f"weights.file={file}" in words
    (trained,) = calls("train/train llama-2 7b rtn 3 cpu", **given)
    assert trained[trained.index("--out") + 1] == f"{root}/modelzoo/prefixes/llama-2-7b-rtn-w3-cal.safetensors"
    plain = calls("eval/quarot llama-2 7b cpu", INTACTKV_ROOT="")[0]
    assert plain[plain.index("--model") + 1] == f"{project}/modelzoo/llama-2/llama-2-7b"
