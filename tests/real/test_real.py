"""Real weights: SmolLM2-135M-Instruct, held against what transformers makes of the same file.

Skipped where make.py has made no folder. Under two minutes on two cores:

    python tests/real/make.py
    python -m pytest tests/real/test_real.py
"""

import importlib.util
import json
import math
from pathlib import Path

import dpo
import judge
import model
import sample

import numpy as np
import pytest
import torch

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RUNS = Path(__file__).resolve().parents[2] / "runs"
POLICY, JUDGE = RUNS / "smollm2", RUNS / "smollm2-judge"

pytestmark = pytest.mark.skipif(
    not POLICY.is_dir(), reason="runs/smollm2 is not made: python tests/real/make.py"
)
FIXTURE = json.loads((FIXTURES / "chats.json").read_text(encoding="utf-8"))
CHATS = FIXTURE["chats"]
PROMPTS = [chat["ids"] for chat in CHATS]


@pytest.fixture(scope="module")
def policy():
    return model.load_model(POLICY)


@pytest.fixture(scope="module")
def tokenizer():
    return model.load_tokenizer(POLICY)


@pytest.mark.parametrize("case", FIXTURE["texts"], ids=range(len(FIXTURE["texts"])))
def test_texts_have_the_ids_of_transformers(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_rendered_chats_have_the_ids_of_transformers(tokenizer, chat):
    assert tokenizer.apply_chat_template(chat["messages"]) == chat["ids"]
    assert tokenizer.stop_ids == (2,)


@pytest.mark.parametrize("i", range(len(CHATS)))
def test_logits_are_those_of_transformers(policy, i):
    stored = np.load(FIXTURES / "logits.npz")
    with torch.inference_mode():
        logits = policy(torch.tensor([PROMPTS[i]]))[0].numpy()
    logits = logits[stored[f"places {i}"]][:, stored["vocabulary"]]
    # They reach 40: float32 of other kernels parts in the fifth decimal.
    np.testing.assert_allclose(logits, stored[f"logits {i}"], rtol=0, atol=5e-4)


def greedy(policy, tokenizer):
    longest = max(len(chat["float32"]["ids"]) for chat in CHATS)
    made = sample.generate(policy, PROMPTS, 1, longest, 0.0, 1.0, tokenizer.stop_ids)
    return [completion.ids for (completion,) in made]


def first_difference(ours, theirs):
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def test_greedy_continuations_are_those_of_transformers(policy, tokenizer):
    assert greedy(policy, tokenizer) == [chat["float32"]["ids"] for chat in CHATS]


def test_bfloat16_parts_from_transformers_only_where_two_tokens_are_close(tokenizer):
    made = greedy(model.load_model(POLICY, dtype=torch.bfloat16), tokenizer)
    same = total = 0
    for ours, chat in zip(made, CHATS, strict=True):
        theirs, gaps = chat["bfloat16"]["ids"], chat["bfloat16"]["gaps"]
        end = first_difference(ours, theirs)
        same, total = same + end, total + len(theirs)
        if end < len(theirs):
            assert gaps[end] <= 0.25  # two steps of bf16 at a logit of 16 to 32
    print(f"bfloat16: {same} of {total} ids before the first difference")
    assert same >= 0.5 * total


def test_samples_do_not_depend_on_how_many_decode_together(policy, tokenizer):
    def draw(slots):
        decoder = slots and sample.Decoder(policy, slots, max(map(len, PROMPTS[:3])) + 20)
        options = {"stop_ids": tokenizer.stop_ids, "seed": 7, "decoder": decoder}
        made = sample.generate(policy, PROMPTS[:3], 2, 20, **options)
        return [[(c.ids, c.finished) for c in completions] for completions in made]

    alone = draw(1)
    assert draw(None) == alone and draw(4) == alone
    assert alone[0][0] != alone[0][1]


def test_a_step_of_dpo_and_the_checkpoint_it_leaves(tokenizer, tmp_path):
    policy = model.load_model(POLICY)  # its own: training changes it
    texts = ("The capital of France is Paris.<|im_end|>", "I would say Lyon, or so.<|im_end|>")
    pair = dpo.Pair("a pair", PROMPTS[0], *(tokenizer.encode(text) for text in texts))
    fitted = {"micro_batch_tokens": 2048, "keep_activations": 1}
    options, steps = dpo.Options(lr=1e-5, epochs=2, batch_size=1, **fitted), []
    dpo.train(policy, [pair], options, log=steps.append)
    before, after = steps  # each step's record is of the weights that it found
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["loss"] < math.log(2) - 0.01 and after["margin"] > 0

    model.save_model(policy, tmp_path / "saved", POLICY)
    back = model.load_model(tmp_path / "saved").state_dict()
    assert back.keys() == policy.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in policy.state_dict().items())
    saved = model.load_tokenizer(tmp_path / "saved")
    assert saved.apply_chat_template(CHATS[0]["messages"]) == PROMPTS[0]


ANSWERS = {
    "How do I keep tomatoes fresh?": "Keep ripe tomatoes at room temperature, stem side down.",
    "Who wrote Pride and Prejudice?": "Jane Austen wrote Pride and Prejudice, published in 1813.",
    "What does a carburettor do?": "A carburettor mixes air and fuel before they reach the engine.",
    "Name a good exercise for the back.": "A plank strengthens the muscles along your back.",
    "Why do leaves turn red in autumn?": "Leaves stop making chlorophyll, and red pigments show.",
    "How is bread made to rise?": "Yeast eats sugar in the dough and fills it with gas.",
}


def test_a_judge_s_last_block_averages_over_all_tokens(tokenizer, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    fit_judge = importlib.import_module("fit_judge")
    monkeypatch.setattr(fit_judge, "DEPTHS", (2,))
    (question, answer), *others = ANSWERS.items()
    answers = [answer, *(other for _, other in others)]
    trunk = model.load_model(POLICY).model
    trunk.layers = trunk.layers[:2]
    means = fit_judge.read_means(trunk, tokenizer, question, answers)
    cases = [(means, [])]
    weight = torch.randn(means["2"].shape[1], generator=torch.Generator().manual_seed(0))
    head = fit_judge.with_constant(cases, "2", weight)
    make = load_make()
    make.write_judge(POLICY, tmp_path / "judge", head, 2)
    scores = torch.tensor(judge.load_judge(tmp_path / "judge").score(question, answers))
    score, one = (means["2"] @ head.T).T
    assert score.std() > 0.1 and (one - 1).abs().max() < 0.05
    wide = (one.square() + (make.SMALL * score).square()).sqrt()
    torch.testing.assert_close(scores, score / wide, rtol=0, atol=2e-3)


def load_make():
    """make.py here: the tests' own folders have others of that name."""
    spec = importlib.util.spec_from_file_location("make_real", Path(__file__).with_name("make.py"))
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.skipif(not JUDGE.is_dir(), reason="runs/smollm2-judge is not made: make.py --judge")
def test_the_judge_scores_a_batch_as_one_by_one():
    judged, answers = judge.load_judge(JUDGE), list(ANSWERS.values())
    right = 0
    for i, question in enumerate(ANSWERS):
        scores = judged.score(question, answers)
        alone = [judged.score(question, [answer])[0] for answer in answers[:2]]
        np.testing.assert_allclose(scores[:2], alone, rtol=0, atol=1e-3)
        right += scores[i] == max(scores)
    print(f"the judge puts the right answer first for {right} of {len(ANSWERS)} questions")
    assert right > len(ANSWERS) / 3  # chance is a sixth
