"""Any model behind its own full-precision prefix is that model: scoring, generation, batches, padding, dialogues."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, SLIDING, plain_logits, random_ids
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig

from corpora.errors import UserError
from intactkv.attach import attach
from intactkv.attention import NAME
from intactkv.prefix import build_prefix
from quantization.kv_cache import PerHead

BOS = 1
IDS = torch.cat([torch.tensor([BOS]), random_ids(33)])  # as long as the Vicuna prompt
# Logits of the tiny models reach about 10 in float32: a pass split in two sums in another order.
SAME = {"atol": 1e-4, "rtol": 1e-4}


def family(tiny_model, name, **overrides):
    model_type, own = FAMILIES[name]
    model = tiny_model(model_type, **{**own, **overrides})
    model.generation_config.eos_token_id = None  # texts end where the test says
    return model


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model):
    return family(tiny_model, request.param)


@pytest.fixture
def llama(tiny_model):
    return family(tiny_model, "llama")


def behind_prefix(model, length: int = 3, **options):
    return attach(model, build_prefix(model, IDS[:length]), **options)


def dialogue(length: int, seed: int = 1, prefix: int = 3) -> Tensor:
    """A text of `length` tokens behind the first `prefix` ids: (prefix + length,)."""
    return torch.cat([IDS[:prefix], random_ids(length, seed)])


def batch_of(rows: list[Tensor], side: str, width: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unequal length as one batch, padded on a side (`alternating`: each row on another one)."""
    width = max(width, *(row.numel() for row in rows))
    ids, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
    for i, row in enumerate(rows):
        left = side == "left" or (side == "alternating" and i % 2 == 0)
        place = slice(width - row.numel(), width) if left else slice(0, row.numel())
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def assert_columns(logits: Tensor, mask: Tensor, expected: list[Tensor]) -> None:
    assert logits.dtype == torch.float32
    for row, keep, truth in zip(logits, mask.bool(), expected, strict=True):
        assert_close(row[keep], truth, **SAME)
        assert torch.count_nonzero(row[~keep]) == 0


# Scoring --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 34])
def test_scores_behind_the_prefix_are_the_plain_models(model, length):
    text = dialogue(10, prefix=length)
    assert_close(behind_prefix(model, length).score(text[None])[0], plain_logits(model, text), **SAME)


@pytest.mark.parametrize("length", [1, 3, 34])
def test_a_row_without_the_prefix_gets_it_in_front(model, length):
    row = random_ids(9, seed=2)
    expected = plain_logits(model, torch.cat([IDS[:length], row]))[-9:]
    assert_close(behind_prefix(model, length).score(row[None])[0], expected, **SAME)


@pytest.mark.parametrize("length", [3, 34])
def test_a_rows_own_bos_gives_way_to_the_prefixs(model, length):
    row = torch.cat([torch.tensor([BOS]), random_ids(9, seed=2)])
    # One column for each given token: the [BOS] takes what the last prefix token says about the text.
    expected = plain_logits(model, torch.cat([IDS[:length], row[1:]]))[-10:]
    assert_close(behind_prefix(model, length).score(row[None])[0], expected, **SAME)


