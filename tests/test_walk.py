"""The calibration text on its way through a block: batches, what is kept between sets, what waits for a device."""

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import quantization.runs.one_block
import quantization.runs.pipeline
from corpora.errors import UserError
from corpora.machine import environment
from intactkv.architecture import architecture_of
from intactkv.observe import hooked, on_input
from intactkv.policy import KVPolicy
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache import KIVI, PerHead
from quantization.model import text
from quantization.model.blocks import DecoderBlock
from quantization.model.stages import seconds_by_stage
from quantization.model.stream import CalibrationStream
from quantization.model.text import BATCH, Text, said_when_full, samples_at_once
from quantization.model.walk import Walk
from quantization.recipes.recipe import Recipe
from quantization.runs.background import Background
from quantization.runs.checkpoint import read_cost
from quantization.runs.pipeline import partial_of, quantize_checkpoint
from quantization.transforms.rotate import Rotate
from quantization.transforms.smooth import Smooth
from quantization.weights.awq import AWQ
from quantization.weights.gptq import GPTQ, Hessian
from quantization.weights.rtn import RTN

MODEL_TYPES = ("llama", "qwen3", "opt")
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (7, 12), generator=torch.Generator().manual_seed(5))
W4 = UniformGrid(4, 32)

pytestmark = pytest.mark.usefixtures("no_grad")


def first_block(model: PreTrainedModel, prefix: Tensor | None = None, segments: Tensor = SEGMENTS) -> DecoderBlock:
    architecture = architecture_of(model.config)
    stream = CalibrationStream(model, architecture, segments, prefix)
    block = DecoderBlock(0, architecture.blocks_of(model)[0], architecture, model.config, stream)
    stream.seed(block)
    return block


def stream_of(block: DecoderBlock) -> CalibrationStream:
    assert block.stream is not None
    return block.stream


def round_weights(block: DecoderBlock, names: tuple[str, ...]) -> None:
    for name in names:
        weight = block.linears()[name].weight
        weight.data = fake_quantize(weight.data, W4)


