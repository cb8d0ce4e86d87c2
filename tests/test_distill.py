"""ZeroQuant's distillation of blocks: what is trained, through which gradients, on what, and what comes of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quantization.tuning.distill
from corpora.errors import UserError
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache import PerHead
from quantization.model.activations import Activations, quantize_inputs
from quantization.model.blocks import DecoderBlock
from quantization.model.inputs import put_in_front
from quantization.model.online import OnlineRotation
from quantization.model.stream import CalibrationStream
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import block_file, load_quantized, read_block
from quantization.runs.pipeline import quantize_checkpoint
from quantization.tuning.distill import Distill, Student
from quantization.weights.gptq import GPTQ
from quantization.weights.rtn import RTN
from quantization.weights.zeroquant import ZeroQuant

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
ROW3 = UniformGrid(3, convention="deepspeed-sym")
TOKEN4 = Activations(UniformGrid(4, convention="deepspeed-sym"))
W3 = ZeroQuant(ROW3, attention_bits=4)
QUICK = Distill(steps=10, lr=1e-3, batch=2, held_out=1)
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (4, 12), generator=torch.Generator().manual_seed(5))


pytestmark = pytest.mark.usefixtures("no_grad")


def first_block(model: PreTrainedModel, prefix: Tensor | None = None, segments: Tensor = SEGMENTS) -> DecoderBlock:
    """The first block as the pipeline hands it over."""
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, segments, prefix)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    stream.full = list(stream.hidden)
    stream.targets = list(stream.outputs(block, stream.full))
    return block


def stream_of(block: DecoderBlock) -> CalibrationStream:
    assert block.stream is not None
    return block.stream


def student_of(block: DecoderBlock, weights: Any = W3, inputs: Activations | None = TOKEN4) -> Student:
    return Student(block, weights, {} if inputs is None else inputs.fit_block(block))


def state(block: DecoderBlock) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.module.state_dict().items()}


def deepspeed(x: Tensor, bits: int) -> Tensor:
    """The symmetric rule, row by row, as autograd sees it in the published code: the gradient of x̂ is that of x."""
    scale = x.detach().abs().amax(dim=-1, keepdim=True) / 2 ** (bits - 1)
    rounded = (x.detach() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return x + (rounded - x).detach()


# the student ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["no prefix", "behind a prefix"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_without_quantizers_the_loss_is_zero_and_nothing_moves(
    model_type: str, prefix: Tensor | None, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type), prefix)
    before = state(block)
    assert [float(student_of(block, None, None).loss(i)) for i in range(4)] == [0.0] * 4
    assert QUICK.tune_block(block, None, {}, None) == {}
    assert {name: torch.equal(x, before[name]) for name, x in block.module.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert block.figures == {
        "loss_before": 0, "loss_after": 0, "squared_error": 0, "squared_error_first_token": 0}  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_gradients_are_those_of_a_block_whose_rounding_is_the_identity_to_them(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(model_type)
    block = first_block(model)
    student = student_of(block)
    for master in student.masters:
        master.requires_grad_(True)
    with torch.enable_grad():
        student.loss(0).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())

    # The same by hand: a block whose linears compute x̂ ŵᵀ + b, gradients by autograd.
    truth = tiny_model(model_type)
    twin = first_block(truth)
    for parameter in twin.module.parameters():
        parameter.requires_grad_(True)
    handles = [
        linear.register_forward_hook(
            lambda module, args, _out, bits=4 if "attn" in name else 3: nn.functional.linear(
                deepspeed(args[0], 4), deepspeed(module.weight, bits), module.bias
            )
        )
        for name, linear in twin.linears().items()
    ]
    stream = stream_of(twin)
    with torch.enable_grad():
        output = stream.forward(twin, stream.full[0])
        added = torch.stack([(y - x).square().mean() for x, y in zip(stream.full, stream.targets, strict=True)]).mean()
        loss = (output - stream.targets[0]).square().mean() / added
        loss.backward()
    for handle in handles:
        handle.remove()
    assert float(student.loss(0)) == pytest.approx(float(loss), rel=1e-4)
    expected = dict(twin.module.named_parameters())
    assert len(expected) == len(student.masters)
    largest = max(float(parameter.grad.abs().max()) for parameter in expected.values() if parameter.grad is not None)
    for master, (name, parameter) in zip(student.masters, expected.items(), strict=True):
        assert master.grad is not None, name
        assert parameter.grad is not None
        size = float(parameter.grad.abs().max())
        assert size > 1e-4 * largest or name.endswith("k_proj.bias")  # a bias of keys moves no softmax
        torch.testing.assert_close(master.grad, parameter.grad, rtol=0, atol=1e-3 * size + 1e-6 * largest)


def test_the_gradient_of_rounded_inputs_is_one_for_clamped_values_too() -> None:
    linear = nn.Linear(8, 8, bias=False)
    linear.weight.data = torch.eye(8)
    module = nn.ModuleDict({"only": linear})
    quantizer = next(iter(TOKEN4.fit_block(_Sets()).values()))  # type: ignore[arg-type]
    quantization.tuning.distill.round_inputs(module, {("only",): quantizer})
    x = torch.tensor([[0.0, 0.1, -0.2, 3.0, 10.0, -10.0, 9.9, 0.5]], requires_grad=True)
    with torch.enable_grad():
        out = linear(x)
        (out * torch.arange(1.0, 9.0)).sum().backward()
    assert out[0, 4] == 8.75  # 7 steps of 10/8: clamped
    assert torch.equal(x.grad, torch.arange(1.0, 9.0)[None])


class _Sets:
    """What `Activations.fit_block` reads of a block when ranges are dynamic."""

    class architecture:
        linears = (("only",),)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_later_tokens_do_not_influence_earlier_outputs(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(model_type)
    other = SEGMENTS.clone()
    other[:, 8:] = (other[:, 8:] + 31) % 97 + 4
    a, b = (student_of(first_block(model, PREFIX, text)).outputs(0) for text in (SEGMENTS, other))
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "opt"])
def test_teacher_and_student_read_the_intact_prefix(
    model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(model_type)
    full = tiny_model(model_type)
    block = first_block(model, PREFIX)
    found = student_of(block, W3, None).outputs(1)
    # The truth: the first block of a whole model with rounded weights, behind the full-precision model's prefix.
    outputs: list[Tensor] = []
    blocks = architecture_of(model.config).blocks_of(model)
    for name, linear in block.linears().items():
        linear.weight.data = fake_quantize(linear.weight.data, replace(ROW3, bits=4 if "attn" in name else 3))
    handle = blocks[0].register_forward_hook(lambda _module, _args, out: outputs.append(out))
    attach(model, build_prefix(full, PREFIX)).feed(SEGMENTS[1][None])
    handle.remove()
    torch.testing.assert_close(found, outputs[0], rtol=0, atol=1e-5 * float(found.abs().max()))


def test_an_online_rotation_stays_in_front_of_the_quantizer(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    put_in_front(architecture_of(model.config).blocks_of(model)[0], ("mlp.down_proj",), rotation=OnlineRotation.of(96))
    block = first_block(model)
    assert float(student_of(block, None, None).loss(0)) == 0
    inputs = TOKEN4.fit_block(block)
    found = Student(block, None, inputs).outputs(0)
    quantize_inputs(block, inputs)  # as the finished block has them
    assert torch.equal(found, stream_of(block).forward(block, stream_of(block).full[0]))
    assert not torch.equal(found, stream_of(block).targets[0])


def test_a_kv_policy_is_at_work_in_the_student(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"), PREFIX)
    losses = [float(Student(block, None, {}, kv).loss(0)) for kv in (None, PerHead(8), PerHead(2))]
    assert 0 == losses[0] < losses[1] < losses[2]
    student = Student(block, None, {}, PerHead(2))
    for master in student.masters:
        master.requires_grad_(True)
    with torch.enable_grad():
        student.loss(0).backward()
    gradients = {name: m.grad for (name, _), m in zip(block.module.named_parameters(), student.masters, strict=True)}
    key = gradients["self_attn.k_proj.weight"]
    assert key is not None
    assert float(key.abs().max()) > 0


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["no prefix", "behind a prefix"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_training_lowers_the_held_out_loss_that_the_finished_block_has(
    model_type: str, prefix: Tensor | None, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model(model_type), prefix)
    stream = stream_of(block)
    inputs = TOKEN4.fit_block(block)
    added = torch.stack([(y - x).square().mean() for x, y in zip(stream.full, stream.targets, strict=True)]).mean()
    quantized = QUICK.tune_block(block, W3, inputs, None)
    assert block.figures["loss_after"] < block.figures["loss_before"]
    # What is handed back computes that loss: codes, trained norms and biases, quantizers in front.
    for name, weight in quantized.items():
        block.linears()[name].weight.data = weight.dequantize()
    for names, quantizer in inputs.items():
        for name in names:
            block.linears()[name].register_forward_pre_hook(lambda _m, args, q=quantizer: (q(args[0]),))
    loss = (stream.forward(block, stream.full[3]) - stream.targets[3]).square().mean() / added
    assert float(loss) == pytest.approx(block.figures["loss_after"], rel=1e-4)


def test_norms_and_biases_are_trained_and_the_linears_keep_their_own_values(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    block = first_block(tiny_model("qwen2"))
    before = state(block)
    QUICK.tune_block(block, W3, {}, None)
    for name, tensor in block.module.state_dict().items():
        linear = name.endswith("proj.weight")
        assert torch.equal(tensor, before[name]) == linear, name


@pytest.mark.parametrize("lr", [1e-6, 1e-3])
def test_a_step_of_one_millionth_changes_the_masters_also_of_a_bfloat16_model(
    lr: float, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    block = first_block(tiny_model("llama", dtype=torch.bfloat16))
    student = student_of(block, None, Activations(UniformGrid(8, convention="deepspeed-sym")))
    start = [master.clone() for master in student.masters]
    optimizer = torch.optim.AdamW(student.masters, lr=lr, eps=1e-12, weight_decay=0)
    for master in student.masters:
        assert master.dtype == torch.float32
        master.requires_grad_(True)
    with torch.enable_grad():
        student.loss(0).backward()
    optimizer.step()
    matrices = [(new, old) for new, old in zip(student.masters, start, strict=True) if new.ndim == 2]
    for new, old in matrices:
        assert new.grad is not None
        assert torch.equal(new != old, new.grad != 0)
        # What masters in bfloat16 would do with such a step:
        stuck = float((new.bfloat16() == old.bfloat16()).float().mean())
        assert stuck > 0.9 if lr == 1e-6 else stuck < 0.1


def test_a_rate_that_only_does_harm_ends_where_it_began(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    before = state(block)
    wild = replace(QUICK, lr=3.0)
    quantized = wild.tune_block(block, W3, TOKEN4.fit_block(block), None)
    assert block.figures["loss_after"] == block.figures["loss_before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())
    for name, weight in W3.quantize_block(block).items():
        assert torch.equal(quantized[name].dequantize(), weight.dequantize())


def test_the_error_is_reported_with_the_part_of_the_first_token(tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    stream = stream_of(block)
    student = student_of(block)
    error = torch.stack(
        [(student.outputs(i) - target).double().square().sum(-1)[0] for i, target in enumerate(stream.targets)]
    )
    QUICK.tune_block(block, W3, TOKEN4.fit_block(block), None)
    assert block.figures["squared_error"] == pytest.approx(float(error.sum()))
    assert block.figures["squared_error_first_token"] == pytest.approx(float(error[:, 0].sum()))


@pytest.mark.parametrize("bad", ["full", "targets"])
def test_text_that_gives_no_number_ends_in_one_line(bad: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    block = first_block(tiny_model("llama"))
    getattr(stream_of(block), bad)[1] = torch.full_like(stream_of(block).full[1], torch.nan)
    with pytest.raises(UserError, match=r"model\.layers\.0") as error:
        QUICK.tune_block(block, W3, TOKEN4.fit_block(block), None)
    assert len(str(error.value).splitlines()) == 1


# the pipeline ---------------------------------------------------------------------------------------------------------

RECIPES = {
    "w3a4": Recipe(weights=W3, activations=TOKEN4, tuning=QUICK),
    "inputs alone": Recipe(activations=TOKEN4, tuning=replace(QUICK, lr=1e-4)),
    "behind a prefix": Recipe(weights=W3, activations=TOKEN4, tuning=QUICK, prefix="bos", calibrate_behind_prefix=True),
    "last block": Recipe(weights=W3, activations=TOKEN4, tuning=replace(QUICK, blocks="last")),
    "static, with a KV policy": Recipe(
        weights=RTN(ROW3), activations=Activations(UniformGrid(8), static=True), tuning=QUICK, kv_cache=PerHead(3)
    ),
}


def made(source: Path, recipe: Recipe, out: Path, segments: Tensor = SEGMENTS) -> Path:
    ids = PREFIX if recipe.calibrate_behind_prefix else None
    return quantize_checkpoint(source, recipe, out, segments=segments, behind=ids)


def test_every_block_is_trained_on_what_full_precision_blocks_pass_on(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    seen: list[tuple[list[Tensor], list[Tensor]]] = []

    class Watching(Student):
        def __init__(self, block: DecoderBlock, *rest: Any):
            super().__init__(block, *rest)
            seen.append((list(stream_of(block).full), list(stream_of(block).targets)))

    monkeypatch.setattr(quantization.tuning.distill, "Student", Watching)
    made(source, RECIPES["behind a prefix"], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    for i, segment in enumerate(SEGMENTS):
        text = torch.cat([PREFIX, segment])[None]
        *hidden, _ = model(text, output_hidden_states=True).hidden_states
        for index, (full, targets) in enumerate(seen):
            size = float(hidden[index].abs().max())
            torch.testing.assert_close(full[i], hidden[index][:, len(PREFIX) :], rtol=0, atol=1e-5 * size)
            if index < 2:
                size = float(hidden[index + 1].abs().max())
                torch.testing.assert_close(targets[i], hidden[index + 1][:, len(PREFIX) :], rtol=0, atol=1e-5 * size)


def test_the_published_setting_trains_the_last_block_alone(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    plain, last, every = (
        made(source, replace(RECIPES["w3a4"], tuning=tuning), tmp_path / name)
        for name, tuning in (("plain", None), ("last", replace(QUICK, blocks="last")), ("all", QUICK))
    )
    for index in range(3):
        tensors = [
            {name: parts for name, (_, parts, _) in read_block(block_file(out, index)).linears.items()}
            for out in (plain, last, every)
        ]
        codes = [torch.cat([parts["codes"].flatten() for parts in block.values()]) for block in tensors]
        assert torch.equal(codes[0], codes[1]) == (index < 2)
        assert torch.equal(codes[1], codes[2]) == (index == 2)  # blocks do not depend on each other


def test_a_distilled_checkpoint_is_nearer_to_full_precision(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    full = AutoModelForCausalLM.from_pretrained(source).eval()(SEGMENTS).logits
    errors = []
    for name, tuning in (("plain", None), ("trained", replace(QUICK, steps=40))):
        out = made(source, replace(RECIPES["w3a4"], tuning=tuning), tmp_path / name)
        errors.append(float((load_quantized(out)(SEGMENTS).logits - full).norm()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"blocks": "first"}, "tuning.blocks=first"),
        ({"steps": 0}, "tuning.steps=0"),
        ({"batch": 0}, "tuning.batch=0"),
        ({"held_out": 0}, "tuning.held_out=0"),
        ({"lr": 0.0}, "tuning.lr=0"),
        ({"eps": -1.0}, "tuning.eps=-1"),
        ({"weight_decay": -1.0}, "tuning.weight_decay=-1"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_built(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Distill(**settings)


def test_weights_that_calibrate_and_text_that_leaves_nothing_to_learn_from_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match="gptq cannot do without its text"):
        made(source, Recipe(weights=GPTQ(UniformGrid(4)), tuning=QUICK), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match="1 of 1 samples held out"):
        made(source, Recipe(weights=W3, tuning=QUICK), tmp_path / "out", segments=SEGMENTS[:1])


def test_a_text_with_no_more_samples_than_are_held_out_and_fewer_than_a_batch_is_learned_from(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    few = replace(QUICK, batch=8, held_out=4)
    out = made(source, Recipe(weights=W3, tuning=few), tmp_path / "out")
    assert "4 samples: a quarter is held out, not tuning.held_out=4" in caplog.text
    same = made(source, Recipe(weights=W3, tuning=replace(few, held_out=1)), tmp_path / "one-held-out")
    assert load_quantized(out)(SEGMENTS).logits.equal(load_quantized(same)(SEGMENTS).logits)


# the real model -------------------------------------------------------------------------------------------------------

TEXT = (
    "The river had risen in the night, and by morning the lower field was a lake. Anna stood at the gate with her "
    "brother and counted the sheep that had made it to the hill: forty-one. There should have been forty-three, and "
    "the two that were missing were the old ewe and her lamb, who had slept by the wall every night since the spring."
)


@pytest.mark.slow
def test_in_smollm2_the_first_token_owns_one_blocks_error_unless_the_text_runs_behind_bos(
    smollm2: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])[:64].view(2, 32)
    bos = torch.tensor([tokenizer.bos_token_id])
    brief = Distill(steps=1, batch=1, held_out=1)
    shares = []
    for behind in (False, True):
        recipe = Recipe(
            weights=ZeroQuant(UniformGrid(4, convention="deepspeed-sym")),
            tuning=brief, prefix="bos", calibrate_behind_prefix=behind,
        )  # fmt: skip
        out = quantize_checkpoint(smollm2, recipe, tmp_path / f"{behind}", segments=ids, behind=bos if behind else None)
        figures = [read_block(block_file(out, index)).figures for index in range(30)]
        shares.append([block["squared_error_first_token"] / block["squared_error"] for block in figures])
    assert shares[0].index(max(shares[0])) == 11  # which makes the massive activations
    assert shares[0][11] > 0.95
    assert max(shares[1]) < 0.1  # an even share is 1/32
