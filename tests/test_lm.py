"""The wrapper for lm-eval: equal to the stock one without a prefix, and to full runs of the same tokens with one."""

import random
import string

import pytest
import torch
from families import FAMILIES, plain_logits
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from corpora.errors import UserError
from eval.generation import Generation
from eval.tasks.lm import IntactLM
from intactkv.attach import attach
from intactkv.prefix import build_prefix
from quantization.kv_cache.per_head import PerHead

BOS = 1
LEAD = (1, 20, 33, 47, 11)
CLOSE = 1e-4  # nats, of sums over a few dozen tokens in float32


def words(count: int, seed: int) -> str:
    """A text of `count` characters, one token each."""
    generator = random.Random(seed)
    return "".join(generator.choice(string.ascii_letters) for _ in range(count))


def likelihood_requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def rolling_requests(texts: list[str]) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]


def generation_requests(texts: list[str], **options) -> list[Instance]:
    options = {"until": ["zzz"], "max_gen_toks": 12} | options
    return [Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(texts)]


# Long and short, one token and many, several answers to one context, no context at all.
PAIRS = [
    *((words(30, 1), answer) for answer in "ABCD"),
    *((words(18, 2), words(n, n)) for n in (3, 9, 14)),
    *((words(n, 50 + n), words(5, n)) for n in (1, 2, 7, 40, 41)),
    ("", words(6, 9)),
    ("ends with a space ", "b"),
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer()


@pytest.fixture
def wrapper(tiny_model, tokenizer):
    """wrapper(family, lead, intact=…, kv=…, batch_size=…, context=…) -> IntactLM around a tiny model."""

    def make(family="llama", lead=(BOS,), *, intact=False, kv=None, batch_size=4, context=256) -> IntactLM:
        kind, overrides = FAMILIES[family]
        model = tiny_model(kind, **overrides)
        prefix = build_prefix(model, lead) if intact else None
        return IntactLM(
            attach(model, prefix, kv), tokenizer, lead, batch_size=batch_size, context=context,
            generation=Generation((2,), pad=0),
        )  # fmt: skip

    return make


@pytest.fixture
def stock(tiny_model, tokenizer):
    """stock(family, batch_size, context) -> lm-eval's own wrapper, which adds [BOS] by the tokenizer's template."""

    def make(family="llama", batch_size=4, context=256, bos=True) -> HFLM:
        kind, overrides = FAMILIES[family]
        model = tiny_model(kind, **overrides)
        return HFLM(model, "causal", tokenizer=tokenizer, batch_size=batch_size, max_length=context, add_bos_token=bos)

    return make


def full_run(lm: IntactLM, context: str, continuation: str) -> tuple[float, bool]:
    """A continuation's log-likelihood from one pass of the plain model over all its tokens, in float64."""
    encode = lm.tokenizer.encode
    front = [*lm.lead, *encode(context, add_special_tokens=False)]
    tokens = encode(continuation, add_special_tokens=False)
    logits = plain_logits(lm.intact.model, torch.tensor([*front, *tokens]))[len(front) - 1 : -1].double()
    picked = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
    return float(picked.sum()), logits.argmax(-1).tolist() == tokens


def assert_same(ours, theirs, tolerance=CLOSE) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_prefix_it_is_the_stock_wrapper_with_and_without_bos(wrapper, stock, family, bos):
    ours, theirs = wrapper(family, (BOS,) if bos else ()), stock(family, bos=bos)
    pairs = [pair for pair in PAIRS if pair[0]]  # the stock wrapper drops a first token that equals [BOS]: not here
    assert_same(ours.loglikelihood(likelihood_requests(pairs)), theirs.loglikelihood(likelihood_requests(pairs)))


@pytest.mark.parametrize("lead", [(BOS,), LEAD], ids=["bos", "text"])
@pytest.mark.parametrize("intact", [False, True], ids=["vanilla", "intact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_arm_scores_as_one_pass_over_lead_and_text(wrapper, family, intact, lead):
    lm = wrapper(family, lead, intact=intact)
    pairs = [pair for pair in PAIRS if not pair[0].endswith(" ")]
    got = lm.loglikelihood(likelihood_requests(pairs))
    assert_same(got, [full_run(lm, *pair) for pair in pairs])


@pytest.mark.parametrize("kv", [None, PerHead(4)], ids=["kv16", "kv4"])
@pytest.mark.parametrize(
    ("lead", "intact"), [((BOS,), False), ((BOS,), True), (LEAD, True)], ids=["none", "[B]", "text"]
)
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "opt"])
def test_batches_change_nothing(wrapper, family, lead, intact, kv):
    one = wrapper(family, lead, intact=intact, kv=kv, batch_size=1)
    eight = wrapper(family, lead, intact=intact, kv=kv, batch_size=8)
    requests = likelihood_requests(PAIRS)
    assert_same(eight.loglikelihood(requests), one.loglikelihood(requests))
    texts = [words(n, n) for n in (3, 20, 90)]
    for a, b in zip(eight.loglikelihood_rolling(rolling_requests(texts)),
                    one.loglikelihood_rolling(rolling_requests(texts)), strict=True):  # fmt: skip
        assert a == pytest.approx(b, abs=CLOSE)
    if family != "mistral-sliding":  # its pads would push the prefix out of the window: refused elsewhere
        prompts = [words(n, 7 * n) for n in (4, 9, 9, 21, 30)]
        assert eight.generate_until(generation_requests(prompts)) == one.generate_until(generation_requests(prompts))


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_rolling_is_the_stock_wrapper_while_the_text_fits(wrapper, stock, tiny_tokenizer, family):
    texts = [words(n, n) for n in (1, 12, 60)]
    theirs = stock(family)
    theirs.add_bos_token = False  # else it would predict a [BOS] behind a [BOS]
    got = wrapper(family).loglikelihood_rolling(rolling_requests(texts))
    for a, b in zip(got, theirs.loglikelihood_rolling(rolling_requests(texts)), strict=True):
        assert a == pytest.approx(b, abs=CLOSE)


@pytest.mark.parametrize("intact", [False, True])
def test_a_long_rolling_text_is_read_in_windows_that_each_have_the_lead(wrapper, intact):
    """Windows of 20 positions: the lead, one token of context, and what is predicted; every token counts once."""
    lm = wrapper(lead=LEAD, intact=intact, context=20)
    text = words(50, 3)
    tokens = lm.tokenizer.encode(text, add_special_tokens=False)
    room = 20 - len(LEAD)
    expected, done = 0.0, 0
    while done < len(tokens):
        count = min(room, len(tokens) - done)
        context = tokens[done - 1 : done] if done else []
        if done and count < room:  # the last window is filled with context
            context = tokens[done + count - room - 1 : done]
        row = [*LEAD, *context, *tokens[done : done + count]]
        logits = plain_logits(lm.intact.model, torch.tensor(row)).double().log_softmax(-1)
        first = len(row) - count
        expected += sum(float(logits[first + i - 1, row[first + i]]) for i in range(count))
        done += count
    (got,) = lm.loglikelihood_rolling(rolling_requests([text]))
    assert got == pytest.approx(expected, abs=CLOSE)
    assert lm.counts["truncated"] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_generation_is_the_stock_wrapper_without_a_prefix(wrapper, stock, family):
    prompts = [words(n, n) for n in (5, 11, 26)]
    ours, theirs = wrapper(family), stock(family)
    assert ours.generate_until(generation_requests(prompts)) == theirs.generate_until(generation_requests(prompts))


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_generation_behind_an_intact_prefix_is_generation_from_the_same_tokens(wrapper, family):
    prompts = [words(n, n) for n in (5, 11, 26)]
    vanilla, intact = wrapper(family, LEAD), wrapper(family, LEAD, intact=True)
    assert intact.generate_until(generation_requests(prompts)) == vanilla.generate_until(generation_requests(prompts))
    assert intact.counts["behind_prefix"] == intact.counts["rows"] == 3


def test_a_stop_word_ends_an_answer(wrapper):
    lm = wrapper()
    (whole,) = lm.generate_until(generation_requests([words(9, 4)]))
    (stopped,) = lm.generate_until(generation_requests([words(9, 4)], until=[whole[5:7]]))
    assert stopped == whole[: whole.index(whole[5:7])]


def test_what_the_prefix_itself_predicts_is_the_stored_full_precision_logits(wrapper, tiny_model):
    """A quantized model never computes the prefix: its first prediction is the twin's."""
    lm = wrapper(lead=LEAD, intact=True)
    other = tiny_model("llama", seed=5)
    for mine, theirs in zip(lm.intact.model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs)  # the model that runs is another one than the one that wrote the prefix
    (got,) = lm.loglikelihood(likelihood_requests([("", "x")]))
    (token,) = lm.tokenizer.encode("x", add_special_tokens=False)
    assert lm.intact.prefix is not None
    assert got[0] == pytest.approx(float(lm.intact.prefix.logits[-1].log_softmax(-1)[token]), abs=1e-6)


def test_a_row_that_is_too_long_keeps_its_lead_and_is_counted(wrapper):
    lm = wrapper(lead=LEAD, intact=True, context=24)
    context, continuation = words(60, 1), words(4, 2)
    (got,) = lm.loglikelihood(likelihood_requests([(context, continuation)]))
    # 24 positions are read: the lead, and the last 20 of what stands before the last token.
    kept = (context + continuation)[-(24 - len(LEAD) + 1) :]
    assert got[0] == pytest.approx(full_run(lm, kept[:-4], kept[-4:])[0], abs=CLOSE)
    assert lm.counts["truncated"] == 1
    assert lm.counts["behind_prefix"] == lm.counts["rows"] == 1
    (answer,) = lm.generate_until(generation_requests([context], max_gen_toks=5))
    (short,) = lm.generate_until(generation_requests([context[-(24 - 5 - len(LEAD)) :]], max_gen_toks=5))
    assert answer == short
    assert lm.counts["truncated"] == 2


def test_a_texts_own_bos_gives_way_to_the_leads(wrapper):
    lm = wrapper(lead=LEAD)
    plain = lm.tokenizer.encode("abc", add_special_tokens=False)
    assert lm.tok_encode("abc") == [*LEAD, *plain]
    assert lm.tok_encode("<s>abc") == [*LEAD, *plain]
    assert lm.behind_lead([*LEAD, *plain]) == [*LEAD, *plain]
    assert lm.tok_encode("abc", add_special_tokens=False) == plain
    assert wrapper(lead=()).tok_encode("abc") == plain


def test_answers_to_one_question_share_a_pass(wrapper, monkeypatch):
    lm = wrapper(batch_size=1)
    monkeypatch.setattr(lm, "counts", type(lm.counts)())
    lm.loglikelihood(likelihood_requests([(words(30, 1), letter) for letter in "ABCD"]))
    assert lm.counts["rows"] == 1


def test_a_kv_policy_sees_every_score(wrapper):
    """A policy changes the likelihoods, and is never skipped silently."""
    plain, quantized = wrapper(intact=True), wrapper(intact=True, kv=PerHead(2))
    requests = likelihood_requests(PAIRS[4:8])
    a, b = plain.loglikelihood(requests), quantized.loglikelihood(requests)
    assert all(abs(x[0] - y[0]) > 1e-3 for x, y in zip(a, b, strict=True))
    lm = wrapper(intact=True, kv=PerHead(2))

    def without_policy(single_pass=False):
        return lm.intact.prefix.cache(lm.intact.model.config, None, single_pass)

    object.__setattr__(lm.intact, "new_cache", without_policy)
    with pytest.raises(RuntimeError, match="no token of the cache"):
        lm.loglikelihood(requests)


def test_what_cannot_fit_is_refused(wrapper):
    with pytest.raises(UserError, match="no room behind a prefix of 5"):
        wrapper(lead=LEAD, context=6)
    lm = wrapper(lead=LEAD, context=24)
    with pytest.raises(UserError, match="a continuation of 30 tokens"):
        lm.loglikelihood(likelihood_requests([("a", words(30, 1))]))
    with pytest.raises(UserError, match="generates up to 20 tokens"):
        lm.generate_until(generation_requests(["a"], max_gen_toks=20))


def test_the_lead_must_be_the_prefix(wrapper, tiny_model, tokenizer):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="the prefix's own ids"):
        IntactLM(attach(model, build_prefix(model, LEAD)), tokenizer, (BOS,), batch_size=1, context=64)


def test_logits_in_small_pieces_are_the_same(wrapper, monkeypatch):
    lm = wrapper(lead=LEAD, intact=True)
    expected = lm.loglikelihood(likelihood_requests(PAIRS))
    monkeypatch.setattr("eval.tasks.scoring.LOGITS_AT_ONCE", 3 * 101)
    assert_same(lm.loglikelihood(likelihood_requests(PAIRS)), expected, 1e-5)


def test_a_model_type_outside_the_table_is_scored_by_its_own_logits(wrapper, monkeypatch):
    lm = wrapper("qwen3", LEAD, intact=True)
    expected = lm.loglikelihood(likelihood_requests(PAIRS))
    monkeypatch.setattr("eval.tasks.scoring.ARCHITECTURES", {})
    assert_same(lm.loglikelihood(likelihood_requests(PAIRS)), expected, 1e-5)
