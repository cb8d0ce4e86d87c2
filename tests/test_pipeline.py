"""The block pipeline: what it writes, how it resumes, what calibration sees with and without a prefix."""

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from common import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantization.runs.pipeline
from corpora.errors import UserError
from corpora.json_files import read_json
from intactkv.architecture import architecture_of
from intactkv.attach import IntactModel, attach
from intactkv.prefix import build_prefix
from quantization.grids.uniform import CONVENTIONS, QuantizedTensor, UniformGrid, fake_quantize, quantize
from quantization.kernels.linear import QuantLinear
from quantization.model.blocks import DecoderBlock
from quantization.recipes.recipe import Recipe
from quantization.runs.checkpoint import CHECKSUMS, MANIFEST, block_file, load_quantized
from quantization.runs.pipeline import quantize_checkpoint
from quantization.runs.plan import plan_run
from quantization.transforms.base import BlockTransform
from quantization.weights.base import GridQuantizer
from quantization.weights.rtn import RTN

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "opt")
W3 = UniformGrid(3, 32)
W4 = UniformGrid(4, 32)
WINDOW = 8  # of the sliding layers: shorter than prefix + text
MIXED = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
PREFIX = torch.tensor([1, 40, 7])
SEGMENTS = torch.randint(4, 101, (3, 12), generator=torch.Generator().manual_seed(5))


pytestmark = pytest.mark.usefixtures("no_grad")


# test-local methods ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording(GridQuantizer):
    """Notes what every linear and block sees; rounds the weights to the grid if `lossy`, leaves them else."""

    grid: UniformGrid
    lossy: bool = False
    inputs: dict[str, list[Tensor]] = field(default_factory=dict, init=False, compare=False)
    entering: list[list[Tensor]] = field(default_factory=list, init=False, compare=False)
    name: ClassVar[str] = "recording"
    calibrates: ClassVar[bool] = True

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        assert block.stream is not None
        self.entering.append(list(block.stream.hidden))
        block.observe(lambda linear, x: self.inputs.setdefault(f"{block.name}.{linear}", []).extend(x.clone().split(1)))
        return RTN(self.grid).quantize_block(block) if self.lossy else {}


@dataclass(frozen=True)
class Shrinking(GridQuantizer):
    """A poor but honest calibrating quantizer: what it writes depends on every input of every linear."""

    grid: UniformGrid
    name: ClassVar[str] = "shrinking"
    calibrates: ClassVar[bool] = True
    fail_at: ClassVar[int | None] = None
    blocks_done: ClassVar[list[int]] = []

    def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
        if block.index == self.fail_at:
            raise KeyboardInterrupt
        seen: dict[str, Tensor] = {}

        def look(linear: str, x: Tensor) -> None:
            seen[linear] = seen.get(linear, torch.zeros(())) + x.abs().mean(dim=(0, 1))

        block.observe(look)
        self.blocks_done.append(block.index)
        return {
            name: quantize(linear.weight * (1 - 0.1 * torch.tanh(seen[name])), self.grid)
            for name, linear in block.linears().items()
        }


@dataclass(frozen=True)
class ScaledValues(BlockTransform):
    """An exact transform: row i of v_proj times r, the columns of o_proj that read it over r, r drawn per KV channel.

    V is in another basis afterwards. calibrates only says so: the class below really looks.
    """

    seed: int = 0
    name: ClassVar[str] = "scaled"
    calibrates: ClassVar[bool] = False

    def transform_block(self, block: DecoderBlock) -> None:
        self.rewrite(block, torch.ones(()))

    def rewrite(self, block: DecoderBlock, factor: Tensor) -> None:
        linears = block.linears()
        value = linears["self_attn.v_proj"]
        output = linears.get("self_attn.o_proj") or linears["self_attn.out_proj"]
        generator = torch.Generator().manual_seed(self.seed + block.index)
        r = factor * (0.25 + 4 * torch.rand(value.out_features, generator=generator))  # (KV heads · D,)
        value.weight.data = value.weight * r[:, None]
        if value.bias is not None:
            value.bias.data = value.bias * r
        repeats = output.in_features // value.out_features
        size = block.module.self_attn.head_dim
        columns = r.view(-1, 1, size).expand(-1, repeats, -1).flatten()  # query head h reads KV head h // repeats
        output.weight.data = output.weight / columns


