"""What must hold on a CUDA device: the same codes, the same logits, the same text as on the CPU."""

import pytest
import torch

from eval.tasks.lm import IntactLM
from intactkv.attach import attach
from intactkv.policy import Bound
from intactkv.prefix import build_prefix
from quantization.grids.uniform import UniformGrid, quantize
from quantization.kernels.linear import QuantLinear
from quantization.kernels.protocols import Stored
from quantization.kv_cache import KIVI, PerHead, Rotated, TurboQuant
from quantization.model.placement import spread
from quantization.weights.gptq import Hessian, gptq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_codes_do_not_depend_on_the_device():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        grid = UniformGrid(bits, 64)
        on_cpu, on_gpu = quantize(weight, grid), quantize(weight.cuda(), grid)
        # Division may differ in the last bit between the two, which can move a value that lies on a rounding border.
        assert (on_cpu.codes != on_gpu.codes.cpu()).float().mean() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_hessian_of_half_precision_inputs_is_summed_in_float32(dtype):
    x = torch.randn(4, 512, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    hessian = Hessian()
    for part in x.cuda().split(2):
        hessian.add(part)
    h = hessian.take()
    part = x[..., -300:].flatten(0, 1).double()
    exact = part.T @ part / 2
    assert (h[-300:, -300:].double().cpu() - exact).abs().max() < 1e-5 * exact.max()
    assert torch.equal(h[:300, -300:], h[-300:, :300].T)


@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("static_groups", [False, True])
def test_gptq_ends_where_it_does_on_a_cpu(group_size, static_groups):
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(200, 384, generator=draw), torch.randn(2000, 384, generator=draw)
    x += x @ torch.randn(384, 384, generator=draw) / 20
    h = x.T @ x / 2
    results = []
    for device in ("cpu", "cuda"):
        quantized, loss, _ = gptq(
            weight.to(device), h.to(device).clone(), UniformGrid(4, group_size), static_groups=static_groups
        )
        results.append((quantized.codes.cpu(), loss))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-2)
    assert (results[0][0] == results[1][0]).float().mean() > 0.95


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_prefix_made_on_the_cpu_serves_a_model_on_the_gpu(model_type, dtype, tiny_model):
    model = tiny_model(model_type)
    prefix = build_prefix(model, [1, 7, 9])
    ids = torch.randint(5, 101, (2, 40), generator=torch.Generator().manual_seed(1))
    ids[:, :3] = prefix.ids
    expected = model(ids).logits
    model = model.to("cuda", dtype)
    logits = attach(model, prefix).score(ids.cuda()).cpu()
    tolerance = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.5}[dtype]
    assert (logits - expected).abs().max() < tolerance * expected.abs().max()


def test_kv_quantized_text_keeps_the_prefix_exact(tiny_model):
    model = tiny_model("llama").cuda()
    prefix = build_prefix(model, [1, 7, 9])
    prompt = torch.tensor([[1, 7, 9, 20, 21, 22]], device="cuda")
    output = attach(model, prefix, PerHead(3)).generate(
        prompt, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    for layer, key, value in zip(output.past_key_values.intact_layers, prefix.keys, prefix.values, strict=True):
        assert torch.equal(layer.held[0][:, :, :3].cpu(), key)
        assert torch.equal(layer.held[1][:, :, :3].cpu(), value)


REQUESTS = [(None, list(range(5, 5 + n)), [40, 41, 42]) for n in (1, 9, 30)] + [(None, [7, 8], [9])]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@pytest.mark.parametrize("kv", [None, PerHead(8)], ids=["kv16", "kv8"])
def test_task_scores_are_those_of_the_cpu(model_type, kv, tiny_model, tiny_tokenizer):
    lead, tokenizer = (1, 7, 9), tiny_tokenizer()
    model = tiny_model(model_type)
    prefix = build_prefix(model, lead)
    expected = IntactLM(attach(model, prefix, kv), tokenizer, lead, batch_size=4, context=64).score(REQUESTS)
    model = model.cuda()
    got = IntactLM(attach(model, prefix, kv), tokenizer, lead, batch_size=4, context=64).score(REQUESTS)
    for (a, _), (b, _) in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=0.05 if kv else 1e-3)  # a rounding border may tip with other sums


def test_a_model_spread_over_gpu_and_cpu_scores_the_same(tiny_model, tiny_tokenizer):
    lead, tokenizer = (1, 7, 9), tiny_tokenizer()
    whole = tiny_model("llama")
    prefix = build_prefix(whole, lead)
    expected = IntactLM(attach(whole, prefix), tokenizer, lead, batch_size=4, context=64).score(REQUESTS)
    block = sum(p.numel() * p.element_size() for p in whole.model.layers[0].parameters())
    parts = spread(tiny_model("llama"), {0: 2 * block + 60_000, "cpu": 10**9})
    assert {"0", "cpu"} <= {str(place) for place in parts.hf_device_map.values()}
    got = IntactLM(attach(parts, prefix), tokenizer, lead, batch_size=4, context=64).score(REQUESTS)
    for (a, _), (b, _) in zip(got, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


@pytest.mark.parametrize("policy", [PerHead(8), KIVI(8, group_size=8, residual=16), TurboQuant(8), Rotated(8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_from_packed_codes_is_decoding_from_numbers(policy, dtype, tiny_model):
    model = tiny_model("llama").to("cuda", dtype)
    text = torch.randint(5, 101, (2, 60), generator=torch.Generator().manual_seed(2)).cuda()
    logits = []
    for packed in (False, True):
        behind = attach(model, build_prefix(model, [1, 7, 9]), Bound(policy, packed=packed))
        cache = behind.new_cache()
        behind.feed(text[:, :40], cache=cache)
        logits.append(torch.cat([behind.feed(part, cache=cache).logits for part in text[:, 40:].split(1, dim=1)], 1))
    tolerance = {torch.float32: 0.02, torch.float16: 0.03, torch.bfloat16: 0.1}[dtype]  # codes may tip
    assert (logits[1] - logits[0]).float().norm() < tolerance * logits[0].float().norm()


@pytest.mark.parametrize("rows", [1, 16])
def test_a_packed_linear_may_change_its_dtype(rows):
    """What was compiled for float32 scales is not started for bfloat16 ones."""
    weight = quantize(torch.randn(128, 512, generator=torch.Generator().manual_seed(0)).cuda(), UniformGrid(4, 64))
    linear = QuantLinear(Stored(weight.kind, weight.tensors(), weight.header()), weight.codes.shape, None, "uniform")
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).cuda()
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        linear.to(dtype)
        expected = x.double() @ linear.dequantize(torch.float64).T
        assert (linear(x).double() - expected).norm() < 1e-5 * expected.norm()