@pytest.mark.parametrize("side", ["left", "right", "alternating"])
@pytest.mark.parametrize("contains_prefix", [True, False])
def test_padded_rows_score_as_they_do_alone(model, side, contains_prefix):
    texts = [random_ids(count, seed=count) for count in (4, 11, 1)]
    rows = [torch.cat([IDS[:3], text]) for text in texts] if contains_prefix else texts
    ids, mask = batch_of(rows, side, width=16)
    logits = behind_prefix(model).score(ids, mask)
    lengths = [len(row) for row in rows]
    expected = [plain_logits(model, torch.cat([IDS[:3], text])) for text in texts]
    assert_columns(logits, mask, [e[-length:] for e, length in zip(expected, lengths, strict=True)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_prefix_padded_rows_score_as_in_the_plain_model(model, side):
    rows = [dialogue(count, seed=count) for count in (4, 11, 1)]
    ids, mask = batch_of(rows, side)
    assert_columns(attach(model, None).score(ids, mask), mask, [plain_logits(model, row) for row in rows])


def test_a_mask_of_ones_or_of_booleans_changes_nothing(llama):
    behind, text = behind_prefix(llama), dialogue(10)[None]
    expected = behind.score(text)
    assert torch.equal(behind.score(text, torch.ones_like(text)), expected)
    ids, mask = batch_of([dialogue(5), dialogue(10)], "left")
    assert torch.equal(behind.score(ids, mask.bool()), behind.score(ids, mask))


def test_the_second_call_equals_the_first_bit_for_bit(model):
    behind = behind_prefix(model)
    ids, mask = batch_of([dialogue(5), dialogue(10)], "left")
    first = behind.score(ids, mask), behind.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    second = behind.score(ids, mask), behind.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_the_model_itself_is_not_changed(model):
    text = dialogue(10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = plain_logits(model, text)
    behind_prefix(model, kv=PerHead(2)).score(text[None])
    assert torch.equal(plain_logits(model, text), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_a_prefix_of_the_same_dtype_adds_no_error(model, dtype):
    text = dialogue(20)
    exact = plain_logits(model, text)
    half = model.to(dtype)
    own_error = (plain_logits(half, text) - exact).norm()
    error = (behind_prefix(half).score(text[None])[0] - exact).norm()
    # Both round at every layer; which roundings happen differs with the shape of the pass.
    assert error < 1.5 * own_error


def test_a_full_precision_prefix_helps_a_half_precision_model(llama):
    prefix, text = build_prefix(llama, IDS), dialogue(10, prefix=34)
    exact = plain_logits(llama, text)
    half = llama.to(torch.bfloat16)
    error = (attach(half, prefix).score(text[None])[0] - exact).norm()
    assert error < (plain_logits(half, text) - exact).norm()


def test_a_batch_where_only_some_rows_contain_the_prefix_is_refused(llama):
    behind = behind_prefix(llama)
    ids, mask = batch_of([dialogue(5), random_ids(8)], "left")
    for call in (behind.score, behind.generate):
        with pytest.raises(UserError, match="1 of 2 rows of the batch start with the prefix"):
            call(ids, mask)


@pytest.mark.parametrize("hole", [[1, 0, 1, 1, 1], [0, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
def test_a_mask_with_holes_or_with_pads_on_both_sides_is_refused(llama, hole):
    behind = behind_prefix(llama, 1)
    ids = dialogue(4, prefix=1)[None]
    for call in (behind.score, behind.generate):
        with pytest.raises(UserError, match="holes"):
            call(ids, torch.tensor([hole]))


@pytest.mark.parametrize("length", [1, 3])
def test_a_prompt_that_leaves_nothing_to_feed_is_refused(llama, length):
    behind = behind_prefix(llama, length)
    with pytest.raises(UserError, match="equals the prefix"):
        behind.score(IDS[None, :length])
    with pytest.raises(UserError, match="equals the prefix"):
        behind.generate(IDS[None, :length], max_new_tokens=2)
    with pytest.raises(UserError, match="equals the prefix"):
        behind.generate(torch.tensor([[BOS]]), max_new_tokens=2, prepend=True)
    ids, mask = batch_of([dialogue(4, prefix=length), IDS[:length]], "left")
    with pytest.raises(UserError, match="equals the prefix"):
        behind.score(ids, mask)
    with pytest.raises(UserError, match="or is empty"):
        attach(llama, None).score(torch.ones(1, 3).long(), torch.zeros(1, 3).long())


def test_ids_that_are_no_batch_are_refused(llama):
    with pytest.raises(UserError, match=r"shape \(8,\); expected \(batch, tokens\)"):
        behind_prefix(llama).score(dialogue(5))


# Generation -----------------------------------------------------------------------------------------------------------


def generated_alone(model, row: Tensor, **options) -> Tensor:
    """What transformers itself appends to one unpadded prompt, (new tokens,) or (returned, new tokens)."""
    output = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **options)[:, row.numel() :]
    return output[0] if output.shape[0] == 1 else output


GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("length", [1, 3, 34])
def test_greedy_text_is_the_plain_models(model, length):
    prompt = dialogue(5, prefix=length)
    output = behind_prefix(model, length).generate(prompt[None], **GREEDY)
    assert torch.equal(output[0], torch.cat([prompt, generated_alone(model, prompt, **GREEDY)]))


@pytest.mark.parametrize("side", ["left", "right", "alternating"])
def test_greedy_text_of_a_padded_batch_is_that_of_its_rows_alone(model, side):
    rows = [dialogue(count, seed=count) for count in (2, 7, 1)]
    ids, mask = batch_of(rows, side, width=12)
    output = behind_prefix(model).generate(ids, attention_mask=mask, **GREEDY)
    assert output.shape == (3, 12 + 8)
    for row, prompt in zip(output, rows, strict=True):
        # The prompt stands right before its text, whichever side it was padded on.
        assert torch.equal(row, torch.cat([row[: 12 - len(prompt)], prompt, generated_alone(model, prompt, **GREEDY)]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_without_the_prefix_get_it_on_request_only(model, side):
    rows = [random_ids(count, seed=count) for count in (2, 7)]
    rows.append(torch.cat([torch.tensor([BOS]), random_ids(3, seed=8)]))  # its own [BOS] gives way
    ids, mask = batch_of(rows, side)
    behind = behind_prefix(model)
    with pytest.raises(UserError, match="prepend=True"):
        behind.generate(ids, attention_mask=mask, **GREEDY)
    output = behind.generate(ids, attention_mask=mask, prepend=True, **GREEDY)
    for row, prompt in zip(output, rows, strict=True):
        whole = torch.cat([IDS[:3], prompt[prompt != BOS]])
        assert torch.equal(row[7 - len(prompt) :], torch.cat([prompt, generated_alone(model, whole, **GREEDY)]))


def test_without_a_prefix_generation_is_the_plain_models(model):
    rows = [dialogue(count, seed=count) for count in (2, 7)]
    ids, mask = batch_of(rows, "left")
    output = attach(model, None).generate(ids, attention_mask=mask, **GREEDY)
    for row, prompt in zip(output, rows, strict=True):
        assert torch.equal(row[10:], generated_alone(model, prompt, **GREEDY))


@pytest.mark.parametrize(("beams", "returned"), [(2, 1), (4, 3)])
def test_beam_search_is_the_plain_models(model, beams, returned):
    prompt = dialogue(5)
    options = {**GREEDY, "num_beams": beams, "num_return_sequences": returned}
    expected = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
    assert torch.equal(behind_prefix(model).generate(prompt[None], **options), expected)


def test_beam_search_of_a_padded_batch_is_that_of_its_rows_alone(model):
    rows = [dialogue(2, seed=2), dialogue(7, seed=7)]
    ids, mask = batch_of(rows, "left")
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    output = behind_prefix(model).generate(ids, attention_mask=mask, **options).view(2, 2, -1)
    for row, prompt in zip(output, rows, strict=True):
        assert torch.equal(row[:, 10:], generated_alone(model, prompt, **options))


def test_sampling_with_a_seed_draws_what_the_plain_model_draws(model):
    prompt = dialogue(5)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 20, "temperature": 3.0, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
    torch.manual_seed(5)
    assert torch.equal(behind_prefix(model).generate(prompt[None], **options), expected)
    assert len({tuple(row.tolist()) for row in expected}) > 1


def test_a_dictionary_is_returned_on_request_with_the_plain_models_scores(llama):
    prompt = dialogue(5)
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    expected = llama.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
    output = behind_prefix(llama).generate(prompt[None], **options)
    assert torch.equal(output.sequences, expected.sequences)
    for ours, theirs in zip(output.scores, expected.scores, strict=True):
        assert_close(ours, theirs, **SAME)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "opt"])
def test_assisted_decoding_which_starts_with_an_empty_cache_is_refused_behind_a_prefix(name, tiny_model):
    model = family(tiny_model, name)
    prompt = torch.cat([IDS[:3], random_ids(4).repeat(3)])  # repeats itself, so that there is something to look up
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(UserError, match="assisted decoding"):
            behind_prefix(model).generate(prompt[None], **options, **GREEDY)
    # Without a prefix it is right, and crops the cache.
    output = attach(model, None).generate(prompt[None], prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(output[0, len(prompt) :], generated_alone(model, prompt, **GREEDY))


def test_generating_without_a_cache_is_refused_unless_only_the_checkpoint_says_so(llama):
    behind, prompt = behind_prefix(llama), dialogue(5)
    with pytest.raises(UserError, match="use_cache=False"):
        behind.generate(prompt[None], use_cache=False, **GREEDY)
    with pytest.raises(UserError, match="use_cache=False"):
        behind.generate(prompt[None], generation_config=GenerationConfig(use_cache=False), **GREEDY)
    expected = generated_alone(llama, prompt, **GREEDY)
    llama.generation_config.use_cache = llama.config.use_cache = False  # what training leaves in a checkpoint
    assert torch.equal(behind.generate(prompt[None], **GREEDY)[0, len(prompt) :], expected)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_fed_in_chunks_gives_the_same_text(model, chunk):
    prompt = dialogue(20)
    output = behind_prefix(model).generate(prompt[None], prefill_chunk_size=chunk, **GREEDY)
    assert torch.equal(output[0, len(prompt) :], generated_alone(model, prompt, **GREEDY))


def test_another_cache_implementation_is_refused(llama):
    behind = behind_prefix(llama)
    with pytest.raises(UserError, match="cache_implementation"):
        behind.generate(dialogue(5)[None], cache_implementation="static", **GREEDY)
    with pytest.raises(UserError, match="cache_implementation"):
        behind.generate(dialogue(5)[None], generation_config=GenerationConfig(cache_implementation="static"))


# Dialogues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 1}], ids=["greedy", "beams", "one"])
def test_going_on_with_the_returned_cache_equals_feeding_the_whole_dialogue(model, prepend, options):
    behind = behind_prefix(model)
    prompt = (random_ids(5, seed=1) if prepend else dialogue(5))[None]
    answer = behind.generate(prompt, return_dict_in_generate=True, prepend=prepend, **GREEDY)
    for turn in range(2):
        prompt = torch.cat([answer.sequences, random_ids(4, seed=turn)[None]], dim=1)
        whole = prompt[0] if not prepend else torch.cat([IDS[:3], prompt[0]])
        last = {**GREEDY, **(options if turn else {})}
        fed = FirstPass(model)
        with fed:
            answer = behind.generate(
                prompt, past_key_values=answer.past_key_values, return_dict_in_generate=True, prepend=prepend, **last
            )
        assert torch.equal(answer.sequences[0, prompt.shape[1] :], generated_alone(model, whole, **last))
        assert fed.tokens == 5  # the new turn, and the last token of the answer, which no pass has read yet


class FirstPass:
    """How many tokens the model's first pass reads while the block runs."""

    def __init__(self, model):
        self.model, self.tokens = model, None

    def __enter__(self):
        def look(_module, args, kwargs):
            if self.tokens is None:
                self.tokens = kwargs["input_ids"].shape[1]

        self.handle = self.model.register_forward_pre_hook(look, with_kwargs=True)

    def __exit__(self, *_):
        self.handle.remove()


def answered(behind, prompt: Tensor, **options):
    return behind.generate(prompt, return_dict_in_generate=True, **{**GREEDY, **options})


def test_a_cache_of_another_dialogue_is_refused(llama):
    behind = behind_prefix(llama)
    kept = answered(behind, dialogue(5, seed=1)[None]).past_key_values
    for other in (dialogue(30, seed=2), dialogue(5, seed=1)):  # another text; the beginning of the same one
        with pytest.raises(UserError, match="does not hold the beginning of this prompt"):
            behind.generate(other[None], past_key_values=kept, **GREEDY)


def test_a_cache_that_is_not_one_finished_answer_is_refused(llama):
    behind = behind_prefix(llama)
    prompt = dialogue(5)[None]
    beams = answered(behind, prompt, num_beams=3)
    several = answered(behind, prompt, num_return_sequences=2, do_sample=True)
    batch = answered(behind, torch.cat([prompt, prompt]))
    fresh = behind.new_cache()
    foreign = DynamicCache(config=llama.config)
    for cache, text in (
        (beams.past_key_values, beams.sequences),  # holds the beams, not the sequence that won
        (several.past_key_values, several.sequences[:1]),
        (batch.past_key_values, batch.sequences),
        (fresh, prompt),
        (foreign, prompt),
    ):
        longer = torch.cat([text, torch.full_like(text[:, :3], 7)], dim=1)
        with pytest.raises(UserError, match="past_key_values"):
            behind.generate(longer, past_key_values=cache, **GREEDY)


def test_a_cache_that_another_arm_filled_is_refused(llama):
    behind, vanilla, quantized = behind_prefix(llama), attach(llama, None), behind_prefix(llama, kv=PerHead(4))
    for filled_by, reader in ((vanilla, behind), (behind, vanilla), (quantized, behind), (behind, quantized)):
        answer = answered(filled_by, dialogue(5)[None])
        prompt = torch.cat([answer.sequences, random_ids(4)[None]], dim=1)
        with pytest.raises(UserError, match="past_key_values"):
            reader.generate(prompt, past_key_values=answer.past_key_values, **GREEDY)


def test_an_interrupted_answer_leaves_no_cache_that_could_be_continued(llama):
    behind = behind_prefix(llama)
    answer = answered(behind, dialogue(5)[None])
    prompt = torch.cat([answer.sequences, random_ids(4)[None]], dim=1)
    other = torch.cat([answer.sequences, random_ids(4, seed=9)[None]], dim=1)

    def stop(_ids, _scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        behind.generate(prompt, past_key_values=answer.past_key_values, stopping_criteria=[stop], **GREEDY)
    with pytest.raises(UserError, match="past_key_values"):
        behind.generate(other, past_key_values=answer.past_key_values, **GREEDY)


def test_a_cropped_cache_goes_on_from_where_it_was_cropped(llama):
    behind = behind_prefix(llama)
    answer = answered(behind, dialogue(5)[None])
    answer.past_key_values.crop(-4)
    prompt = torch.cat([answer.sequences[:, :-5], random_ids(4, seed=3)[None]], dim=1)
    output = behind.generate(prompt, past_key_values=answer.past_key_values, **GREEDY)
    assert torch.equal(output[0, prompt.shape[1] :], generated_alone(llama, prompt[0], **GREEDY))


# Sliding windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLIDING)
def test_beyond_the_window_the_model_is_the_plain_one(name, tiny_model):
    model = family(tiny_model, name, sliding_window=12)
    text = dialogue(30)
    behind = behind_prefix(model)
    full = tiny_model(model.config.model_type)
    assert not torch.allclose(plain_logits(full, text), plain_logits(model, text), **SAME)  # the window matters
    assert_close(behind.score(text[None])[0], plain_logits(model, text), **SAME)
    both = torch.stack([text, dialogue(30, seed=4)])
    assert_close(behind.score(both)[1], plain_logits(model, both[1]), **SAME)
    for prompt in (dialogue(5), text):
        options = {"max_new_tokens": 20, "do_sample": False}
        output = behind.generate(prompt[None], **options)
        assert torch.equal(output[0, len(prompt) :], generated_alone(model, prompt, **options))


@pytest.mark.parametrize("name", SLIDING)
def test_a_dialogue_beyond_the_window_goes_on_as_in_the_plain_model(name, tiny_model):
    model = family(tiny_model, name, sliding_window=12)
    behind = behind_prefix(model)
    answer = answered(behind, dialogue(15)[None])
    prompt = torch.cat([answer.sequences, random_ids(6)[None]], dim=1)
    output = behind.generate(prompt, past_key_values=answer.past_key_values, **GREEDY)
    assert torch.equal(output[0, prompt.shape[1] :], generated_alone(model, prompt[0], **GREEDY))


@pytest.mark.parametrize("name", SLIDING)
def test_padding_that_would_push_the_prefix_out_of_a_window_is_refused(name, tiny_model):
    model = family(tiny_model, name, sliding_window=12)
    behind = behind_prefix(model)
    ids, mask = batch_of([dialogue(3), dialogue(12)], "left")
    with pytest.raises(UserError, match="sliding window of 12"):
        behind.score(ids, mask)
    ids, mask = batch_of([dialogue(3), dialogue(5)], "left")
    behind.score(ids, mask)
    behind.generate(ids, attention_mask=mask, max_new_tokens=4)
    for options in (
        {"max_new_tokens": 8},
        {"max_length": 16},
        {"generation_config": GenerationConfig(max_new_tokens=8)},
        {"generation_config": GenerationConfig(max_length=16)},
        {},  # transformers' own default, 20 in all
    ):
        with pytest.raises(UserError, match="sliding window of 12"):
            behind.generate(ids, attention_mask=mask, **options)
    behind.generate(ids, attention_mask=mask, max_length=12)


@pytest.mark.parametrize("name", SLIDING)
def test_without_a_prefix_a_padded_batch_may_outgrow_the_window(name, tiny_model):
    model = family(tiny_model, name, sliding_window=12)
    rows = [dialogue(3), dialogue(20)]
    ids, mask = batch_of(rows, "left")
    vanilla = attach(model, None)
    assert_columns(vanilla.score(ids, mask), mask, [plain_logits(model, row) for row in rows])
    output = vanilla.generate(ids, attention_mask=mask, **GREEDY)
    for row, prompt in zip(output, rows, strict=True):
        assert torch.equal(row[ids.shape[1] :], generated_alone(model, prompt, **GREEDY))


# Attention implementations --------------------------------------------------------------------------------------------


def test_eager_attention_gives_the_same(model):
    rows = [dialogue(4), dialogue(20)]
    ids, mask = batch_of(rows, "left")
    behind = behind_prefix(model)
    expected, text = behind.score(ids, mask), behind.generate(ids, attention_mask=mask, **GREEDY)
    model.set_attn_implementation("eager")
    assert_close(behind.score(ids, mask), expected, **SAME)
    assert torch.equal(behind.generate(ids, attention_mask=mask, **GREEDY), text)
    assert model.config._attn_implementation == "eager"


def test_eager_attention_shows_its_maps(llama):
    llama.set_attn_implementation("eager")
    behind, text = behind_prefix(llama), dialogue(6)
    truth = llama(text[None], output_attentions=True).attentions
    output = llama(text[None, 3:], past_key_values=behind.new_cache(), output_attentions=True)
    for ours, theirs in zip(output.attentions, truth, strict=True):
        assert_close(ours, theirs[:, :, 3:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_attention_implementation_is_told_once(llama, implementation):
    llama.set_attn_implementation(implementation)
    behind = behind_prefix(llama)
    once = NAME if implementation == "sdpa" else implementation
    seen = []
    handle = llama.register_forward_hook(lambda *_: seen.append(llama.config._attn_implementation))
    behind.score(dialogue(20)[None])
    behind.generate(dialogue(5)[None], **GREEDY)
    assert set(seen) == {llama.config._attn_implementation} == {once}
    handle.remove()

    def fail(*_):
        raise RuntimeError("in the middle of a pass")

    handle = llama.model.layers[1].register_forward_hook(fail)
    for call in (lambda: behind.score(dialogue(20)[None]), lambda: behind.generate(dialogue(5)[None], **GREEDY)):
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
        assert llama.config._attn_implementation == once
    handle.remove()
    assert_close(behind.score(dialogue(20)[None])[0], plain_logits(llama, dialogue(20)), **SAME)


@pytest.fixture
def attention_calls(monkeypatch):
    """(has a mask, is_causal, queries, keys) of every call of torch's scaled_dot_product_attention."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        calls.append((attn_mask is not None, bool(is_causal), query.shape[2], key.shape[2]))
        return attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("batch", [1, 3])
def test_an_unpadded_batch_runs_without_a_mask_and_equals_the_run_with_one(model, attention_calls, batch):
    text = random_ids(20 * batch).view(batch, 20)
    behind = behind_prefix(model)
    attention_calls.clear()
    maskless = behind.feed(text).logits
    assert attention_calls == [(False, True, 23, 23)] * 3
    attention_calls.clear()
    model.set_attn_implementation("sdpa")  # transformers' own way
    explicit = model(text, past_key_values=behind.new_cache(), use_cache=True).logits
    assert {masked for masked, *_ in attention_calls} == {True}
    assert_close(maskless, explicit, **SAME)


def test_where_the_fast_path_does_not_pay_or_hold_a_mask_is_used(tiny_model, attention_calls):
    llama, sliding = family(tiny_model, "llama"), family(tiny_model, "mistral", sliding_window=12)
    for behind, feed in (
        (behind_prefix(llama, 34), lambda b: b.feed(random_ids(10)[None])),  # a long prefix before a short text
        (behind_prefix(llama), lambda b: b.score(*batch_of([dialogue(4), dialogue(20)], "left"))),  # pads
        (behind_prefix(sliding), lambda b: b.feed(random_ids(20)[None])),  # beyond the window
    ):
        attention_calls.clear()
        feed(behind)
        assert {(masked, causal) for masked, causal, *_ in attention_calls} == {(True, False)}


# Feeding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 17])
@pytest.mark.parametrize("length", [1, 3])
def test_feeding_in_chunks_equals_one_pass(model, chunk, length):
    text, behind = random_ids(40)[None], behind_prefix(model, length)
    cache = behind.new_cache()
    logits = torch.cat([behind.feed(part, cache=cache).logits for part in text.split(chunk, dim=1)], dim=1)
    assert cache.get_seq_length() == length + 40
    assert_close(logits, behind.feed(text).logits, **SAME)
    assert_close(logits[0], plain_logits(model, torch.cat([IDS[:length], text[0]]))[length:], **SAME)


def test_a_padded_batch_may_be_fed_in_chunks_with_the_whole_mask(model):
    behind = behind_prefix(model)
    rows = [random_ids(4, seed=4), random_ids(9, seed=9)]
    ids, mask = batch_of(rows, "left")
    cache = behind.new_cache()
    first = behind.feed(ids[:, :6], mask[:, :6], cache=cache).logits
    logits = torch.cat([first, behind.feed(ids[:, 6:], mask, cache=cache).logits], dim=1)
    for row, keep, text in zip(logits, mask.bool(), rows, strict=True):
        assert_close(row[keep], plain_logits(model, torch.cat([IDS[:3], text]))[3:], **SAME)


def test_a_mask_that_does_not_cover_all_behind_the_prefix_is_refused(llama):
    behind, (ids, mask) = behind_prefix(llama), batch_of([random_ids(4), random_ids(9)], "left")
    with pytest.raises(UserError, match="mask has 8 columns; expected one for each of the 9 tokens"):
        behind.feed(ids, mask[:, 1:] * 0)
    cache = behind.new_cache()
    behind.feed(ids, mask, cache=cache)
    with pytest.raises(UserError, match="mask has 9 columns; expected one for each of the 18 tokens"):
        behind.feed(ids, mask, cache=cache)


def test_a_part_of_the_model_can_be_fed(model):
    behind, text = behind_prefix(model), random_ids(9)
    states = behind.feed(text[None], through=model.base_model).last_hidden_state
    truth = model.base_model(torch.cat([IDS[:3], text])[None]).last_hidden_state[:, 3:]
    assert_close(states, truth, **SAME)


def leaves_of(tensor: Tensor) -> set[int]:
    """ids of the tensors that a backward pass would give a gradient to."""
    found, todo, seen = set(), [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(parent for parent, _ in node.next_functions)
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_reach_the_prefixs_2l_tensors_and_nothing_else(model, padded):
    prefix = build_prefix(model, IDS[:3])
    trainable = replace(
        prefix,
        keys=tuple(key.clone().requires_grad_() for key in prefix.keys),
        values=tuple(value.clone().requires_grad_() for value in prefix.values),
    )
    parameters = [*trainable.keys, *trainable.values]
    rows = [dialogue(20), dialogue(14 if padded else 20, seed=2)]
    loss = attach(model, trainable).score(*batch_of(rows, "left")).square().mean()
    assert leaves_of(loss) == {id(tensor) for tensor in parameters}
    loss.backward()
    assert len(parameters) == 2 * model.config.num_hidden_layers
    for tensor in parameters:
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad != 0).any()


def test_the_gradient_is_the_slope_of_the_loss(tiny_model):
    model = family(tiny_model, "opt").double()  # RoPE models compute their norms in float32 whatever the dtype
    prefix, text = build_prefix(model, IDS[:3]), random_ids(20)[None]
    direction = torch.randn_like(prefix.keys[1], generator=torch.Generator().manual_seed(0))

    def loss(key: Tensor) -> Tensor:
        changed = replace(prefix, keys=(prefix.keys[0], key, prefix.keys[2]))
        return attach(model, changed).feed(text).logits.square().mean()

    key = prefix.keys[1].clone().requires_grad_()
    loss(key).backward()
    step = 1e-5
    slope = (loss(prefix.keys[1] + step * direction) - loss(prefix.keys[1] - step * direction)) / (2 * step)
    assert_close((key.grad * direction).sum(), slope, rtol=1e-5, atol=0.0)
