"""MMLU in its authors' protocol: prompts by their published hashes, what happens to long ones, and the score."""

import hashlib
import random
import string

import datasets
import pytest
import torch
from families import plain_logits
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from corpora.errors import UserError
from corpora.mmlu import LETTERS, SUBCATEGORIES, Question, Subject, mmlu_directory, read_mmlu
from eval.tasks.lm import IntactLM
from eval.tasks.mmlu import LONGEST_PROMPT, answers, figures, fitting_prompt, letter_ids, prompt
from intactkv.attach import attach
from intactkv.prefix import build_prefix

BOS = 1
CONTEXT = 1024
QUESTION = Question("Q?", ("w", "x", "y", "z"), "B")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def question(seed: int, length: int = 12) -> Question:
    """A random question of `length` letters; a letter is a token of the tiny tokenizer."""
    generator = random.Random(seed)
    text = "".join(generator.choice(string.ascii_letters) for _ in range(length))
    options = tuple("".join(generator.choice(string.ascii_letters) for _ in range(3)) for _ in LETTERS)
    return Question(text, options, generator.choice(LETTERS))


@pytest.fixture
def wrapper(tiny_model, tiny_tokenizer):
    """wrapper(lead, intact=…, context=…) -> IntactLM around a tiny LLaMA."""

    def make(lead=(BOS,), *, intact=False, context=CONTEXT) -> IntactLM:
        model = tiny_model("llama", max_position_embeddings=4096)
        prefix = build_prefix(model, lead) if intact else None
        return IntactLM(attach(model, prefix), tiny_tokenizer(), lead, batch_size=4, context=context)

    return make


# prompts --------------------------------------------------------------------------------------------------------------


def test_the_header_is_the_published_one() -> None:
    header = prompt("abstract_algebra", QUESTION, ()).removesuffix("Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:")
    assert header == "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
    assert len(header) == 85
    assert digest(header).startswith("8abc37f00ea3")


def test_a_prompt_with_one_example_is_the_published_one() -> None:
    text = prompt("abstract_algebra", QUESTION, (QUESTION,))
    assert len(text) == 149
    assert digest(text).startswith("d14e13509a60")


def test_the_sample_questions_lead_to_prompts_of_the_published_form() -> None:
    """gen_prompt and format_example of hendrycks/test's evaluate.py, written down again on the files' rows."""
    for subject in read_mmlu(mmlu_directory(sample=True)):
        words = "".join(" " + word for word in subject.name.split("_"))
        expected = f"The following are multiple choice questions (with answers) about {words}.\n\n"
        for shown in (*subject.dev, None):
            row = shown or subject.test[0]
            expected += row.question
            for letter, option in zip("ABCD", row.options, strict=True):
                expected += f"\n{letter}. {option}"
            expected += "\nAnswer:" + (f" {row.answer}\n\n" if shown else "")
        assert prompt(subject.name, subject.test[0], subject.dev) == expected


# long prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(BOS,), (BOS, 20, 33, 47, 11)], ids=["bos", "text"])
def test_examples_are_dropped_from_the_end_until_the_prompt_fits(wrapper, lead) -> None:
    lm = wrapper(lead)
    shots = [question(seed) for seed in range(5)]
    lengths = [len(lead) + len(prompt("anatomy", QUESTION, shots[:count])) for count in range(6)]  # tokens = characters
    for count in range(6):
        for limit in (lengths[count], lengths[count] + 1, (lengths[count + 1] - 1) if count < 5 else 10_000):
            found = fitting_prompt(lm, "anatomy", QUESTION, shots, limit=limit)
            assert (found.shots, found.cut) == (count, False)
            assert found.ids == (*lead, *lm.tokenizer.encode(prompt("anatomy", QUESTION, shots[:count]),
                                                             add_special_tokens=False))  # fmt: skip
    assert LONGEST_PROMPT == 2048


