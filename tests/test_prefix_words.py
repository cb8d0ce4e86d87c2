"""The words of --prefix, the file behind each, and what the prefix is for: less error where the sink is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import every
from families import plain_logits, random_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corpora.errors import UserError
from corpora.sharegpt import VICUNA_SYSTEM
from intactkv.attach import attach
from intactkv.prefix import Prefix, build_prefix
from quantization.grids.uniform import UniformGrid, fake_quantize
from quantization.kv_cache import PerHead
from quantization.runs.checkpoint import model_name
from quantization.runs.prefixes import auto_search, choose_prefix, keep_prefix, prefix_file, searched_in, stored_prefix

BOS, EOS = 1, 2
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<s>[SYS]Be kind.[/SYS]\n{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


# Words ----------------------------------------------------------------------------------------------------------------


def test_none_is_no_prefix(tokenizer):
    choice = choose_prefix("none", tokenizer, "tiny")
    assert (choice.label, choice.ids, choice.file) == ("none", (), None)


def test_bos_is_the_start_token_and_eos_where_a_tokenizer_has_no_bos(tokenizer, tiny_tokenizer):
    assert (choose_prefix("bos", tokenizer, "tiny").label, choose_prefix("bos", tokenizer, "tiny").ids) == ("[B]", (1,))
    assert choose_prefix("bos", tiny_tokenizer(bos_token=None), "tiny").ids == (EOS,)
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        choose_prefix("bos", tiny_tokenizer(bos_token=None, eos_token=None), "tiny")


@pytest.mark.parametrize("text", ["Hello you", "<s>Hello you"])
def test_a_text_gets_exactly_one_start_token_in_front(tokenizer, text):
    choice = choose_prefix(text, tokenizer, "tiny")
    assert choice.label == "[T]"
    assert tokenizer.decode(choice.ids) == "<s>Hello you"
    assert choice.ids.count(BOS) == 1


def conversations() -> list[list[dict[str, str]]]:
    texts = ["apples", "Zebras", "1 + 1 = ?", "é", "<tag>", "a\nb", "user: user:"]
    single = [[{"role": "user", "content": text}] for text in texts]
    dialogue = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return [*single, [*dialogue, {"role": "user", "content": "Bye"}]]


def test_prompt_is_what_every_conversation_of_the_chat_template_starts_with(tokenizer):
    tokenizer.chat_template = CHAT
    choice = choose_prefix("prompt", tokenizer, "tiny")
    assert choice.label == "[P]"
    assert tokenizer.decode(choice.ids) == "<s>[SYS]Be kind.[/SYS]\n<s>user: "
    for conversation in conversations():
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tuple(ids[: len(choice.ids)]) == choice.ids


def test_a_chat_template_that_spells_out_no_start_token_gets_one(tokenizer):
    tokenizer.chat_template = CHAT.replace("<s>", "")
    ids = choose_prefix("prompt", tokenizer, "tiny").ids
    assert tokenizer.decode(ids) == "<s>[SYS]Be kind.[/SYS]\nuser: "


def test_a_chat_template_with_nothing_in_common_leaves_the_start_token(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert choose_prefix("prompt", tokenizer, "tiny").ids == (BOS,)


def test_prompt_of_vicuna_is_its_published_system_message(tokenizer):
    ids = choose_prefix("prompt", tokenizer, "Vicuna-v1.5-7b").ids
    assert tokenizer.decode(ids) == f"<s>{VICUNA_SYSTEM} USER:"
    assert len(VICUNA_SYSTEM) == 154


def test_prompt_without_a_chat_template_is_refused_by_the_models_name(tokenizer):
    with pytest.raises(UserError, match="tokenizer of llama-2-7b has no chat template"):
        choose_prefix("prompt", tokenizer, "llama-2-7b")


@every(
    ("word", "search", "given"),
    [
        ("auto", (None, None), "auto:c4"),
        ("auto:wikitext2", ("wikitext2", None), "auto:wikitext2"),
        ("auto@32", (None, 32.0), "auto:c4@32"),
        ("auto:wikitext2@2.5", ("wikitext2", 2.5), "auto:wikitext2@2.5"),
        ("auto:/home/me@work/a text.txt", ("/home/me@work/a text.txt", None), "auto:/home/me@work/a text.txt"),
        ("automatic", None, "automatic"),
        ("bos", None, "bos"),
    ],
)
def test_auto_names_the_text_to_search_and_what_an_outlier_is(word, search, given):
    assert auto_search(word) == search
    assert searched_in(word, "c4") == given


def test_a_word_that_only_begins_like_auto_is_a_text(tokenizer):
    assert choose_prefix("automatic", tokenizer, "tiny").label == "[T]"


def test_a_file_gives_its_ids_and_its_name(tokenizer, tiny_model, tmp_path):
    path = tmp_path / "mine.safetensors"
    build_prefix(tiny_model("llama"), [BOS, 9, 8]).save(path)
    choice = choose_prefix(str(path), tokenizer, "tiny")
    assert (choice.label, choice.ids, choice.file) == ("[mine]", (1, 9, 8), path)


def test_a_missing_or_broken_file_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        choose_prefix(str(tmp_path / "absent.safetensors"), tokenizer, "tiny")
    (tmp_path / "broken.safetensors").write_text("broken")
    with pytest.raises(UserError, match="is truncated or not a safetensors file"):
        choose_prefix(str(tmp_path / "broken.safetensors"), tokenizer, "tiny")


def test_a_word_that_looks_like_a_path_is_not_taken_for_a_text(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"looks like a path, but prefix files end in \.safetensors"):
        choose_prefix(str(tmp_path / "prefix.pt"), tokenizer, "tiny")
    for word in ("either/or", "prompt.txt", "modelzoo/nowhere"):
        with pytest.raises(UserError, match=r"looks like a path.*text:… for one that looks like a path"):
            choose_prefix(word, tokenizer, "tiny")
    told = choose_prefix("text:either/or", tokenizer, "tiny")
    assert (told.label, tokenizer.decode(told.ids)) == ("[T]", "<s>either/or")
    for word in ("BOS", "None", "Prompt"):
        with pytest.raises(UserError, match=f"--prefix {word} is written {word.lower()}; .*text:…"):
            choose_prefix(word, tokenizer, "tiny")
    assert choose_prefix("text:BOS", tokenizer, "tiny").label == "[T]"
    for word in ("either / or", "</s>", "Once upon a time."):  # nobody calls a file so
        assert tokenizer.decode(choose_prefix(word, tokenizer, "tiny").ids) == f"<s>{word}"


def test_a_file_that_is_there_is_no_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_prefix("notes", tokenizer, "tiny").label == "[T]"
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="--prefix notes looks like a path"):
        choose_prefix("notes", tokenizer, "tiny")


# Files kept by identity -----------------------------------------------------------------------------------------------


def test_a_prefix_is_built_once_and_again_only_if_anything_that_made_it_differs(tokenizer, tiny_model, intactkv_root):
    built = []

    bases, dtypes = ["plain"], [torch.float32]  # of what the twin writes

    def twin():
        built.append(1)
        model = tiny_model("llama").to(dtypes[-1])
        model.intactkv_source = ("0123", bases[-1])
        return model

    def prefix(word: str = "bos", basis: str = "plain", dtype: torch.dtype = torch.float32) -> Prefix:
        bases.append(basis)
        dtypes.append(dtype)
        choice = choose_prefix(word, tokenizer, "tiny")
        made_of = {"source": "0123", "basis": basis}
        file = prefix_file(choice, "tiny", made_of, dtype)
        found, new = stored_prefix(choice, file, made_of, dtype, twin)
        if new:
            assert not file.exists()
            keep_prefix(found, choice, file)
        return found

    first = prefix()
    assert torch.equal(prefix().keys[0], first.keys[0])
    assert len(built) == 1
    prefix(basis="rotated")
    prefix(dtype=torch.float16)
    prefix("a text")
    assert len(built) == 4
    prefix("a text")
    assert len(built) == 4
    files = sorted(path.name.split("-")[0] for path in (intactkv_root / "modelzoo" / "prefixes" / "tiny").iterdir())
    assert files == ["bos", "bos", "bos", "text"]


half = torch.Tensor.half


@pytest.mark.parametrize(
    "what", ["a sign", "truncated", "other tokens", "another model", "a dtype", "trained", "a folder"]
)
def test_a_kept_prefix_that_is_not_what_its_name_says_is_built_again(
    what, tokenizer, tiny_model, intactkv_root, caplog
):
    model = tiny_model("llama")
    model.intactkv_source = ("0123", "plain")
    made_of, choice = {"source": "0123", "basis": "plain"}, choose_prefix("bos", tokenizer, "tiny")
    file = prefix_file(choice, "tiny", made_of, torch.float32)

    def prefix() -> Prefix:
        return stored_prefix(choice, file, made_of, torch.float32, lambda: model)[0]

    right = prefix()
    keep_prefix(right, choice, file)
    whole = file.read_bytes()
    other = tiny_model("llama")
    other.intactkv_source = ("4567", "plain")
    if what == "a sign":
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors["layers.0.key"].neg_()
        save_file(tensors, file, metadata)
    elif what == "truncated":
        file.write_bytes(whole[:-1])
    elif what == "a folder":
        file.unlink()
        file.mkdir()
    else:
        made = build_prefix(other if what == "another model" else model, [3 if what == "other tokens" else BOS])
        if what == "a dtype":
            made = replace(made, keys=tuple(map(half, made.keys)), values=tuple(map(half, made.values)))
        replace(made, calibrated={"steps": 1} if what == "trained" else None).save(file)
    if what == "a folder":
        with pytest.raises(UserError, match=r"the kept prefix .* is a directory, not a plain file"):
            prefix()
        assert "is built again" not in caplog.text
        return
    again = prefix()
    assert "the prefix [B] is built again" in caplog.text
    assert again.ids.tolist() == [BOS]
    assert all(torch.equal(a, b) for a, b in zip(again.keys, right.keys, strict=True))


def test_the_name_of_a_model_makes_no_path(tokenizer, intactkv_root):
    """Where it is read: of a directory here, of a manifest by its form."""
    choice = choose_prefix("bos", tokenizer, "tiny")
    for name in (".hidden", "a\\b", "a\nb", "x" * 300):
        with pytest.raises(UserError, match=r"(?s)the name of the model directory .*rename it"):
            model_name(Path(name))
    for name in ("../../../../X", "a/..", "tiny-1.5B_x"):
        place = prefix_file(choice, model_name(Path(name)), {}, torch.float32)
        assert place.resolve().parent.parent == (intactkv_root / "modelzoo" / "prefixes").resolve()


def test_a_given_file_is_read_and_nothing_is_built(tokenizer, tiny_model, tmp_path):
    path = tmp_path / "mine.safetensors"
    build_prefix(tiny_model("llama"), [BOS, 9]).save(path)

    def twin():
        raise AssertionError("the file was there")

    choice = choose_prefix(str(path), tokenizer, "tiny")
    prefix, new = stored_prefix(choice, prefix_file(choice, "tiny", {}, torch.float32), {}, torch.float32, twin)
    assert not new
    assert prefix.ids.tolist() == [BOS, 9]


# What it is for -------------------------------------------------------------------------------------------------------


def with_a_sink(tiny_model):
    """A llama in which [BOS] is a true pivot: one huge hidden channel, and a key that every query leans on.

    No block writes to channel 0, a constant of all tokens that drives one dimension of every query, nor to channel 1,
    which only [BOS] has and which drives the same dimension of the keys (of the slowest RoPE pair, which hardly turns).
    So [BOS] draws most of the attention, and what is wrong with its key and value reaches every later token: a grid
    that spans the large dimension of its key rounds the others away, as rounded weights move its large hidden state.
    """
    model = tiny_model("llama", max_position_embeddings=64)
    embedding = model.get_input_embeddings().weight
    embedding[:, :2] = torch.tensor([5.0, 0.0])
    embedding[BOS, 1] = 200.0
    slow = model.config.head_dim - 1
    for block in model.model.layers:
        block.input_layernorm.weight[:2] = 1
        block.self_attn.o_proj.weight[:2] = 0
        block.mlp.down_proj.weight[:2] = 0
        for projection, channel, size in ((block.self_attn.q_proj, 0, 1.0), (block.self_attn.k_proj, 1, 2.0)):
            projection.weight[slow :: model.config.head_dim] = 0
            projection.weight[slow :: model.config.head_dim, channel] = size
    return model


def error_behind(model, prefix: Prefix | None, text: torch.Tensor, truth: torch.Tensor, kv=None) -> float:
    logits = attach(model, prefix, kv).score(text[None])[0]
    return float((logits - truth)[1:].norm() / truth[1:].norm())


def test_the_planted_sink_draws_the_attention(tiny_model):
    model = with_a_sink(tiny_model)
    model.set_attn_implementation("eager")
    text = torch.cat([torch.tensor([BOS]), random_ids(40)])
    for attention in model(text[None], output_attentions=True).attentions:
        assert attention[0, :, 10:, 0].mean() > 0.5  # one of at least 11 tokens


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_with_a_sink_the_kv_error_behind_an_intact_bos_is_below_that_without(tiny_model, bits):
    model = with_a_sink(tiny_model)
    prefix = build_prefix(model, [BOS])
    with_prefix = without = 0.0
    for seed in range(4):
        text = torch.cat([torch.tensor([BOS]), random_ids(40, seed)])
        truth = plain_logits(model, text)
        with_prefix += error_behind(model, prefix, text, truth, PerHead(bits))
        without += error_behind(model, None, text, truth, PerHead(bits))
    assert with_prefix < 0.5 * without  # most of the attention stands on a slot that has no error


@pytest.mark.parametrize("bits", [3, 4])
def test_with_a_sink_the_weight_error_behind_an_intact_bos_is_below_that_without(tiny_model, bits):
    model = with_a_sink(tiny_model)
    prefix = build_prefix(model, [BOS])
    texts = [torch.cat([torch.tensor([BOS]), random_ids(40, seed)]) for seed in range(4)]
    truths = [plain_logits(model, text) for text in texts]
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.copy_(fake_quantize(weight, UniformGrid(bits, 16)))
    errors = [sum(error_behind(model, p, *pair) for pair in zip(texts, truths, strict=True)) for p in (prefix, None)]
    assert errors[0] < errors[1]


def test_a_prefix_that_another_model_wrote_would_have_made_it_worse(tiny_model):
    model = with_a_sink(tiny_model)
    prefix, text = build_prefix(model, [BOS]), torch.cat([torch.tensor([BOS]), random_ids(40)])
    truth = plain_logits(model, text)
    foreign = build_prefix(tiny_model("llama", max_position_embeddings=64), [BOS])
    forged = replace(prefix, keys=foreign.keys, values=foreign.values)
    assert error_behind(model, prefix, text, truth) < 1e-4 < error_behind(model, forged, text, truth)


@pytest.mark.parametrize(
    "word", ["auto@-1", "auto@nan", "auto@1", "auto@", "auto:", "auto@64@3", "AUTO@64", "auto@many"]
)
def test_a_word_that_begins_like_auto_is_no_text(word: str) -> None:
    with pytest.raises(UserError, match=rf"--prefix {word} is no form of auto; a ratio is a number above 1"):
        auto_search(word)
    assert auto_search("auto@1e3") == (None, 1000.0)
    assert auto_search("automatic weapons") is None
