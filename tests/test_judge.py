"""Judges: scores as transformers gives them, no thought in any input, Elo, lengths, pairs."""

import hashlib
import json
import math
import subprocess
import sys
from itertools import permutations

import make_judge_fixtures as tiny_judges
import numpy as np
import pytest
import torch
from conftest import FIXTURES, LLAMA, longer_wins, write_checkpoint, write_tokenizer
from safetensors.torch import load_file, save_file

import judge as judging
from model import InputError, load_tokenizer

CONFIGS = {"one label": tiny_judges.ONE_LABEL, "ArmoRM": tiny_judges.ARMORM}
THEIRS = json.loads((FIXTURES / "judge" / "scores.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    return {name: tiny_judges.write_judge(root / name, c) for name, c in CONFIGS.items()}


@pytest.fixture(scope="module")
def pairwise_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairwise")
    write_tokenizer(folder)
    return write_checkpoint(folder, LLAMA | {"max_position_embeddings": 4096})


@pytest.fixture
def pairwise(pairwise_folder):
    return judging.load_judge(pairwise_folder, options=judging.Options(verdict_tokens=4))


def batch_of_cases():
    return [("case", instruction, responses) for instruction, responses in tiny_judges.cases()]


# Scores


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_transformers(folders, name):
    judge = judging.load_judge(folders[name])
    together = [result["scores"] for result in judging.score_batch(judge, batch_of_cases())]
    for (instruction, responses), scores, rows in zip(
        tiny_judges.cases(), together, THEIRS[name], strict=True
    ):
        expected = [row[0] for row in rows]
        assert scores == pytest.approx(expected, rel=2e-4)
        assert judge.score(instruction, responses) == pytest.approx(expected, rel=2e-4)


def test_the_parts_of_a_score_are_those_of_transformers(folders):
    judge = judging.load_judge(folders["ArmoRM"])
    found = judge.read([judge.encode(x, y) for x, y in tiny_judges.cases()])
    for ours, theirs in zip(found, THEIRS["ArmoRM"], strict=True):
        assert np.array(ours) == pytest.approx(np.array(theirs), rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("tokens", [1, 300, 100_000])
def test_scores_do_not_depend_on_the_batch(folders, tokens):
    judge = judging.load_judge(folders["ArmoRM"])
    expected = [row[0] for rows in THEIRS["ArmoRM"] for row in rows]
    judge.batch_tokens = tokens
    results = judging.score_batch(judge, batch_of_cases())
    assert [s for r in results for s in r["scores"]] == pytest.approx(expected, rel=2e-4)


def test_batches_hold_every_chat_once_and_no_more_tokens_than_asked(folders):
    judge = judging.load_judge(folders["one label"])
    items = [judge.encode(x, y) for x, y in tiny_judges.cases()]
    for judge.batch_tokens in (1, 700, 2500):
        batches = list(judge.batches(items))
        chats = sorted((i, chat) for batch in batches for i, _, part in batch for chat in part)
        assert chats == sorted((i, chat) for i, part in enumerate(items) for chat in set(part))
        for batch in batches:
            size = sum(s + sum(len(chat) - s for chat in part) for _, s, part in batch)
            most = max([judge.batch_tokens, *(3 * shared for _, shared, _ in batch)])
            assert size <= most or sum(len(part) for *_, part in batch) == 1


def test_equal_responses_tie_exactly(folders):
    judge = judging.load_judge(folders["one label"])
    others = [tiny_judges.words(n, n) for n in (40, 41, 333)]
    scores = judge.score("Which?", ["same", others[0], "same", *others[1:], " same\n"])
    assert scores[0] == scores[2] == scores[5]  # the template strips the third
    assert len(set(scores)) == 4
    assert judge.score("Which?", []) == []


def test_heads_are_float32_and_the_trunk_as_asked(folders):
    judge = judging.load_judge(folders["ArmoRM"], dtype=torch.bfloat16)
    assert judge.model.model.norm.weight.dtype == torch.bfloat16
    assert judge.model.reward_transform_matrix.dtype == torch.float32
    assert judge.model.gating.layers[0].weight.dtype == torch.float32
    scores = judge.score(*tiny_judges.cases()[0])
    expected = [row[0] for row in THEIRS["ArmoRM"][0]]
    assert scores == pytest.approx(expected, abs=0.1)


def test_objective_names():
    names = judging.ARMORM_OBJECTIVES
    assert len(names) == len(set(names)) == 19
    assert judging.objective_names({"num_objectives": 19}) == names
    labels = {"0": "kind", "1": "true"}
    assert judging.objective_names({"num_objectives": 2, "id2label": labels}) == ["kind", "true"]
    numbered = judging.objective_names({"num_objectives": 3, "id2label": labels})
    assert numbered == ["objective 0", "objective 1", "objective 2"]


def test_a_long_chat_is_refused_or_cut_from_the_front(folders):
    refusing = judging.load_judge(folders["one label"])
    long = tiny_judges.words(2500, 5)
    with pytest.raises(InputError, match=r"found \d{4} tokens, expected at most 2048.*--cut-front"):
        refusing.score("Hi", [long])
    options = judging.Options(cut_front=True)
    cutting = judging.load_judge(folders["one label"], options=options)
    armorm = judging.load_judge(folders["ArmoRM"], options=options)
    cutting.context = armorm.context = 100
    chats = refusing.encode("Hi", ["a", tiny_judges.words(300, 6)])
    assert cutting.encode("Hi", ["a", tiny_judges.words(300, 6)]) == [chats[0], chats[1][-100:]]
    with pytest.raises(InputError, match=r"the judge: the judge's chat: found no '<\|eot_id\|>"):
        armorm.score("Hi", [tiny_judges.words(300, 6)])  # the header was cut away


# Which judge


def change(folder, target, **changes):
    """A copy of a judge's folder with another config.json; a value of None leaves a key out."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("one label", {"architectures": ["LlamaForTokenClassification"]}, "found 'LlamaForToken"),
        ("one label", {"architectures": None}, "found None"),
        ("one label", {"architectures": ["MistralForSequenceClassification"]}, "found 'Mistral"),
        ("one label", {"architectures": [["LlamaForCausalLM"]]}, "architectures: found"),
        ("one label", {"id2label": {"0": "a", "1": "b"}}, "labels: found 2, expected 1"),
        ("one label", {"id2label": None}, "labels: found none given, which means 2, expected 1"),
        ("one label", {"num_labels": 3}, "labels: found 3, expected 1"),
        ("one label", {"num_labels": [1]}, r"labels: found \[1\], expected 1"),
        ("one label", {"architectures": ["LlamaForRewardModelWithGating"]}, "num_objectives: fou"),
        ("ArmoRM", {"gating_temperature": 0}, "gating_temperature: found 0"),
        ("ArmoRM", {"gating_n_hidden": 1}, "tensor gating.layers.1.* shape"),
        ("ArmoRM", {"num_objectives": 4}, r"tensor .* found shape \[5.*expected \[4"),
        ("ArmoRM", {"architectures": ["LlamaForCausalLM"]}, "tensor .* is not in this model"),
    ],
)
def test_other_judges_are_refused_by_name(folders, tmp_path, base, changes, message):
    folder = change(folders[base], tmp_path / "judge", **changes)
    with pytest.raises(InputError, match=message):
        judging.load_judge(folder)


def test_one_label_by_its_number_alone(folders, tmp_path):
    folder = change(folders["one label"], tmp_path / "judge", id2label=None, num_labels=1)
    assert judging.load_judge(folder).names == []


def test_a_policys_folder_without_a_reward_head_is_refused(pairwise_folder, tmp_path):
    labels = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    folder = change(pairwise_folder, tmp_path / "judge", **labels)
    with pytest.raises(InputError, match=r"tensor score\.weight is missing"):
        judging.load_judge(folder)


def test_scores_that_are_not_finite_are_refused(folders, tmp_path):
    folder = change(folders["one label"], tmp_path / "judge")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], 3e38)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"the judge: scores: found .*nan.*, expected finite"):
        judging.load_judge(folder).score("Hi", ["a", "b"])


# No judge sees a thought


MARK = "zebra quagga"


def sample_row(instruction, responses, **fields):
    """A row of samples whose every thought holds the mark."""
    outputs = [
        {
            "ids": [index, 7, 7],
            "text": f"{MARK} <R> {response}",
            "thought": MARK if response is not None else None,
            "response": response,
            "finished": True,
            "thought_tokens": 3,
            "response_tokens": None if response is None else len(response),
        }
        for index, response in enumerate(responses)
    ]
    chat = f"<user>{instruction}<assistant>"
    row = {"instruction": instruction, "prompt_text": chat, "prompt_ids": [1, 2]}
    return row | fields | {"outputs": outputs}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["one label", "ArmoRM", "pairwise"])
def test_no_thought_reaches_a_judge(folders, pairwise, tmp_path, monkeypatch, name):
    judge = pairwise if name == "pairwise" else judging.load_judge(folders[name])
    read = []
    trunk = judge.model.model
    forward = trunk.forward

    def spy(tokens, *args, **kwargs):
        read.append(judge.tokenizer.decode(tokens.flatten().tolist()))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(trunk, "forward", spy)
    rows = [
        sample_row("Name an animal.", ["Okapi!", "A heron.", None]),
        sample_row("Which plant?", ["Fern.", ""]),
    ]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    judging.score_file(judge, samples, tmp_path / "scores.jsonl")
    seen = "\n".join(read)
    for text in ("Name an animal.", "Okapi!", "A heron.", "Which plant?", "Fern."):
        assert text in seen
    for word in MARK.split():
        assert word not in seen
    assert MARK in (tmp_path / "scores.jsonl").read_text()  # the marks were there to be seen


# Pairwise


def test_the_pairwise_prompt_is_the_published_one():
    texts = (judging.PAIRWISE_SYSTEM, judging.PAIRWISE_USER)
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == [
        "1f4ac6afd30a8bba",
        "c518c7175aa1653b",
    ]


def test_every_ordered_pair_is_asked(pairwise):
    responses = ["one {input}", "two", "three <R>"]
    count, prompts = pairwise.encode("Which {response_a}?", responses)
    assert count == 3
    assert len(prompts) == 6
    for prompt, (a, b) in zip(prompts, permutations(responses, 2), strict=True):
        text = pairwise.tokenizer.decode(prompt)
        assert "[User Question]\nWhich {response_a}?\n\n[The Start of Assistant A's" in text
        assert f"A's Answer]\n{a}\n[The End of Assistant A's Answer]" in text
        assert f"B's Answer]\n{b}\n[The End of Assistant B's Answer]" in text
        assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
        assert "system<|end_header_id|>\n\nPlease act as an impartial judge" in text


def test_verdicts_become_elo(pairwise, monkeypatch):
    monkeypatch.setattr(judging, "generate", longer_wins(pairwise.tokenizer))
    assert pairwise.score("Which?", ["aa", "aaa", "a"]) == pytest.approx(
        bradley_terry([[0.5, 0.5, 2.5], [2.5, 0.5, 2.5], [0.5, 0.5, 0.5]]), abs=1e-3
    )
    assert pairwise.score("Which?", ["both 1", "both 2", "both 3"]) == [0, 0, 0]
    assert pairwise.score("Which?", ["alone"]) == [0]
    assert pairwise.score("Which?", []) == []


def test_verdicts_are_kept_with_the_outputs_places(pairwise, monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "generate", longer_wins(pairwise.tokenizer))
    rows = [sample_row("Which?", [None, "aa", "aaaa"]), sample_row("Other?", [None, None])]
    judging.score_file(pairwise, write_rows(tmp_path / "in", rows), tmp_path / "out")
    first, second = read_rows(tmp_path / "out")
    assert first["verdicts"] == [
        {"a": 1, "b": 2, "verdict": "B", "text": "because. [[B]]"},
        {"a": 2, "b": 1, "verdict": "A", "text": "because. [[A]]"},
    ]
    scores = [output["score"] for output in first["outputs"]]
    assert scores[0] is None
    assert scores[2] - scores[1] == pytest.approx(400 * math.log10(2.5 / 0.5), abs=1e-5)
    assert second["verdicts"] == []
    assert [output["score"] for output in second["outputs"]] == [None, None]


def test_a_language_model_judges_and_samples_the_same_again(pairwise_folder, tmp_path):
    rows = [sample_row("Name one.", ["An okapi.", "A heron.", "A newt."])] * 9
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    options = judging.Options(verdict_tokens=5, verdict_temperature=1.0, verdict_seed=4)
    for name in ("a", "b"):
        judge = judging.load_judge(pairwise_folder, options=options)
        judging.score_file(judge, samples, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    verdicts = [[v["text"] for v in row["verdicts"]] for row in read_rows(tmp_path / "a")]
    assert [len(texts) for texts in verdicts] == [6] * 9
    assert len(set(map(tuple, verdicts))) == 9  # each has its stream, in the second group too


def test_a_pairwise_prompt_leaves_room_for_the_verdict(pairwise_folder):
    judge = judging.load_judge(pairwise_folder, options=judging.Options(verdict_tokens=4096))
    with pytest.raises(InputError, match=r"--verdict-tokens: found 4096, expected .* to 4095"):
        judge.score("Which?", ["a", "b"])
    judge = judging.load_judge(pairwise_folder, options=judging.Options(verdict_tokens=3000))
    with pytest.raises(
        InputError, match=r"the judge reads: found \d+ tokens, expected at most 1096"
    ):
        judge.score("Which?", ["a", "b"])


def bradley_terry(wins):
    """Elo by plain gradient ascent on the log-likelihood: independent of judge.elo."""
    wins = np.array(wins, dtype=float)
    np.fill_diagonal(wins, 0)
    s = np.zeros(len(wins))
    for _ in range(20_000):
        chance = 1 / (1 + np.exp(s[None, :] - s[:, None]))
        s += (wins - (wins + wins.T) * chance).sum(1) / wins.sum()
    return (s - s.mean()) * 400 / np.log(10)


def test_elo_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    for k in (2, 3, 5, 8):
        wins = rng.integers(1, 6, (k, k)) * (1 - np.eye(k, dtype=int))
        assert judging.elo(wins) == pytest.approx(bradley_terry(wins), abs=1e-3)
    cycle = [[0, 2, 0], [0, 0, 2], [2, 0, 0]]
    assert judging.elo(cycle) == [0, 0, 0]
    uneven = [[0, 3, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]  # every one lost, by a way
    assert judging.elo(uneven) == pytest.approx(bradley_terry(uneven), abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 1), (1, 40), (1000, 1)])
def test_elo_of_two_is_the_closed_form(a, b):
    half = 200 * math.log10(a / b)
    assert judging.elo([[0, a], [b, 0]]) == pytest.approx([half, -half], abs=1e-5)


@pytest.mark.parametrize(
    "wins",
    [
        [[0, 2, 2], [0, 0, 2], [0, 0, 0]],  # wins all, loses all
        [[0, 1, 0], [1, 0, 0], [0, 0, 0]],  # one never played
        [[0, 50, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]],
        [[0, 0], [0, 0]],
    ],
)
def test_elo_converges_by_the_prior_where_there_is_no_maximum(wins):
    with_prior = np.array(wins) + 0.5
    assert judging.elo(wins) == pytest.approx(bradley_terry(with_prior), abs=1e-3)


def test_elo_ranks_a_sweep_of_eight():
    wins = np.triu(np.full((8, 8), 2.0), 1)
    found = judging.elo(wins)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 8
    assert sum(found) == pytest.approx(0, abs=1e-4)


# Length control and the pair


def test_length_control_is_the_papers_formula():
    rng = np.random.default_rng(1)
    for k in (2, 5, 8):
        s, n, rho = rng.normal(size=k), rng.integers(1, 900, k), rng.uniform(0, 0.5)
        expected = (s - s.mean()) / s.std(ddof=0) - rho * (n - n.mean()) / n.std(ddof=0)
        assert judging.length_control(list(s), list(map(int, n)), rho) == pytest.approx(expected)


def test_length_control_of_equal_values_is_zero_never_nan():
    control = judging.length_control
    assert control([0.1] * 3, [7] * 3, 0.5) == [0, 0, 0]  # 0.1 + 0.1 + 0.1 is not 3 * 0.1
    assert control([0.1] * 3, [1, 2, 3], 0.5) == pytest.approx([0.5 * 1.5**0.5, 0, -(0.375**0.5)])
    assert control([1e-200, 2e-200], [5, 5], 1) == [0, 0]  # the square of the difference is 0
    assert control([4.0], [9], 0.5) == [0]
    assert control([], [], 0.5) == []


def pair_of(scores, lengths=None, finished=None, rho=0.0, **options):
    k = len(scores)
    return judging.choose_pair(
        scores, lengths or list(range(k)), finished or [True] * k, rho, **options
    )


def test_the_pair_is_the_highest_and_the_lowest():
    assert pair_of([2.0, 5.0, -1.0, 3.0]) == (1, 2)
    assert pair_of([2.0, 5.0, 2.0, 5.0]) == (1, 0)  # ties go to the first
    assert pair_of([1.0, 2.0, 1.5], [10, 100, 10], rho=1.0) == (2, 0)  # shorter wins
    assert pair_of([3.0, 3.0, 3.0], [5, 9, 7], rho=0.5) == (0, 1)
    assert pair_of([3.0, 3.0, 3.0], [5, 9, 7]) is None
    assert pair_of([0.3, 0.7, 0.1], [30, 70, 10], rho=1.0) is None  # all 0, up to rounding
    assert pair_of([3.0]) is None
    assert pair_of([3.0, None, None]) is None
    assert pair_of([None, None]) is None
    assert pair_of([1.0, None, 2.0], [4, None, 6], rho=0.5) == (2, 0)


def test_an_output_that_failed_is_not_in_the_pair():
    scores, finished = [9.0, 1.0, -9.0, None, 2.0], [False, True, False, True, True]
    assert pair_of(scores, finished=finished) == (4, 1)
    assert pair_of(scores, finished=finished, reject_failed=True) == (4, 0)
    assert pair_of([None, 1.0, 1.0], reject_failed=True) == (1, 0)
    assert pair_of([2.0, 1.0, 1.5], reject_failed=True) == (0, 1)
    assert pair_of([None, 1.0], reject_failed=True) is None
    assert pair_of(scores, finished=[False] * 4 + [True]) is None


def test_full_length_control_frees_the_pairs_of_length():
    """Log-normal lengths, as real responses have, and a judge that likes nothing but length."""
    rng = np.random.default_rng(2)
    differences = {0.0: [], 1.0: []}
    for _ in range(3000):
        lengths = rng.lognormal(5.5, 0.6, 8).round().clip(1)
        scores = 0.01 * lengths + rng.normal(0, 0.01, 8)
        for rho, found in differences.items():
            chosen, rejected = judging.choose_pair(list(scores), list(lengths), [True] * 8, rho)
            found.append(lengths[chosen] > lengths[rejected])
    assert np.mean(differences[0.0]) > 0.99
    assert abs(np.mean(differences[1.0]) - 0.5) < 0.04


def test_rows_of_pairs(folders, tmp_path, capsys):
    row = sample_row("Which?", ["aa", "bbbb", None, "c"], category="trees", answer="b")
    for output, score in zip(row["outputs"], [1.0, 3.0, None, 2.0], strict=True):
        output["score"] = score
    equal = sample_row("Equal?", ["a", "b"])
    for output in equal["outputs"]:
        output["score"] = 1.0
    (pair,) = judging.build_pairs([row | {"verdicts": []}, equal], 0.0, None)
    assert pair == {
        "instruction": "Which?",
        "prompt": "<user>Which?<assistant>",
        "prompt_ids": [1, 2],
        "category": "trees",
        "answer": "b",
        "chosen": f"{MARK} <R> bbbb",
        "rejected": f"{MARK} <R> aa",
        "chosen_ids": [1, 7, 7],
        "rejected_ids": [0, 7, 7],
        "chosen_score": 3.0,
        "rejected_score": 1.0,
    }
    assert capsys.readouterr().err == ""


def test_a_foreign_file_has_its_lengths_counted(folders, capsys):
    foreign = sample_row("Which?", ["aaaaaaaa", "b", "cc"])
    for output, score in zip(foreign["outputs"], [1.1, 1.0, 1.0], strict=True):
        output["score"] = score
        for name in ("text", "thought_tokens", "response_tokens"):
            del output[name]
    foreign["outputs"][1]["thought"] = ""
    del foreign["prompt_text"]
    pairs = list(judging.build_pairs([foreign] * 2, 5.0, load_tokenizer(folders["one label"])))
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("Which?", "b", f"{MARK}\n\naaaaaaaa")
    ] * 2
    assert capsys.readouterr().err.count("counted the judge's tokens") == 1


# Win rates


class Lengths:
    """A judge that scores by length, and keeps what it was given."""

    key = {"judge": "lengths"}  # noqa: RUF012

    def __init__(self):
        self.sizes = []

    def group(self, count):
        return 3

    def encode(self, instruction, responses):
        return list(responses)

    def run(self, items, first):
        self.sizes.append(len(items))
        return [{"scores": [float(len(text)) for text in texts]} for texts in items]


def test_win_rate_counts_a_tie_half():
    judge = Lengths()
    ours = ["aaa", "a", "aa", None, None, "a", "aaaa"]
    theirs = ["aa", "aa", "aa", "a", None, None, "aaa"]
    rate, low, high = judging.win_rate(judge, list("ABCDEFG"), ours, theirs)
    assert rate == pytest.approx((3 + 0.5 * 2) / 7)
    assert 0 < low < rate < high < 1
    assert judge.sizes == [3, 3, 1]
    with pytest.raises(InputError, match="no instruction"):
        judging.win_rate(judge, [], [], [])


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Wilson's interval as published in tables (e.g. R's prop.test without correction).
    [
        (50, 100, 0.4038, 0.5962),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_win_rate_interval(wins, n, low, high):
    ours = [1.0] * wins + [0.0] * (n - wins)
    found = judging.win_rate_of_scores(ours, [0.5] * n)
    assert found == pytest.approx((wins / n, low, high), abs=6e-5)


# Files and the command line


@pytest.fixture
def run_judge(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, arguments)])
        judging.main()
        return capsys.readouterr().out

    return run


def test_command_line_scores_and_pairs(run_judge, folders, tmp_path):
    rows = [sample_row(x, y) for x, y in tiny_judges.cases()]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    scores, pairs = tmp_path / "scores.jsonl", tmp_path / "pairs.jsonl"
    base = ("--judge", folders["ArmoRM"], "--samples")
    out = run_judge(*base, samples, "--output", scores, "--pairs", pairs, "--explain")
    found = read_rows(scores)
    for row, before, theirs in zip(found, rows, THEIRS["ArmoRM"], strict=True):
        assert [o["score"] for o in row["outputs"]] == pytest.approx(
            [parts[0] for parts in theirs], rel=2e-4
        )
        for output in row["outputs"]:
            del output["score"]
        assert row == before  # all that was there is carried along
    made = read_rows(pairs)
    assert [pair["instruction"] for pair in made] == [x for x, y in tiny_judges.cases() if y[1:]]
    assert out.count("objective 4") == sum(len(y) for _, y in tiny_judges.cases())
    assert f"{samples}:5 outputs[0] score {THEIRS['ArmoRM'][4][0][0]:.4f}" in out
    run_judge(*base, scores, "--pairs", tmp_path / "other")
    assert read_rows(tmp_path / "other") == made
    assert "win rate 50.0%, 95% interval" in run_judge(*base, samples, "--against", samples)
    long = write_rows(tmp_path / "long", [sample_row("Hi", [tiny_judges.words(2500, 5)])])
    with pytest.raises(InputError, match=r"instruction 1: what the judge reads: .* at most 2048"):
        run_judge(*base, long, "--against", long)
    nothing = write_rows(tmp_path / "nothing", [sample_row("x", [None, None])] * 2)
    empty = write_rows(tmp_path / "empty", [])
    for file in (nothing, empty):
        with pytest.raises(InputError, match="found no response, expected some to judge"):
            run_judge("--judge", folders["ArmoRM"], "--samples", file, "--output", tmp_path / "a")
    for wrong, message in {
        ("--output", scores): "scores.jsonl: already exists",
        ("--output", tmp_path / "a", "--rho", "nan"): "--rho: found nan",
        ("--output", tmp_path / "a", "--verdict-top-p", "0"): "--verdict-top-p: found 0",
        ("--pairs", tmp_path / "a"): r"outputs\[0\]: score: found nothing",
    }.items():
        with pytest.raises(InputError, match=message):
            run_judge(*base, samples, *wrong)
    assert not (tmp_path / "a").exists()


def test_main_ends_in_one_line(folders, tmp_path):
    command = [sys.executable, judging.__file__, "--judge", str(folders["one label"])]
    command += ["--samples", str(tmp_path / "none"), "--output", str(tmp_path / "scores")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"judge.py: error: {tmp_path / 'none'}: no such file\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "x", "prompt_ids": []}], ":1: outputs: found nothing"),
        ([sample_row("x", [])], ":1: outputs: found none"),
        ([sample_row("x", ["a"]), {"instruction": 3}], ":2: instruction: found 3"),
        (
            [{**sample_row("x", ["a"]), "outputs": ["a"]}],
            r":1: outputs\[0\]: found 'a', expected a JSON object",
        ),
        (
            [{**sample_row("x", ["a"]), "outputs": [{"ids": [1], "thought": "", "response": "a"}]}],
            r":1: outputs\[0\]: finished: found nothing, expected bool",
        ),
        (
            [sample_row("x", ["a" * 30]), sample_row("y", ["b" * 2100])],
            r":2: what the judge reads: found 2\d+ tokens",
        ),
    ],
)
def test_bad_samples_are_refused(folders, tmp_path, rows, message):
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    with pytest.raises(InputError, match=r"samples\.jsonl.*" + message):
        judging.score_file(
            judging.load_judge(folders["one label"]), samples, tmp_path / "scores.jsonl"
        )
    assert not (tmp_path / "scores.jsonl").exists()


def test_bad_scores_are_refused(tmp_path):
    row = sample_row("x", ["a", "b"])
    samples = write_rows(tmp_path / "scores.jsonl", [row])
    with pytest.raises(InputError, match=r":1: outputs\[0\]: score: found nothing"):
        list(judging.read_samples(samples, scored=True))
    for output in row["outputs"]:
        output["score"] = math.nan
    with pytest.raises(InputError, match=r":1: outputs\[0\]: score: found nan, expected a number"):
        list(judging.read_samples(write_rows(samples, [row]), scored=True))


def test_judging_goes_on_after_the_last_whole_group(tmp_path):
    rows = [sample_row(f"x{i}", ["a" * (i % 4), None, "b" * i]) for i in range(10)]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    judging.score_file(Lengths(), samples, tmp_path / "whole.jsonl")

    class Stopping(Lengths):
        def run(self, items, first):
            if first == 6:
                raise KeyboardInterrupt
            return super().run(items, first)

    scores = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        judging.score_file(Stopping(), samples, scores)
    assert not scores.exists()
    judge = Lengths()
    judging.score_file(judge, samples, scores)
    assert judge.sizes == [3, 1]
    assert scores.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