@dataclass(frozen=True)
class CalibratedValues(ScaledValues):
    """The same, with a scale that depends on the calibration text."""

    name: ClassVar[str] = "calibrated"
    calibrates: ClassVar[bool] = True

    def transform_block(self, block: DecoderBlock) -> None:
        seen: list[Tensor] = []
        block.observe(lambda linear, x: seen.append(x.abs().mean()) if linear == "self_attn.v_proj" else None)
        self.rewrite(block, 1 + torch.stack(seen).mean())


# helpers --------------------------------------------------------------------------------------------------------------


def dense(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def fake_quantized(directory: Path, grid: UniformGrid) -> PreTrainedModel:
    """The model whose linears were rounded one by one, without any of the pipeline."""
    model = dense(directory)
    architecture = architecture_of(model.config)
    for block in architecture.blocks_of(model):
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = fake_quantize(module.weight.data, grid)
    return model


def hashes(directory: Path) -> dict[str, str]:
    files = [file for file in directory.iterdir() if file.name != CHECKSUMS]  # holds the seconds of the run
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_hooked(
    model: PreTrainedModel, run: Callable[[Tensor], Any]
) -> tuple[dict[str, list[Tensor]], list[list[Tensor]]]:
    """What every block linear of the model reads and what enters every block, segment by segment."""
    architecture = architecture_of(model.config)
    inputs: dict[str, list[Tensor]] = {}
    entering: list[list[Tensor]] = []
    handles = []
    for index, block in enumerate(architecture.blocks_of(model)):
        entering.append([])
        handles.append(block.register_forward_pre_hook(lambda _module, args, into=entering[-1]: into.append(args[0])))
        for name, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear):
                into = inputs.setdefault(f"{architecture.block_name(index)}.{name}", [])
                handles.append(linear.register_forward_pre_hook(lambda _module, args, into=into: into.append(args[0])))
    for segment in SEGMENTS:
        run(segment)
    for handle in handles:
        handle.remove()
    return inputs, entering


def token_rows(x: Tensor) -> Tensor:
    """(1, T, C), also of the (T, C) that OPT's feed-forward linears may read."""
    return x if x.ndim == 3 else x[None]


def assert_same(found: list[Tensor], expected: list[Tensor], skip: int = 0) -> None:
    """Equal up to the order of summation in float32, after dropping `skip` leading tokens of the expected ones."""
    assert len(found) == len(expected) == len(SEGMENTS)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = token_rows(theirs)[:, skip:]
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