def test_the_context_of_the_model_is_a_limit_too(wrapper) -> None:
    shots = [question(seed) for seed in range(5)]
    room = 1 + len(prompt("anatomy", QUESTION, shots[:3]))
    found = fitting_prompt(wrapper(context=room), "anatomy", QUESTION, shots)
    assert (found.shots, len(found.ids)) == (3, room)


@pytest.mark.parametrize("lead", [(BOS,), (BOS, 20, 33, 47, 11)], ids=["bos", "text"])
def test_a_question_too_long_by_itself_loses_its_beginning_behind_the_lead(wrapper, lead) -> None:
    lm = wrapper(lead)
    long = question(3, length=400)
    found = fitting_prompt(lm, "anatomy", long, [QUESTION], limit=300)
    assert (found.shots, found.cut, len(found.ids)) == (0, True, 300)
    assert found.ids[: len(lead)] == lead
    text = lm.tokenizer.decode(found.ids[len(lead) :])
    assert prompt("anatomy", long, ()).endswith(text)
    assert text.endswith("\nAnswer:")
    # It is scored as it is: the wrapper has nothing left to cut.
    answers(lm, [found])
    assert lm.counts["truncated"] == 0


def test_a_prefix_that_leaves_no_room_is_refused(wrapper) -> None:
    lm = wrapper((BOS, *range(20, 60)))
    with pytest.raises(UserError, match=r"a prefix of 41 tokens leaves no room .* prompt of 41; use a shorter one"):
        fitting_prompt(lm, "anatomy", QUESTION, (), limit=41)
    assert len(fitting_prompt(lm, "anatomy", QUESTION, (), limit=42).ids) == 42


# letters and answers --------------------------------------------------------------------------------------------------


def test_letters_that_the_tokenizer_does_not_tell_apart_are_refused(tiny_tokenizer) -> None:
    known = tiny_tokenizer()
    assert letter_ids(known) == known.convert_tokens_to_ids(list("ABCD"))
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "Answer": 1, ":": 2, "A": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    few = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    with pytest.raises(UserError, match=r"ids \[3, 0, 0, 0\], which do not tell the answers apart"):
        letter_ids(few)


