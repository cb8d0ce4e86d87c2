"""What every KV policy can be told: groups, bits of keys and values, conventions. Against plain loops."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Rounds, every
from scipy.linalg import hadamard
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from corpora.errors import UserError
from eval.__main__ import main as evaluate
from eval.inside.kv_report import stored_bits
from intactkv.architecture import architecture_of
from quantization.__main__ import main as quantize
from quantization.kv_cache import KV_POLICIES, ClippedPerHead, Grids, PerHead, Rotated, StaticPerHead, kv_bits
from quantization.labels import kv_label
from quantization.model.blocks import DecoderBlock
from quantization.model.stream import CalibrationStream
from quantization.recipes.protocols import restored
from quantization.recipes.recipe import Recipe, describe, with_settings
from quantization.runs.checkpoint import PARTS
from quantization.runs.plan import plan_run

HEADS, SIZE = 2, 16
GROUPS = (None, 16, 8, 4, -1)
CONVENTIONS = ("minmax-asym", "gptq-asym", "gptq-sym")
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))


def states(seed: int = 0) -> Tensor:
    """(2, 2, 5, 16); heads of different sizes, one of them far from 0."""
    x = torch.randn(2, HEADS, 5, SIZE, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([0.3, 2.0]).view(1, 2, 1, 1) + torch.tensor([0.0, 5.0]).view(1, 2, 1, 1)


def groups_of(x: Tensor, group_size: int | None) -> Iterator[list[tuple[int, int, int, int]]]:
    """The places (batch, head, token, channel) of one group of one token after another."""
    for batch in range(x.shape[0]):
        for token in range(x.shape[2]):
            places = [(batch, head, token, channel) for head in range(HEADS) for channel in range(SIZE)]
            size = {None: SIZE, -1: HEADS * SIZE}.get(group_size, group_size)
            assert size is not None
            yield from (places[i : i + size] for i in range(0, len(places), size))


def grid_of(low: float, high: float, bits: int, convention: str) -> tuple[float, int]:
    """Scale and zero point of a range, by the published formulas."""
    if convention == "gptq-sym":
        return 2 * max(abs(low), abs(high)) / (2**bits - 1), 2 ** (bits - 1)
    if convention == "gptq-asym":
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def by_hand(x: Tensor, group_size: int | None, bits: int, convention: str, keep: float = 1.0) -> Tensor:
    result = torch.empty(x.shape, dtype=torch.float64)
    for places in groups_of(x, group_size):
        values = [float(x[place]) for place in places]
        scale, zero = grid_of(min(values) * keep, max(values) * keep, bits, convention)
        for place, value in zip(places, values, strict=True):
            # The largest value of a symmetric grid is always half way between two levels: float32 decides.
            steps = float(torch.tensor(value) / torch.tensor(scale))
            result[place] = (min(max(round(steps) + zero, 0), 2**bits - 1) - zero) * scale
    return result


@every("group_size", GROUPS)
@every("convention", CONVENTIONS)
def test_per_head_rounds_every_group_of_keys_and_values_by_its_own_bits(group_size: Any, convention: str) -> None:
    policy, x = PerHead(4, convention, v_bits=2, group_size=group_size), states()
    assert_close(Rounds(policy).keys(x).double(), by_hand(x, group_size, 4, convention), rtol=1e-5, atol=1e-5)
    assert_close(Rounds(policy).values(x).double(), by_hand(x, group_size, 2, convention), rtol=1e-5, atol=1e-5)
    half = Rounds(policy).keys(x.bfloat16())
    assert (half.dtype, half.shape) == (torch.bfloat16, x.shape)


@every("group_size", GROUPS)
@every("convention", ["gptq-asym", "gptq-sym"])
def test_rotated_rounds_groups_behind_the_rotation_of_a_head(group_size: Any, convention: str) -> None:
    policy, x = Rotated(4, 0.9, convention=convention, v_bits=3, group_size=group_size), states(1)
    matrix = torch.from_numpy(hadamard(SIZE)).double() / SIZE**0.5
    keys = by_hand((x.double() @ matrix.T).float(), group_size, 4, convention, 0.9) @ matrix
    assert_close(Rounds(policy).keys(x).double(), keys, rtol=1e-4, atol=1e-4)
    values = "minmax-asym" if convention == "gptq-asym" else convention
    assert_close(Rounds(policy).values(x).double(), by_hand(x, group_size, 3, values, 0.9), rtol=1e-4, atol=1e-4)


def block_of(model: PreTrainedModel) -> DecoderBlock:
    architecture = architecture_of(model.config)
    block = DecoderBlock(
        0,
        architecture.blocks_of(model)[0],
        architecture,
        model.config,
        CalibrationStream(model, architecture, SEGMENTS),
    )
    assert block.stream is not None
    block.stream.seed(block)
    return block


@every("group_size", GROUPS)
@every("convention", CONVENTIONS)
def test_clipped_cuts_every_group_of_the_values(group_size: Any, convention: str, tiny_model: Any) -> None:
    kv = ClippedPerHead(8, convention, keep=0.9, v_bits=4, group_size=group_size)
    policy, x = Rounds(kv, kv.fit_block(block_of(tiny_model("llama")))), states(2)
    assert_close(Rounds(policy).keys(x).double(), by_hand(x, group_size, 8, convention), rtol=1e-5, atol=1e-5)
    assert_close(Rounds(policy).values(x).double(), by_hand(x, group_size, 4, convention, 0.9), rtol=1e-5, atol=1e-5)


@every("group_size", GROUPS)
@every("convention", ["gptq-asym", "gptq-sym"])
def test_a_static_group_takes_its_range_from_the_text(group_size: Any, convention: str, tiny_model: Any) -> None:
    block = block_of(tiny_model("llama"))
    kv = StaticPerHead(4, convention, v_bits=3, group_size=group_size)
    policy = Rounds(kv, kv.fit_block(block))
    for name, bits, samples in zip(("keys", "values"), (4, 3), zip(*block.keys_and_values(), strict=True), strict=True):
        text = torch.cat([x[0].transpose(0, 1) for x in samples])  # (tokens, heads, D): all of a layer
        flat = text.flatten(1)
        size = {None: SIZE, -1: HEADS * SIZE}.get(group_size, group_size)
        assert size is not None
        expected = torch.empty(flat.shape, dtype=torch.float64)
        for start in range(0, flat.shape[1], size):
            part = flat[:, start : start + size].double()
            scale, zero = grid_of(float(part.min()), float(part.max()), bits, convention)
            codes = ((part / scale).round() + zero).clamp(0, 2**bits - 1)
            expected[:, start : start + size] = (codes - zero) * scale
        rounded = getattr(Rounds(policy), name)(text.transpose(0, 1)[None])[0].transpose(0, 1).flatten(1)
        wrong = (rounded.double() - expected).abs() > 1e-4  # a value in the middle of two levels may go either way
        assert wrong.float().mean() < 0.005


def test_smaller_groups_and_more_bits_of_values_err_less() -> None:
    x = states(3)
    errors = [float((Rounds(PerHead(3, group_size=size)).keys(x) - x).norm()) for size in (-1, None, 8, 4)]
    assert errors == sorted(errors, reverse=True)
    few, many = (float((Rounds(PerHead(3, v_bits=bits)).values(x) - x).norm()) for bits in (2, 5))
    assert few > 2 * many


# words, labels, identities --------------------------------------------------------------------------------------------


@every("name", [name for name, kind in KV_POLICIES.items() if issubclass(kind, Grids)])
def test_every_policy_is_told_of_its_groups_by_settings_and_says_so(name: str) -> None:
    kind = KV_POLICIES[name]
    plain = kind(4)
    told = with_settings(Recipe(kv_cache=plain), ["kv_cache.group_size=8", "kv_cache.v_bits=2",
                                                  "kv_cache.convention=gptq-sym"]).kv_cache  # fmt: skip
    assert told == replace(plain, group_size=8, v_bits=2, convention="gptq-sym")
    assert kv_bits(describe(told)) == "4,2g8"
    assert kv_bits(describe(replace(plain, group_size=-1))) == "4token"
    assert kv_label(describe(plain)) == f"4 {name}"
    assert not {"group_size", "v_bits"} & describe(plain).keys()  # records and checkpoints of before are still found
    assert replace(plain, v_bits=4).in_heads(16) == plain
    orders = (["kv_cache.v_bits=4", "kv_cache.bits=3"], ["kv_cache.bits=3", "kv_cache.v_bits=4"])
    assert {with_settings(Recipe(kv_cache=plain), order).kv_cache for order in orders} == {kind(3, v_bits=4)}
    assert with_settings(Recipe(kv_cache=told), ["kv_cache.group_size=none"]).kv_cache == replace(told, group_size=None)


def test_records_of_the_range_that_held_zero_are_told_apart() -> None:
    earlier = {"kind": "PerHead", "bits": 4}
    assert kv_label(earlier) == "4 per_head intactkv-asym"
    assert describe(PerHead(4, "intactkv-asym")) == earlier != describe(PerHead(4))
    assert restored(earlier, PARTS) == PerHead(4, "intactkv-asym")


@every("size", [3, 32])
def test_groups_that_do_not_fill_a_head_are_refused_before_any_work(size: int, checkpoint: Callable[..., Path]) -> None:
    recipe = Recipe(kv_cache=PerHead(4, group_size=size))
    with pytest.raises(UserError, match=f"group_size={size} does not divide the 16 channels of a head; use a divisor"):
        plan_run(checkpoint(), recipe, device=torch.device("cpu"))


@every(
    ("policy", "expected"),
    [
        (PerHead(4), 4 + 64 / 16),
        (PerHead(4, scale_dtype="float16"), 4 + 32 / 16),
        (PerHead(4, v_bits=2, group_size=8, scale_dtype="float16"), 3 + 32 / 8),
        (PerHead(4, "gptq-sym"), 4 + 32 / 16),
        (Rotated(4, group_size=-1), 4 + (40 + 64) / 2 / 32),
        (StaticPerHead(4, v_bits=3), 3.5),
        (None, 16.0),
    ],
)
def test_bits_of_an_element_count_the_scales_of_its_group(policy: Any, expected: float) -> None:
    assert sum(stored_bits(policy, 16, 2)) / 2 == expected


OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "keys and values apart": (("--k-bits", "4", "--v-bits", "2"), PerHead(4, v_bits=2)),
    "values alone": (("--kv-bits", "4", "--v-bits", "2", "--kv-group-size", "8"), PerHead(4, v_bits=2, group_size=8)),
    "of the recipe": (("--recipe", "kv4", "--k-bits", "8", "--kv-group-size", "-1"),
                      PerHead(8, v_bits=4, group_size=-1)),
    "by name": (("--kv", "rotated", "--k-bits", "3", "--v-bits", "4"), Rotated(3, v_bits=4)),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_say_bits_and_groups(case: str, checkpoint: Any, text: Path, run_main: Any) -> None:
    options, expected = OPTIONS[case]
    code, out, err = run_main(
        evaluate, "ppl", "--model", checkpoint(), "--corpus", text, "--window", 32, "--limit", 1, "--json", *options
    )
    assert code == 0, err
    assert json.loads(out)["settings"]["kv"] == describe(expected)


@every(
    ("options", "said"),
    [
        (("--v-bits", "4"), "--v-bits: the KV cache has full precision; add --kv-bits"),
        *(
            (("--kv", "none", option, "8"), f"--kv none keeps the cache in full precision, but {option} 8 rounds it; ")
            for option in ("--kv-bits", "--k-bits", "--v-bits", "--kv-group-size")
        ),
        (("--kv-bits", "4", "--v-bits", "16"), "KV bits=16 is not supported"),
        (("--kv-bits", "4", "--kv-group-size", "5"), "group_size=5 does not divide the 16 channels of a head"),
        (("--kv-bits", "4", "--set", "kv_cache.group_size=x"), "give a whole number"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(
    options: Any, said: str, checkpoint: Any, text: Path, run_main: Any
) -> None:
    code, _, err = run_main(evaluate, "ppl", "--model", checkpoint(), "--corpus", text, *options)
    assert (code, len(err.splitlines())) == (2, 1)
    assert said in err


@pytest.mark.parametrize("group_size", [8, SIZE, -1])
def test_ranges_of_a_checkpoint_are_not_taken_for_other_groups(
    group_size: int, checkpoint: Any, text: Path, intactkv_root: Path, run_main: Any
) -> None:
    made = intactkv_root / "made"
    calibration = ("--calibration", text, "--calibration-samples", 2, "--calibration-length", 20)
    code, _, err = run_main(
        quantize, "--model", checkpoint(), "--recipe", "prefixquant-w4a8kv4-static", "--prefix", "none", *calibration,
        "--k-bits", 4, "--v-bits", 3, "--kv-group-size", group_size, "--set", "tuning.mse_init_size=2", "--out", made,
    )  # fmt: skip
    assert code == 0, err
    run = ("ppl", "--model", made, "--corpus", text, "--window", 16, "--limit", 2, "--json")
    code, out, err = run_main(evaluate, *run)
    assert code == 0, err
    kv = json.loads(out)["settings"]["kv"]
    assert (kv["bits"], kv["v_bits"]) == (4, 3)
    assert kv.get("group_size") == (None if group_size == SIZE else group_size)
    for others in (("--kv-group-size", 8 if group_size == SIZE else SIZE), ("--kv", "static", "--kv-bits", 4)):
        code, out, err = run_main(evaluate, *run, *others, *calibration)
        assert code == 0, err
        made_of = json.loads(out)["settings"]["kv_made_of"]  # an artefact of its own
        assert made_of["kv"] == json.loads(out)["settings"]["kv"] != kv
    assert "kv_made_of" not in json.loads(run_main(evaluate, *run)[1])["settings"]
    code, _, err = run_main(evaluate, *run, *calibration)
    assert (code, "calibrates on no text" in err) == (2, True)
    apart = ("--k-bits", 4, "--v-bits", 3)
    for same in (("--kv-group-size", group_size), ("--kv", "static", "--kv-bits", 4, "--v-bits", 3), ("--kv", "static"),
                 ("--kv", "static", *apart, "--kv-group-size", group_size)):  # fmt: skip
        code, out, err = run_main(evaluate, *run, *same)
        assert (code, json.loads(out)["settings"]["kv"]) == (0, kv), err
    for none in (("--kv", "none"), ("--set", "kv_cache=none")):
        code, out, err = run_main(evaluate, *run, *none)
        assert (code, json.loads(out)["settings"]["kv"]) == (0, None), err
    for part in (("--weights", "none"), ("--activations", "none"), ("--transform", "none"), ("--recipe", "fp16"),
                 ("--set", "tuning=none"), ("--set", "attention=none")):  # fmt: skip
        code, _, err = run_main(evaluate, *run, *part)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "is quantized already" in err


def test_groups_of_a_whole_head_are_heads(checkpoint: Callable[..., Path]) -> None:
    for policy in (PerHead(4, group_size=SIZE), Rotated(4, v_bits=2, group_size=SIZE)):
        plan = plan_run(checkpoint(), Recipe(kv_cache=policy), device=torch.device("cpu"))
        assert plan.recipe.kv_cache == replace(policy, group_size=None)


def test_a_group_size_of_weights_names_a_divisor_of_all_linears(
    tiny_checkpoint: Any, tmp_path: Path, run_main: Any
) -> None:
    source = tiny_checkpoint(tmp_path, "llama", hidden_size=60, head_dim=16, intermediate_size=84)
    recipes = (("--recipe", "rtn", "--group-size", "32"),
               ("--recipe", "rtn-w8a8", "--set", "activations.grid.group_size=30"))  # fmt: skip
    for recipe in recipes:
        code, _, err = run_main(quantize, "--model", source, *recipe, "--out", tmp_path / "out")
        assert (code, len(err.splitlines())) == (2, 1)
        # 60, 64 and 84 input channels
        assert "use a divisor of 4, as the block's linears have 60 and 64 and 84, or -1" in err