# one way through a block ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 1], ids=["no room", "room"])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["alone", "behind"])
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "opt with norms behind"])
def test_a_walk_gives_the_bits_of_passes_from_the_beginning(
    model_type: str, prefix: Tensor | None, rotated: bool, spare: float, tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if rotated and model_type != "llama":
        pytest.skip("a rotation in front of linears is the same for all families")
    monkeypatch.setenv(BATCH, "3")
    monkeypatch.setitem(text.SHARE_TO_SPARE, "cpu", spare)
    family, *behind = model_type.split(maxsplit=1)
    block = first_block(tiny_model(family, **({"do_layer_norm_before": False} if behind else {})), prefix)
    if rotated:
        Rotate(online_down=True).transform_block(block)
        stream_of(block).seed(block)
    walk = Walk(block)
    for names in block.architecture.linears:
        ours = torch.cat([*walk.inputs(names[0])])
        assert ours.shape[:2] == SEGMENTS.shape
        assert torch.equal(ours, torch.cat([*Walk(block).inputs(names[0])])), names
        round_weights(block, names)
    assert torch.equal(torch.cat([*walk.outputs()]), torch.cat([*stream_of(block).passed(block)]))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_attention_runs_once_for_all_sets_behind_it(
    model_type: str, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH, "1")
    block, calls = first_block(tiny_model(model_type)), []
    sets, walk = block.architecture.linears, Walk(block)
    for names in sets[:2]:
        assert sum(1 for _ in walk.inputs(names[0])) == len(SEGMENTS)
    with hooked([on_input(block.linears()[sets[0][0]], calls.append)]):
        for names in sets[2:]:
            assert sum(1 for _ in walk.inputs(names[0])) == len(SEGMENTS)
        truth = stream_of(block).passed(block)
        assert len(calls) == len(SEGMENTS)
        norm = block.module.get_submodule(block.feeds()[0].producer)
        norm.weight.data.fill_(torch.nan)  # neither is what stands in front of attention needed
        assert torch.equal(torch.cat([*walk.outputs()]), torch.cat([*truth]))
    assert len(calls) == len(SEGMENTS)
    assert torch.cat([*stream_of(block).passed(block)]).isnan().all()  # the block itself is as it was


def test_a_linear_whose_output_its_module_changes_closes_nothing(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    block = first_block(tiny_model("llama"))
    attention = block.module.get_submodule("self_attn")
    handle = attention.register_forward_hook(lambda _module, _args, output: (2 * output[0], *output[1:]))
    with hooked([handle]):
        walk = Walk(block)
        for names in block.architecture.linears:
            ours = torch.cat([*walk.inputs(names[0])])
            assert torch.equal(ours, torch.cat([*Walk(block).inputs(names[0])])), names
            round_weights(block, names)
        assert torch.equal(torch.cat([*walk.outputs()]), torch.cat([*stream_of(block).passed(block)]))


@pytest.mark.parametrize("fields", [{}, {"true_sequential": False}], ids=["sequential", "at once"])
def test_a_killed_run_of_batches_goes_on_with_the_same_bits(
    fields: dict[str, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes the text through the finished blocks from their beginning; the first run did not."""
    monkeypatch.setenv(BATCH, "2")
    source, recipe = tiny_checkpoint(tmp_path, "llama"), Recipe(weights=GPTQ(W4, **fields))
    whole = quantize_checkpoint(source, recipe, tmp_path / "whole", segments=SEGMENTS)
    write = quantization.runs.one_block.write_block

    def killed(partial: Path, block: DecoderBlock, *rest: Any) -> None:
        if block.index == 2:
            raise KeyboardInterrupt
        write(partial, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantization.runs.one_block, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, recipe, tmp_path / "again", segments=SEGMENTS)
    again = quantize_checkpoint(source, recipe, tmp_path / "again", segments=SEGMENTS)
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (again / file.name).read_bytes()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_block_that_is_written_in_the_background_is_the_same_file(
    failing: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. A disk that is full ends the run, at the next block or at the end, with what was finished before."""
    source, recipe = tiny_checkpoint(tmp_path, "llama"), Recipe(weights=GPTQ(W4))
    whole = quantize_checkpoint(source, recipe, tmp_path / "whole", segments=SEGMENTS)
    one_block, out = quantization.runs.one_block, tmp_path / "again"
    write, threads = one_block.write_block, set()

    def full(partial: Path, block: DecoderBlock, *rest: Any) -> None:
        threads.add(threading.current_thread())
        if block.index == failing:
            raise OSError(28, "No space left on device")
        write(partial, block, *rest)

    monkeypatch.setattr(quantization.runs.pipeline, "Background", lambda device, on: Background(device, on=True))
    with monkeypatch.context() as patch:
        patch.setattr(one_block, "write_block", full)
        with pytest.raises(OSError, match="No space left"):
            quantize_checkpoint(source, recipe, out, segments=SEGMENTS)
    assert threads.isdisjoint([threading.main_thread()])
    assert len(threads) == 1
    finished = [file.name for file in sorted(partial_of(out).glob("block-*.safetensors"))]
    assert finished == [f"block-00{i}.safetensors" for i in range(failing)]
    again = quantize_checkpoint(source, recipe, out, segments=SEGMENTS)
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (again / file.name).read_bytes()


# batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["1", "3", "7"])
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["alone", "behind"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_statistics_do_not_depend_on_the_batch(
    model_type: str, prefix: Tensor | None, batch: str, tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = tiny_model(model_type)
    blocks = architecture_of(model.config).blocks_of(model)
    ids = SEGMENTS if prefix is None else torch.cat([prefix.expand(len(SEGMENTS), -1), SEGMENTS], dim=1)
    linears, true = architecture_of(model.config).linears_of(blocks[0], "block"), {}

    def note(name: str, x: Tensor) -> None:
        x = x.view(1, ids.shape[1], -1)[0, -SEGMENTS.shape[1] :].double()
        true[name] = true.get(name, 0) + 2 / len(SEGMENTS) * x.T @ x

    with hooked(on_input(m, lambda x, name=name: note(name, x)) for name, m in linears.items()):
        for row in ids:
            model(row[None], use_cache=False)
    monkeypatch.setenv(BATCH, batch)
    found: dict[str, Hessian] = {}
    sizes = []

    def look(name: str, x: Tensor) -> None:
        found.setdefault(name, Hessian()).add(x)
        sizes.append(len(x))

    first_block(model, prefix).observe(look)
    assert max(sizes) == int(batch)
    for name, hessian in found.items():
        torch.testing.assert_close(hessian.take().double(), true[name], rtol=1e-4, atol=1e-5 * float(true[name].max()))


@pytest.mark.parametrize("policy", [KIVI(2, group_size=8, residual=8), PerHead(3)], ids=["kivi", "per head"])
@pytest.mark.parametrize("prefix", [None, PREFIX], ids=["alone", "behind"])
def test_a_policy_rounds_every_sample_as_if_it_were_alone(
    prefix: Tensor | None, policy: KVPolicy, tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also one whose groups are runs of tokens: samples have one length, so there are no pads."""
    passed = []
    for batch in ("1", "3"):
        monkeypatch.setenv(BATCH, batch)
        block = first_block(tiny_model("llama"), prefix)
        passed.append(torch.cat([*stream_of(block).passed(block, kv=policy)]))
    torch.testing.assert_close(*passed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(passed[0], torch.cat([*stream_of(block).passed(block)]), rtol=1e-2)


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: a number that Python asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    tolist = Tensor.tolist
    with monkeypatch.context() as patch, Waits() as waits:

        def asked(x: Tensor) -> Any:
            waits.count += 1
            return tolist(x)

        patch.setattr(Tensor, "tolist", asked)
        yield waits


METHODS = {
    "gptq": Recipe(weights=GPTQ(W4)),
    "gptq at once": Recipe(weights=GPTQ(W4, true_sequential=False)),
    "awq": Recipe(weights=AWQ(W4)),
    "smooth": Recipe((Smooth(),), RTN(W4)),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_sample_waits_for_the_device(
    name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH, "1")
    source, counts = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=1), []
    for samples in (2, 7):
        with counted(monkeypatch) as waits:
            quantize_checkpoint(source, METHODS[name], tmp_path / str(samples), segments=SEGMENTS[:samples])
        counts.append(waits.count)
    embedding = 7 - 2  # the ids of a sample are looked at when it enters the model, once for all blocks
    assert counts[0] > 0
    assert counts[1] - counts[0] <= embedding


def test_a_value_that_is_not_finite_is_named_by_its_linear(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("llama")
    block = first_block(model)
    block.module.get_submodule("post_attention_layernorm").weight.data[3] = torch.inf
    with pytest.raises(UserError, match=r"not finite in front of model\.layers\.0\.mlp\.gate_proj"):
        block.observe(lambda _name, _x: None)
    with pytest.raises(UserError, match=r"not finite in front of model\.layers\.0\.mlp\.gate_proj"):
        list(Walk(block).inputs("mlp.gate_proj"))


# budgets --------------------------------------------------------------------------------------------------------------

WIDTHS_70B = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]


def test_a_batch_fits_into_its_share_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, memory = torch.device("cuda"), 80 * 10**9
    monkeypatch.setattr(text, "memory_of", lambda device: memory if device.type == "cuda" else None)
    batch = samples_at_once(WIDTHS_70B, 2048, torch.bfloat16, gpu)
    of_sample = 2048 * (2 * sum(map(sum, WIDTHS_70B)) + 8 * 28672)
    assert batch * of_sample <= memory * text.SHARE_OF_BATCH < (batch + 1) * of_sample
    assert samples_at_once(WIDTHS_70B, 10**6, torch.bfloat16, gpu) == 1
    assert samples_at_once(WIDTHS_70B, 64, torch.bfloat16, torch.device("cpu")) == 8
    monkeypatch.setenv(BATCH, "5")
    assert samples_at_once(WIDTHS_70B, 2048, torch.bfloat16, gpu) == 5


@pytest.mark.parametrize("word", ["0", "x", "-1", "1.5"])
def test_a_batch_that_is_none_is_refused_and_nothing_is_left(
    word: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH, word)
    source = tiny_checkpoint(tmp_path, "llama")
    with pytest.raises(UserError, match=f"the environment variable {BATCH}={word} is not allowed; give "):
        quantize_checkpoint(source, Recipe(weights=GPTQ(W4)), tmp_path / "out", segments=SEGMENTS)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("batch", ["2", "5"])
def test_a_checkpoint_says_how_many_samples_went_at_once_and_on_what(
    batch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH, batch)
    source = tiny_checkpoint(tmp_path, "llama", num_hidden_layers=1)
    costs = {
        name: read_cost(quantize_checkpoint(source, Recipe(weights=method), tmp_path / name, segments=SEGMENTS))
        for name, method in (("gptq", GPTQ(W4)), ("rtn", RTN(W4)))
    }
    assert costs["gptq"]["calibration_batch"] == int(batch)
    assert costs["rtn"]["calibration_batch"] is None
    assert costs["gptq"]["device_name"] in (environment()["processor"], platform.machine())


def test_a_full_gpu_names_the_budget_and_the_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "memory_of", lambda _device: 24 * 10**9)
    said, gpu = rf"24 GB of cuda.* with 7 calibration samples at once.*{BATCH} below 7", torch.device("cuda")
    with pytest.raises(UserError, match=said), said_when_full(gpu, 7):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
    said = r"with 1 calibration sample at once .*; give fewer or shorter samples"
    with pytest.raises(UserError, match=said), said_when_full(gpu, 1):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_text_is_a_sequence_of_its_samples() -> None:
    samples = torch.randn(5, 3, 4)
    whole = Text.of(samples.split(2), 5, torch.device("cpu"))
    assert len(whole) == 5
    assert all(torch.equal(a, b[None]) for a, b in zip(whole, samples, strict=True))
    assert torch.equal(whole[-1], samples[-1:])
    assert torch.equal(torch.cat([*whole[1:3]]), samples[1:3])
    changed = Text.of((2 * x for x in whole), 5, torch.device("cpu"), whole)  # each takes its own sample's place
    assert torch.equal(torch.cat([*changed]), 2 * samples)
    assert changed.values is whole.values
    with pytest.raises(IndexError):
        whole[5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_text_in_host_memory_gives_the_same_bits(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH, "2")
    source, recipe = tiny_checkpoint(tmp_path, "llama"), Recipe(weights=GPTQ(W4))
    made = []
    for share in (1 / 8, 1e-12):
        monkeypatch.setattr(text, "SHARE_OF_TEXT", share)
        out = tmp_path / str(share)
        made.append(quantize_checkpoint(source, recipe, out, segments=SEGMENTS, device="cuda"))
    for file in sorted(made[0].glob("*.safetensors")):
        assert file.read_bytes() == (made[1] / file.name).read_bytes()


def test_seconds_by_stage_are_those_of_the_run(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path, "llama")
    with seconds_by_stage() as stages:
        out = quantize_checkpoint(source, Recipe(weights=GPTQ(W4)), tmp_path / "out", segments=SEGMENTS)
    assert set(stages) == {"read", "passes", "Hessians", "factor", "columns", "error", "write"}
    assert all(took > 0 for took in stages.values())
    assert sum(stages.values()) <= read_cost(out)["seconds"]
