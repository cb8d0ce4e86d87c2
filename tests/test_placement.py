"""A model in parts, which accelerate's hooks hold together: here on the CPU and on disk, as there is no GPU to need."""

import pytest
import torch
import transformers.modeling_utils
from families import random_ids

from corpora.errors import UserError
from corpora.values import size
from eval.tasks.lm import IntactLM
from eval.tasks.scoring import score_continuations
from intactkv.architecture import architecture_of
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.kv_cache.per_head import PerHead
from quantization.model.placement import memory_of_each, spread
from quantization.programs.options import chosen_device
from quantization.runs.opening import load_model


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_spread_model_computes_the_same(tiny_model, tiny_tokenizer, tmp_path, model_type):
    """Part of the blocks on disk: their inputs, masks and positions must reach them, their caches must not be lost."""
    whole = tiny_model(model_type)
    prefix = build_prefix(whole, [1, 7])
    texts = [[1, 7, *random_ids(n, n).tolist()] for n in (3, 12)]
    answers = [[[5], [9]], [[4, 6, 8]]]
    block = architecture_of(whole.config).blocks_of(whole)[0]
    size = sum(p.numel() * p.element_size() for p in block.parameters())
    parts = spread(tiny_model(model_type), {"cpu": 2 * size + 60_000, "disk": 10**9}, str(tmp_path))
    assert {"cpu", "disk"} <= {str(place) for place in parts.hf_device_map.values()}
    for kv in (None, PerHead(4)):
        expected = score_continuations(attach(whole, prefix, kv), texts, answers)
        assert score_continuations(attach(parts, prefix, kv), texts, answers) == expected
    lm = IntactLM(attach(parts, prefix), tiny_tokenizer(), (1, 7), batch_size=2, context=64)
    assert lm.device.type == "cpu"
    ids = torch.tensor(texts[:1])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(
        attach(parts, prefix).generate(ids, **options), attach(whole, prefix).generate(ids, **options)
    )


def test_all_gpus_are_for_programs_that_spread(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device("cuda:all", several=True) == torch.device("cuda:0")
    with pytest.raises(UserError, match="cuda:all is not known"):
        chosen_device("cuda:all")


def test_of_no_gpu_a_spread_model_takes_more_than_it_may(monkeypatch, tiny_checkpoint, tmp_path):
    """accelerate says what there is: two GPUs, and main memory, which has no limit of ours."""
    there = {0: 80 * 2**30, 1: 10 * 2**30, "cpu": 100 * 2**30}
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: dict(there))
    allowed = {0: 65 * 2**30, 1: 10 * 2**30, "cpu": 100 * 2**30}
    assert memory_of_each(size("65GiB")) == allowed
    source, asked = tiny_checkpoint(tmp_path, "llama"), {}

    def opened(_, **options):
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", opened)
    with pytest.raises(InterruptedError):
        load_model(source, torch.float32, torch.device("cpu"), False, True, 65 * 2**30)
    assert (asked["device_map"], asked["max_memory"]) == ("auto", allowed)


def test_a_size_of_memory_that_is_none_or_has_nothing_to_act_on_is_refused(run_main, tiny_checkpoint, tmp_path):
    from eval.__main__ import main

    source = tiny_checkpoint(tmp_path, "llama")
    code, _, error = run_main(main, "ppl", "--model", source, "--device", "cuda:all", "--max-memory", "much")
    assert (code, error.count("\n")) == (2, 1)
    assert "--max-memory: much is not allowed; give a size such as 65GiB" in error
    for device in ("cpu", "auto"):
        code, _, error = run_main(main, "ppl", "--model", source, "--device", device, "--max-memory", "65GiB")
        assert (code, error.count("\n")) == (2, 1)
        assert "--max-memory is for a model that is spread: add --device cuda:all" in error


def test_a_dense_model_that_no_memory_holds_is_read_from_its_files(checkpoint, monkeypatch):
    """cuda:all takes the way from the files to the devices; here the CPU has room for the embeddings alone."""
    place = transformers.modeling_utils._get_device_map
    room = {"cpu": 150_000, "disk": 10**9}
    monkeypatch.setattr("transformers.modeling_utils._get_device_map", lambda m, d, _, q: place(m, d, room, q))
    directory, ids = checkpoint(), random_ids(12)[None]
    parts = load_model(directory, torch.float32, torch.device("cpu"), spread_over_gpus=True)
    assert {"cpu", "disk"} == {str(where) for where in parts.hf_device_map.values()}
    whole = load_model(directory, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(parts(ids).logits, whole(ids).logits)