# what is written ------------------------------------------------------------------------------------------------------

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "sharded": {"max_shard_size": "100KB"},
    "tied-bfloat16-sharded": {"tie_word_embeddings": True, "dtype": torch.bfloat16, "max_shard_size": "50KB"},
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_quantized_checkpoint_computes_what_rounding_every_block_linear_computes(
    model_type: str, variant: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(model_type, **VARIANTS[variant])
    assert (source / "model.safetensors.index.json").exists() == ("sharded" in variant)
    out = quantize_checkpoint(source, Recipe(weights=RTN(W4)), tmp_path / "out")
    truth, plain, packed = fake_quantized(source, W4), load_quantized(out), load_quantized(out, kernel="unpack")
    assert plain.dtype == packed.dtype == truth.dtype == (torch.bfloat16 if "bfloat16" in variant else torch.float32)
    expected = truth(SEGMENTS).logits
    assert torch.equal(plain(SEGMENTS).logits, expected)
    assert torch.equal(packed(SEGMENTS).logits, expected)
    assert not torch.equal(dense(source)(SEGMENTS).logits, expected)

    blocks = architecture_of(truth.config).blocks
    kept = {name for name, _ in truth.named_parameters() if not name.startswith(f"{blocks}.") or "norm" in name}
    for model in (plain, packed):
        state, original = model.state_dict(), dense(source).state_dict()
        assert all(torch.equal(state[name], original[name]) for name in kept)
    packed_modules = [module for module in packed.modules() if isinstance(module, QuantLinear)]
    assert len(packed_modules) == 3 * len(architecture_of(truth.config).linears_of(
        dense(source).get_submodule(f"{blocks}.0"), "block"))  # fmt: skip
    if "tied-" in variant or variant == "tied":
        assert plain.lm_head.weight is plain.get_input_embeddings().weight
        assert packed.lm_head.weight is packed.get_input_embeddings().weight


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_every_convention_survives_the_file(
    convention: str, scale_dtype: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    grid = UniformGrid(3, 16, convention, scale_dtype=scale_dtype)
    out = quantize_checkpoint(checkpoint(), Recipe(weights=RTN(grid)), tmp_path / "out")
    expected = fake_quantized(checkpoint(), grid)(SEGMENTS).logits
    assert torch.equal(load_quantized(out, kernel="unpack")(SEGMENTS).logits, expected)
    assert torch.equal(load_quantized(out)(SEGMENTS).logits, expected)


def test_the_dtype_of_the_computation_can_be_chosen_when_loading(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = quantize_checkpoint(checkpoint(), Recipe(weights=RTN(W4)), tmp_path / "out")
    plain, packed = (load_quantized(out, kernel=kernel, dtype=torch.bfloat16) for kernel in (None, "unpack"))
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain(SEGMENTS).logits, packed(SEGMENTS).logits)


def test_the_directory_holds_configuration_tokenizer_manifest_and_one_file_a_block(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(max_shard_size="100KB")
    out = quantize_checkpoint(source, Recipe(weights=RTN(W4)), tmp_path / "made" / "here" / "out")
    assert set(hashes(out)) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST,
        "block-000.safetensors", "block-001.safetensors", "block-002.safetensors", "ends.safetensors",
    }  # fmt: skip
    manifest = read_json(out / MANIFEST, "manifest")
    assert manifest["label"] == "rtn-w4g32"
    assert manifest["basis"] == "plain"
    assert manifest["needs_prefix"] is None
    assert (out.parent / manifest["source"]["directory"]).resolve() == source.resolve()
    assert load_quantized(out).generation_config.eos_token_id == 2


def test_only_one_block_is_off_the_meta_device_at_a_time(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[PreTrainedModel] = []
    real: list[set[str]] = []
    make_empty = quantization.runs.pipeline.empty_model

    def empty_model(directory: Path) -> PreTrainedModel:
        models.append(make_empty(directory))
        return models[-1]

    @dataclass(frozen=True)
    class Watching(RTN):
        def quantize_block(self, block: DecoderBlock) -> dict[str, QuantizedTensor]:
            real.append({name for name, p in models[0].named_parameters() if not p.is_meta})
            return super().quantize_block(block)

    monkeypatch.setattr(quantization.runs.pipeline, "empty_model", empty_model)
    quantize_checkpoint(checkpoint(), Recipe(weights=Watching(W4)), tmp_path / "out")
    blocks = [{name for name, _ in models[0].named_parameters() if f"layers.{i}." in name} for i in range(3)]
    assert real == blocks
    assert all(p.is_meta for p in models[0].parameters())


def test_a_recipe_that_changes_no_weight_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leaves the model as it is"):
        quantize_checkpoint(checkpoint(), Recipe(prefix="bos"), tmp_path / "out")


def test_a_recipe_that_calibrates_is_refused_without_text(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this recipe calibrates"):
        quantize_checkpoint(checkpoint(), Recipe(weights=Shrinking(W4)), tmp_path / "out")


# resuming -------------------------------------------------------------------------------------------------------------

RECIPES = {
    "rtn": Recipe(weights=RTN(W3)),
    "calibrating": Recipe(weights=Shrinking(W3)),
    "behind a prefix": Recipe(weights=Shrinking(W3), prefix="bos", calibrate_behind_prefix=True),
    "transformed behind a prefix": Recipe(
        (CalibratedValues(), ScaledValues(7)), Shrinking(W3), prefix="bos", calibrate_behind_prefix=True
    ),
    "twin": Recipe((CalibratedValues(),), prefix="bos", calibrate_behind_prefix=True),
}


def made(source: Path, recipe: Recipe, out: Path) -> dict[str, str]:
    prefix = PREFIX if recipe.calibrate_behind_prefix else None
    return hashes(quantize_checkpoint(source, recipe, out, segments=SEGMENTS, behind=prefix))


@pytest.mark.parametrize(
    ("name", "model_type"), [*((name, "llama") for name in RECIPES), ("transformed behind a prefix", "qwen2")]
)
def test_a_run_taken_up_with_blocks_missing_ends_with_the_same_bytes(
    name: str, model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(model_type, **(MIXED if model_type == "qwen2" else {}))
    whole = made(source, RECIPES[name], tmp_path / "whole")
    assert made(source, RECIPES[name], tmp_path / "again") == whole
    for lost in ([0], [1, 2]):
        partial = tmp_path / "resumed.partial"
        shutil.copytree(tmp_path / "whole", partial)
        (partial / "ends.safetensors").unlink()
        for index in lost:
            block_file(partial, index).unlink()
        assert made(source, RECIPES[name], tmp_path / "resumed") == whole
        shutil.rmtree(tmp_path / "resumed")


def test_codes_of_finished_blocks_are_read_back_and_not_chosen_again(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    made(checkpoint(), RECIPES["calibrating"], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed.partial")
    block_file(tmp_path / "resumed.partial", 1).unlink()
    Shrinking.blocks_done.clear()
    made(checkpoint(), RECIPES["calibrating"], tmp_path / "resumed")
    assert Shrinking.blocks_done == [1]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_run_interrupted_in_any_block_goes_on_there(
    block: int, checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPES["transformed behind a prefix"]
    whole = made(checkpoint(), recipe, tmp_path / "whole")
    monkeypatch.setattr(Shrinking, "fail_at", block)
    with pytest.raises(KeyboardInterrupt):
        made(checkpoint(), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [block_file(tmp_path / "out.partial", i).is_file() for i in range(3)] == [i < block for i in range(3)]
    monkeypatch.setattr(Shrinking, "fail_at", None)
    Shrinking.blocks_done.clear()
    assert made(checkpoint(), recipe, tmp_path / "out") == whole
    assert Shrinking.blocks_done == list(range(block, 3))
    assert not (tmp_path / "out.partial").exists()


def test_what_a_killed_run_left_half_written_is_not_in_the_result(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole = made(checkpoint(), RECIPES["rtn"], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out.partial")
    block_file(tmp_path / "out.partial", 2).unlink()
    (tmp_path / "out.partial" / ".block-002.safetensors.4711.partial").write_bytes(b"half")
    assert made(checkpoint(), RECIPES["rtn"], tmp_path / "out") == whole


def test_the_leftover_of_another_recipe_is_discarded(
    checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = made(checkpoint(), RECIPES["rtn"], tmp_path / "whole")
    made(checkpoint(), Recipe(weights=RTN(W4)), tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "out.partial")
    assert made(checkpoint(), RECIPES["rtn"], tmp_path / "out") == whole
    assert "is of another run, or of an earlier version, and is begun anew" in caplog.text


def test_a_directory_of_the_users_in_the_way_of_the_work_is_left_alone(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"out\.partial exists and is not"):
        quantize_checkpoint(checkpoint("llama"), Recipe(weights=RTN(UniformGrid(4, 32))), tmp_path / "out")
    assert (theirs / "thesis.txt").read_text() == "years of work"


def test_the_leftover_of_another_model_is_discarded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    whole = made(checkpoint(), RECIPES["rtn"], tmp_path / "whole")
    made(checkpoint(seed=1), RECIPES["rtn"], tmp_path / "other")
    (tmp_path / "other").rename(tmp_path / "out.partial")
    assert made(checkpoint(), RECIPES["rtn"], tmp_path / "out") == whole


def test_a_finished_checkpoint_is_returned_without_any_work(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(checkpoint(), RECIPES["calibrating"], tmp_path / "out")
    monkeypatch.setattr(Shrinking, "fail_at", 0)
    assert made(checkpoint(), RECIPES["calibrating"], tmp_path / "out") == first


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    before = made(checkpoint(), Recipe(weights=RTN(W4)), tmp_path / "out")
    with pytest.raises(UserError, match=r"out already holds the quantized checkpoint \w{8}, not \w{8} \(rtn-w3g32\)"):
        made(checkpoint(), RECIPES["rtn"], tmp_path / "out")
    assert hashes(tmp_path / "out") == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match=f"{name} already holds something else"):
            made(checkpoint(), RECIPES["rtn"], tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "years of work"


# The children of one slow-starting process: `start(out)` quantizes with a test quantizer that sleeps in every block, in
# the last of six without end.
CHILDREN = """
    import os, random, signal, sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from quantization.grids.uniform import UniformGrid
    from quantization.runs.pipeline import quantize_checkpoint
    from quantization.recipes.recipe import Recipe
    from quantization.weights import rtn

    @dataclass(frozen=True)
    class RTN(rtn.RTN):
        def quantize_block(self, block):
            with open(Path(sys.argv[2]) / "log", "a") as log:
                log.write(f"{block.index}\\n")
            time.sleep(0.2 if block.index < 5 else 900)
            return super().quantize_block(block)

    def start(out):
        child = os.fork()
        if child == 0:
            quantize_checkpoint(Path(sys.argv[1]), Recipe(weights=RTN(UniformGrid(3, 32))), Path(out))
            os._exit(0)
        return child
"""


def run_children(script: str, source: Path, directory: Path) -> None:
    code = textwrap.dedent(CHILDREN) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(directory)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole = made(checkpoint(num_hidden_layers=6), RECIPES["rtn"], tmp_path / "whole")
    run_children(
        """
        random.seed(3)
        partial = Path(sys.argv[2]) / "out.partial"
        for kill in range(3):
            child = start(Path(sys.argv[2]) / "out")
            while len(list(partial.glob("block-*"))) < 1 + kill:  # one block more in every round
                time.sleep(0.01)
            time.sleep(random.random() / 2)
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "finished before it was killed"
        """,
        checkpoint(num_hidden_layers=6),
        tmp_path,
    )
    assert not (tmp_path / "out").exists()
    assert 3 <= len(list((tmp_path / "out.partial").glob("block-*"))) <= 5
    assert made(checkpoint(num_hidden_layers=6), RECIPES["rtn"], tmp_path / "out") == whole


def test_two_processes_at_once_make_one_result_and_do_the_work_once(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole = made(checkpoint(), RECIPES["rtn"], tmp_path / "whole")
    run_children(
        """
        children = [start(Path(sys.argv[2]) / "out") for _ in range(2)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        """,
        checkpoint(),
        tmp_path,
    )
    assert hashes(tmp_path / "out") == whole
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]


# calibration ----------------------------------------------------------------------------------------------------------

STREAMED = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": MIXED,
    "qwen3": {},
    "opt": {},
}


@pytest.mark.parametrize("model_type", STREAMED)
@pytest.mark.parametrize("behind", [False, True], ids=["without a prefix", "behind a prefix"])
def test_every_linear_sees_what_it_sees_in_the_whole_model(
    model_type: str, behind: bool, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(model_type, **STREAMED[model_type])
    recording = Recording(W4)
    quantize_checkpoint(
        source,
        Recipe(weights=recording, prefix="bos", calibrate_behind_prefix=behind),
        tmp_path / "out",
        segments=SEGMENTS,
        behind=PREFIX if behind else None,
    )
    # Full precision: the plain model over [prefix + text] in one go; the text starts at position P.
    lead = PREFIX if behind else PREFIX[:0]
    model = dense(source)
    inputs, entering = run_hooked(model, lambda segment: model(torch.cat([lead, segment])[None]))
    assert recording.inputs.keys() == inputs.keys()
    for name, expected in inputs.items():
        assert_same(recording.inputs[name], expected, skip=len(lead))
    for index, expected in enumerate(entering):
        assert_same(recording.entering[index], expected, skip=len(lead))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt"])
def test_the_prefix_changes_what_calibration_sees(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, seen = checkpoint(model_type, **STREAMED[model_type]), []
    for behind, ids in ((False, None), (True, PREFIX), (True, PREFIX + 1)):
        recording = Recording(W4)
        recipe = Recipe(weights=recording, prefix="bos", calibrate_behind_prefix=behind)
        quantize_checkpoint(source, recipe, tmp_path / f"{len(seen)}", segments=SEGMENTS, behind=ids)
        seen.append(next(reversed(recording.inputs.values()))[0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((seen[a] - seen[b]).norm() / seen[a].norm()) > 0.01


@pytest.mark.parametrize("model_type", STREAMED)
def test_behind_a_prefix_the_text_meets_quantized_blocks_and_full_precision_keys_and_values(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(model_type, **STREAMED[model_type])
    recording = Recording(W3, lossy=True)
    out = quantize_checkpoint(
        source,
        Recipe(weights=recording, prefix="bos", calibrate_behind_prefix=True),
        tmp_path / "out",
        segments=SEGMENTS,
        behind=PREFIX,
    )
    # What enters block i depends on blocks before i only, so one run of the wholly quantized model serves all.
    quantized = fake_quantized(source, W3)
    behind = attach(quantized, build_prefix(dense(source), PREFIX))
    _, entering = run_hooked(quantized, lambda segment: behind.feed(segment[None]))
    for index, expected in enumerate(entering):
        assert_same(recording.entering[index], expected)
    # and it would not do to let the quantized model write the prefix's keys and values:
    _, wrong = run_hooked(quantized, lambda segment: quantized(torch.cat([PREFIX, segment])[None]))
    assert float((wrong[2][0][:, len(PREFIX) :] - entering[2][0]).norm() / entering[2][0].norm()) > 0.01
    assert torch.equal(load_quantized(out)(SEGMENTS).logits, quantized(SEGMENTS).logits)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt"])
def test_behind_a_prefix_a_transform_changes_nothing_that_full_precision_computes(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(model_type, **STREAMED[model_type])
    recording = Recording(W4)
    recipe = Recipe((ScaledValues(),), recording, prefix="bos", calibrate_behind_prefix=True)
    quantize_checkpoint(source, recipe, tmp_path / "out", segments=SEGMENTS, behind=PREFIX)
    model = dense(source)
    inputs, entering = run_hooked(model, lambda segment: model(torch.cat([PREFIX, segment])[None]))
    for index, expected in enumerate(entering):
        assert_same(recording.entering[index], expected, skip=len(PREFIX))
    output = "out_proj" if model_type == "opt" else "o_proj"
    for name, expected in inputs.items():
        if not name.endswith(output):  # reads V in the new basis
            assert_same(recording.inputs[name], expected, skip=len(PREFIX))
    reads_values = f"{architecture_of(model.config).block_name(0)}.self_attn.{output}"
    assert not torch.allclose(recording.inputs[reads_values][0], inputs[reads_values][0][:, len(PREFIX) :], rtol=0.1)


# the twin -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_the_prefix_of_the_transformed_twin_reproduces_full_precision(
    model_type: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(model_type)
    recipe = Recipe((ScaledValues(),), RTN(W4), prefix="bos")
    twin = load_quantized(quantize_checkpoint(source, recipe.twin, tmp_path / "twin"))
    full = dense(source)
    expected = full(torch.cat([PREFIX.expand(len(SEGMENTS), -1), SEGMENTS], dim=1)).logits[:, len(PREFIX) :]
    size = float(expected.abs().max())

    from_twin, from_plain = build_prefix(twin, PREFIX), build_prefix(full, PREFIX)
    behind = attach(twin, from_twin).feed(SEGMENTS).logits
    torch.testing.assert_close(behind, expected, rtol=0, atol=1e-5 * size)
    wrong = IntactModel(twin, from_plain).feed(SEGMENTS).logits
    assert float((wrong - expected).abs().max()) > 1e-2 * size
    with pytest.raises(UserError, match="basis is 'plain' in the prefix"):
        attach(twin, from_plain)
    # The quantized model shares the twin's basis, and so takes its prefix.
    quantized = load_quantized(quantize_checkpoint(source, recipe, tmp_path / "quantized"))
    attach(quantized, from_twin)
    with pytest.raises(UserError, match="basis is 'plain' in the prefix"):
        attach(quantized, from_plain)


@pytest.mark.parametrize("kernel", [None, "unpack"])
def test_a_planned_run_quantizes_and_brings_the_prefix_of_the_right_twin(
    kernel: str | None, tiny_checkpoint: Callable[..., Path], intactkv_root: Path
) -> None:
    source = tiny_checkpoint(intactkv_root, "llama")
    recipe = Recipe((ScaledValues(),), RTN(UniformGrid(8, 32)), prefix="bos")
    plan = plan_run(source, recipe, device=torch.device("cpu"), kernel=kernel)
    model = plan.load()
    assert model.prefix is not None
    assert model.prefix.ids.tolist() == [1]
    assert model.prefix.model.basis == plan.basis != "plain"
    text = torch.cat([torch.ones(len(SEGMENTS), 1, dtype=torch.long), SEGMENTS], dim=1)
    error = (model.score(text) - dense(source)(text).logits).norm() / dense(source)(text).logits.norm()
    assert 0 < float(error) < 0.1  # 8 bits
    assert (intactkv_root / "modelzoo" / "prefixes" / "tiny-llama").is_dir()
    # A second run finds everything made.
    before = {p: p.stat().st_mtime_ns for p in intactkv_root.rglob("*.safetensors")}
    assert torch.equal(plan.load().score(text), model.score(text))
    assert {p: p.stat().st_mtime_ns for p in intactkv_root.rglob("*.safetensors")} == before


def test_a_checkpoint_calibrated_behind_a_prefix_is_refused_without_it(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe(weights=Shrinking(W4), prefix="bos", calibrate_behind_prefix=True)
    ids = torch.tensor([1])
    out = quantize_checkpoint(checkpoint(), recipe, tmp_path / "out", segments=SEGMENTS, behind=ids)
    assert read_json(out / MANIFEST, "manifest")["needs_prefix"] == [1]
    device = torch.device("cpu")
    for refused in (Recipe(), Recipe(prefix="a text")):
        with pytest.raises(UserError, match="calibrated behind a prefix of 1 tokens"):
            plan_run(out, refused, device=device)
    with pytest.raises(UserError, match="calibrated behind a prefix of 1 tokens"):
        plan_run(out, Recipe(prefix="bos"), device=device, vanilla=True)
    assert plan_run(out, Recipe(prefix="bos"), device=device).choice.ids == (1,)
    with pytest.raises(UserError, match="is quantized already"):
        plan_run(out, replace(recipe, calibrate_behind_prefix=False), device=device)


# the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_bit_blocks_of_smollm2_take_at_most_a_third_of_the_bfloat16_blocks(smollm2_w4: Path) -> None:
    taken = sum(file.stat().st_size for file in smollm2_w4.glob("block-*.safetensors"))
    model = load_quantized(smollm2_w4)
    blocks = architecture_of(model.config).blocks_of(model)
    assert taken <= sum(2 * p.numel() for block in blocks for p in block.parameters()) / 3