def test_letters_are_taken_with_the_space_that_stands_before_an_answer() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {f"Ġ{letter}": 10 + i for i, letter in enumerate(LETTERS)} | dict(zip("ABCD", range(20, 24), strict=True))
    alphabet = {sign: 30 + i for i, sign in enumerate(["Ġ", *"nswer:"])}
    merges = [("Ġ", letter) for letter in LETTERS]
    backend = Tokenizer(models.BPE({"<s>": 0, **letters, **alphabet}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert letter_ids(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")) == [10, 11, 12, 13]


@pytest.mark.parametrize(("lead", "intact"), [((BOS,), False), ((BOS,), True), ((BOS, 20, 33, 47, 11), True)],
                         ids=["none", "[B]", "text"])  # fmt: skip
def test_the_answer_is_the_letter_with_the_highest_logit_behind_the_prompt(wrapper, lead, intact) -> None:
    lm = wrapper(lead, intact=intact)
    prompts = [fitting_prompt(lm, "anatomy", question(seed, 5 + 7 * seed), [question(99)]) for seed in range(9)]
    ids = lm.tokenizer.convert_tokens_to_ids(list("ABCD"))
    expected = []
    for made in prompts:
        logits = plain_logits(lm.intact.model, torch.tensor(made.ids))[-1]
        expected.append(LETTERS[int(logits[ids].argmax())])
    assert answers(lm, prompts) == expected
    assert len(set(expected)) > 1
    assert lm.counts["rows"] == len(prompts)  # one row for four letters
    assert answers(lm, []) == []


@pytest.mark.parametrize(("lead", "intact"), [((BOS,), False), ((BOS,), True)], ids=["none", "[B]"])
def test_lm_eval_scores_the_same_prompts_alike(wrapper, tiny_model, tiny_tokenizer, lead, intact) -> None:
    """A task of lm-eval's own with our prompts as its text, on our wrapper and on the stock one."""
    ours = wrapper(lead, intact=intact)
    model = tiny_model("llama", max_position_embeddings=4096)
    stock = HFLM(model, "causal", tokenizer=tiny_tokenizer(), batch_size=4, max_length=CONTEXT, add_bos_token=True)
    shots = [question(seed) for seed in range(100, 105)]
    asked = [question(seed, 5 + seed) for seed in range(24)]
    rows = [{"text": prompt("anatomy", q, shots), "gold": LETTERS.index(q.answer)} for q in asked]
    made = [fitting_prompt(ours, "anatomy", q, shots) for q in asked]
    assert all(p.shots == 5 for p in made)
    chosen = [LETTERS.index(answer) for answer in answers(ours, made)]
    right = torch.tensor([int(a == row["gold"]) for a, row in zip(chosen, rows, strict=True)])
    subject = Subject("anatomy", tuple(shots), tuple(asked), (None, None))
    score = figures([subject], [right])
    for lm in (ours, stock):
        task = ConfigurableTask(config={
            "task": "our_prompts",
            "custom_dataset": lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}),
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": list("ABCD"),
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        })  # fmt: skip
        results = evaluate(lm, {"tasks": {"our_prompts": task}, "groups": {}}, bootstrap_iters=0)
        samples = sorted(results["samples"]["our_prompts"], key=lambda sample: sample["doc_id"])
        picked = [max(range(4), key=lambda i, s=sample: s["filtered_resps"][i][0]) for sample in samples]
        assert picked == chosen
        assert results["results"]["our_prompts"]["acc,none"] == pytest.approx(score["metrics"]["acc"])
    assert 0 < score["metrics"]["acc"] < 1


# the score ------------------------------------------------------------------------------------------------------------


def subject(name: str, size: int) -> Subject:
    return Subject(name, (), (QUESTION,) * size, (None, None))


def test_the_score_is_weighted_by_questions_and_not_the_mean_over_subjects() -> None:
    """10 of 10 and 0 of 30: a quarter of the questions, not half the subjects."""
    subjects = [subject("anatomy", 10), subject("virology", 30), subject("astronomy", 4), subject("law of ours", 6)]
    right = [torch.ones(10), torch.zeros(30), torch.tensor([1, 0, 1, 0]), torch.ones(6)]
    found = figures(subjects, right)
    assert found["metrics"]["acc"] == pytest.approx(18 / 50)
    assert found["samples"] == 50
    assert found["groups"]["other"] == found["groups"]["other: health"] == pytest.approx(10 / 40)
    assert found["groups"]["STEM: physics"] == pytest.approx(1 / 2)
    assert set(found["groups"]) == {"other", "other: health", "STEM", "STEM: physics"}
    assert found["subjects"]["astronomy"] == {"correct": 2, "total": 4}
    # The standard error is that of the mean of 50 zeros and ones.
    answers = torch.cat(right).double()
    assert found["stderr"]["acc"] == pytest.approx(float(answers.std()) / 50**0.5)


def test_the_groups_of_the_whole_benchmark_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {name: int(torch.randint(1, 40, (1,), generator=generator)) for name in SUBCATEGORIES}
    subjects = [subject(name, size) for name, size in sizes.items()]
    right = [torch.randint(0, 2, (size,), generator=generator) for size in sizes.values()]
    found = figures(subjects, right)
    assert len([name for name in found["groups"] if ":" not in name]) == 4
    assert len([name for name in found["groups"] if ":" in name]) == 17
    members = {name: [s for s in sizes if SUBCATEGORIES[s] == name.partition(": ")[2]] for name in found["groups"]}
    correct = {s.name: int(r.sum()) for s, r in zip(subjects, right, strict=True)}
    for name, of in members.items():
        if of:
            assert found["groups"][name] == pytest.approx(sum(correct[s] for s in of) / sum(sizes[s] for s in of))
    assert found["metrics"]["acc"] == pytest.approx(sum(correct.values()) / sum(sizes.values()))
