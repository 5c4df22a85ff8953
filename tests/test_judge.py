"""Judges: scores as transformers gives them, exact ties, no thought in any input, Elo, the pair.

python -m pytest tests/test_judge.py
"""

import hashlib
import json
import math
import random
import sys
from itertools import permutations

import judge as judging
from model import InputError
from sample import Completion

import make_judge_fixtures as tiny_judges
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, LLAMA, read_or_refuse, read_rows, write_checkpoint, write_rows
from conftest import write_tokenizer
from make_judge_fixtures import words
from safetensors.torch import load_file, save_file

CONFIGS = {"one label": tiny_judges.ONE_LABEL, "ArmoRM": tiny_judges.ARMORM}
CONFIGS |= tiny_judges.FAMILIES
THEIRS = json.loads((FIXTURES / "judge" / "scores.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    made = {name: tiny_judges.write_judge(root / name, c) for name, c in CONFIGS.items()}
    write_tokenizer(root / "pairwise")
    config = LLAMA | {"max_position_embeddings": 4096}
    return made | {"pairwise": write_checkpoint(root / "pairwise", config)}


@pytest.fixture
def pairwise(folders):
    return with_short_verdicts(judging.load_judge(folders["pairwise"]))


def with_short_verdicts(judge, tokens=4):
    judge.verdict_tokens = tokens
    return judge


# Scores


def read(judge, instruction, responses):
    """What the judge's heads give for each response: of ArmoRM score, rewards and gate."""
    return judge.read([judge.response_chat("here", instruction, text) for text in responses])


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_transformers(folders, name):
    """Together and alone; of ArmoRM also the rewards and the gate that the score is made of."""
    judge = judging.load_judge(folders[name])
    for (instruction, responses), theirs in zip(tiny_judges.cases(), THEIRS[name], strict=True):
        rows = read(judge, instruction, responses)
        alone = [read(judge, instruction, [response])[0] for response in responses]
        assert np.array(rows) == pytest.approx(np.array(theirs), rel=2e-4, abs=2e-5)
        assert np.array(alone) == pytest.approx(np.array(theirs), rel=2e-4, abs=2e-5)
        assert judge.score(instruction, responses) == [row[0] for row in rows]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_do_not_depend_on_order_or_batch(folders, name):
    judge, rng, separately = judging.load_judge(folders[name]), random.Random(0), []
    for instruction, responses in tiny_judges.cases():
        separately.append(judge.score(instruction, responses))
        scores = dict(zip(responses, separately[-1], strict=True))
        for _ in range(2):
            part = rng.sample(responses, rng.randint(1, len(responses)))
            expected = [scores[response] for response in part]
            assert judge.score(instruction, part) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    together = judge.run([("here", *case) for case in tiny_judges.cases()])
    assert [result["scores"] for result in together] == separately  # to the bit


def test_a_chat_that_another_begins_with_is_read_at_its_own_end(folders, tmp_path):
    """Where a template writes nothing behind a response, one chat can be another's beginning."""
    folder = change(folders["one label"], tmp_path / "judge")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    judge = judging.load_judge(folder)
    responses = [words(n, 1)[:n] for n in (1, 40, 2, 41)]
    chats = [judge.response_chat("here", "Hi", text) for text in responses]
    assert chats[1] == chats[3][: len(chats[1])] and chats[0] == chats[2][: len(chats[0])]
    for part in (responses, responses[::2], responses[1::2], responses[::-1]):
        alone = [judge.score("Hi", [text])[0] for text in part]
        assert judge.score("Hi", part) == pytest.approx(alone, rel=1e-5, abs=1e-5)
        assert len({round(score, 3) for score in alone}) == len(part)


def test_no_piece_that_a_judge_packs_is_empty(folders, monkeypatch):
    packed, pack = [], judging.pack

    def watched(pieces, *device):
        packed.extend(len(ids) for ids, _ in pieces)
        return pack(pieces, *device)

    monkeypatch.setattr(judging, "pack", watched)
    judge = judging.load_judge(folders["one label"])
    for chats in ([(5, 6), (5, 6, 7)], [(5,), (5, 6)], [(5, 6), (5, 6)], [(5,)], [(5,), (6,)]):
        judge.read(chats)
    assert min(packed) == 1


def test_equal_responses_tie_exactly(folders):
    judge = judging.load_judge(folders["one label"])
    others = [words(n, n) for n in (40, 41, 333)]
    scores = judge.score("Which?", ["same", others[0], "same", *others[1:], " same\n"])
    assert scores[0] == scores[2] == scores[5]  # the template strips the third
    assert len(set(scores)) == 4
    assert judge.score("Which?", []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_responses_tie_exactly_in_different_files(folders, tmp_path, name, dtype):
    """Files of validation have one response an instruction; most answers of a seed come again."""
    judge = judging.load_judge(folders[name], dtype=dtype)
    lengths = [3, 700, 41, 42, 250, 1, 90, 333]
    texts = {"seed": [words(n, n) for n in lengths], "later": [words(n, n) for n in lengths]}
    texts["later"][1], texts["later"][4] = words(650, 1), words(255, 4)
    scores, files = {}, {}
    for file, responses in texts.items():
        rows = [sample_row(f"Question {n}?", [y]) for n, y in zip(lengths, responses, strict=True)]
        files[file] = write_rows(tmp_path / file, rows)
        judging.score_file(judge, files[file], tmp_path / f"{file}.scores")
        found = read_rows(tmp_path / f"{file}.scores")
        scores[file] = [output["score"] for row in found for output in row["outputs"]]
    tied = [a == b for a, b in zip(scores["seed"], scores["later"], strict=True)]
    assert tied == [i not in (1, 4) for i in range(len(lengths))]
    better = sum(scores["later"][i] > scores["seed"][i] for i in (1, 4))
    assert judging.win_rate(scores["later"], scores["seed"])[0] == (better + 0.5 * 6) / 8


def test_heads_are_float32_and_the_trunk_as_asked(folders):
    judge = judging.load_judge(folders["ArmoRM"], dtype=torch.bfloat16)
    assert judge.model.model.norm.weight.dtype == torch.bfloat16
    assert judge.model.reward_transform_matrix.dtype == torch.float32
    assert judge.model.gating.layers[0].weight.dtype == torch.float32
    expected = [row[0] for row in THEIRS["ArmoRM"][0]]
    assert judge.score(*tiny_judges.cases()[0]) == pytest.approx(expected, abs=0.1)


def test_the_gate_reads_where_the_last_header_begins(folders):
    judge, header = judging.load_judge(folders["ArmoRM"]), tiny_judges.HEADER
    pattern = judge.tokenizer.encode(header, add_special_tokens=False)
    for instruction, responses in tiny_judges.cases():
        for response in responses:
            chat = judge.response_chat("here", instruction, response)
            found = judge.gate_position(chat)
            assert found == tiny_judges.last_occurrence(chat, pattern)
            assert list(chat[found : found + len(pattern)]) == pattern
    plain, quoting = (judge.response_chat("here", "Hi", text) for text in ("a", f"a{header}b"))
    assert judge.gate_position(quoting) > judge.gate_position(plain)
    with pytest.raises(InputError, match=r"chat_template writes no '<\|eot_id\|>"):
        judge.gate_position(quoting[:5])


def test_a_chat_longer_than_the_context_is_refused(folders):
    for name in CONFIGS:
        with pytest.raises(
            InputError, match="response 0 does not fit into the judge's 2048 tokens"
        ):
            judging.load_judge(folders[name]).score("Hi", [words(2500, 5)])


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


ONE_LABEL = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        ("one label", {"architectures": ["LlamaForTokenClassification"]}, "'LlamaForToken"),
        ("one label", {"architectures": None}, "architectures is None"),
        ("one label", {"architectures": ["GemmaForSequenceClassification"]}, "'Gemma"),
        ("one label", {"architectures": 5}, "architectures is 5"),
        ("ArmoRM", {"num_objectives": "5"}, "num_objectives.*TypeError.*str"),
        ("ArmoRM", {"gating_hidden_dim": None}, "KeyError.*gating_hidden_dim"),
        ("ArmoRM", {"gating_temperature": "x"}, "gating_.*ValueError.*'x'"),
        ("ArmoRM", {"gating_n_hidden": 1}, r"gating\.layers\.[12]"),
        ("ArmoRM", {"num_objectives": 4}, r"shape.*\[5.*\[4"),
        ("ArmoRM", {"architectures": ["LlamaForCausalLM"]}, "Missing.*lm_head.weight"),
        ("pairwise", ONE_LABEL, r"score\.weight"),
    ],
)
def test_other_judges_are_refused_by_name(folders, tmp_path, base, changes, message):
    folder = change(folders[base], tmp_path / "judge", **changes)
    with pytest.raises(InputError, match=rf"(?s){folder}.*{message}"):
        judging.load_judge(folder)


def test_a_judge_with_two_labels_is_refused(folders, tmp_path):
    folder = change(folders["one label"], tmp_path / "judge")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = tensors["score.weight"].repeat(2, 1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"score.weight.*\[2, .*\[1, "):
        judging.load_judge(folder)


def test_scores_that_are_not_finite_are_refused_by_line(folders, tmp_path):
    folder = change(folders["one label"], tmp_path / "judge")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.full_like(tensors["score.weight"], 3e38)
    save_file(tensors, folder / "model.safetensors")
    samples = write_rows(tmp_path / "in", [sample_row("Hi", [y]) for y in ("a", "b")])
    with pytest.raises(InputError, match=r"in:1: the judge's scores are not finite: .*(nan|inf)"):
        judging.score_file(judging.load_judge(folder), samples, tmp_path / "out")


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


def score_row(scores, lengths, failed=()):
    """A row of scores: outputs of these lengths; those in `failed` did not finish."""
    both = zip(scores, lengths, strict=True)
    row = sample_row("Which?", [None if s is None else "x" * n for s, n in both])
    for i, (output, score) in enumerate(zip(row["outputs"], scores, strict=True)):
        output |= {"score": score, "finished": i not in failed}
    return row


@pytest.mark.parametrize("name", [*CONFIGS, "pairwise"])
def test_no_thought_reaches_a_judge(folders, tmp_path, monkeypatch, name):
    judge, read = with_short_verdicts(judging.load_judge(folders[name])), []
    forward = judge.model.model.forward

    def spy(tokens, *args, **kwargs):
        read.append(judge.tokenizer.decode(tokens.flatten().tolist()))
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(judge.model.model, "forward", spy)
    rows = [
        sample_row("Name an animal.", ["Okapi!", "A heron.", None]),
        sample_row("Which plant?", ["Fern.", ""]),
        sample_row("Nothing?", [None, None]),
    ]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    judging.score_file(judge, samples, tmp_path / "scores.jsonl")
    seen = "\n".join(read)
    for text in ("Name an animal.", "kapi!", "A heron."):
        assert text in seen
    # An empty response is none, and a response alone needs no comparison.
    assert ("Which plant?" in seen) == (name != "pairwise")
    for word in MARK.split():
        assert word not in seen
    found = read_rows(tmp_path / "scores.jsonl")
    assert MARK in str(found)  # the marks were there to be seen
    given = [[output["score"] is not None for output in row["outputs"]] for row in found]
    assert given == [[True, True, False], [True, False], [False, False]]


# Pairwise


def verdicts_by(tokenizer, verdict_of):
    """In place of `generate`: each prompt's verdict is the text verdict_of(A's text, B's text)."""

    def generate(model, prompts, *args, **kwargs):
        made = []
        for text in map(tokenizer.decode, prompts):
            a, b = (text.split(f"{x}'s Answer]\n")[1].split("\n[The End")[0] for x in "AB")
            made.append([Completion(tokenizer.encode(verdict_of(a, b)), True)])
        return made

    return generate


def longer(a, b):
    """The verdict of a judge that likes length; of equal lengths it names both or neither."""
    if len(a) == len(b):
        return "[[A]] or [[B]]" if "both" in a else "no idea"
    return f"because. [[{'A' if len(a) > len(b) else 'B'}]]"


def test_the_pairwise_prompt_is_the_published_one():
    texts = (judging.PAIRWISE_SYSTEM, judging.PAIRWISE_USER)
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == [
        "1f4ac6afd30a8bba",
        "c518c7175aa1653b",
    ]


def test_every_ordered_pair_is_asked(pairwise, monkeypatch):
    responses, asked = ["one {input}", "two", "three <R>"], []

    def spy(model, prompts, *args, **kwargs):
        asked.extend(map(pairwise.tokenizer.decode, prompts))
        return [[Completion([], True)] for _ in prompts]

    monkeypatch.setattr(judging, "generate", spy)
    pairwise.score("Which {response_a}?", responses)
    for text, (a, b) in zip(asked, permutations(responses, 2), strict=True):
        user = judging.PAIRWISE_USER.replace("{input}", "Which {response_a}?", 1).strip()
        first, rest = user.split("{response_a}\n[The End")
        assert first + a + "\n[The End" + rest.replace("{response_b}", b) in text
        assert "system<|end_header_id|>\n\n" + judging.PAIRWISE_SYSTEM in text
        assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_verdicts_become_elo(pairwise, monkeypatch):
    monkeypatch.setattr(judging, "generate", verdicts_by(pairwise.tokenizer, longer))
    wins = [[0.5, 0.5, 2.5], [2.5, 0.5, 2.5], [0.5, 0.5, 0.5]]  # with the prior: one won all
    assert pairwise.score("Which?", ["aa", "aaa", "a"]) == pytest.approx(
        likeliest_scores(wins), abs=1e-3
    )
    assert pairwise.score("Which?", ["both 1", "both 2", "both 3"]) == [0, 0, 0]
    assert pairwise.score("Which?", ["alone"]) == [0]
    assert pairwise.score("Which?", []) == []


@pytest.mark.reference
def test_wins_are_counted_as_in_the_draft(pairwise, monkeypatch):
    """r_mn is 1, -1 or 0 (a tie or an error); B_mn = [r_mn = 1] + [r_nm = -1]."""
    rng, responses = np.random.default_rng(3), [f"response {i}" for i in range(5)]
    r = rng.integers(-1, 2, (5, 5))
    said = {1: "[[A]]", -1: "[[B]]", 0: "[[C]]"}

    def verdict(a, b):
        return said[r[responses.index(a), responses.index(b)]]

    monkeypatch.setattr(judging, "generate", verdicts_by(pairwise.tokenizer, verdict))
    B = ((r == 1).astype(int) + (r.T == -1)) * (1 - np.eye(5, dtype=int))
    assert pairwise.score("Which?", responses) == judging.elo(B)
    assert np.ptp(judging.elo(B)) > 10


def test_verdicts_are_kept_with_the_outputs_places(pairwise, monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "generate", verdicts_by(pairwise.tokenizer, longer))
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


def test_a_language_model_judges_the_same_again(folders, tmp_path):
    animals = ["An okapi.", "A heron.", "A newt."]
    rows = [sample_row("Name one." + "." * i, animals[: 2 + i % 2]) for i in (0, 90, 1, 40, 0)]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    for name in ("a", "b"):
        judge = with_short_verdicts(judging.load_judge(folders["pairwise"]))
        judge.group = 2
        judging.score_file(judge, samples, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    first, *_, last = ([v["text"] for v in row["verdicts"]] for row in read_rows(tmp_path / "a"))
    assert len(first) == 2
    assert first == last  # greedy: the same question in a later group too


def test_a_pairwise_prompt_leaves_room_for_the_verdict(folders):
    judge = with_short_verdicts(judging.load_judge(folders["pairwise"]), 3000)
    with pytest.raises(InputError, match="response 0 does not fit into the judge's 4096 tokens"):
        judge.score("Which?", ["a", "b"])
    # The shorter of two that cannot be compared must not win by its length.
    (result,) = judge.run([("here", "Which?", ["a", "b b"])])
    assert result == {"scores": [None, None], "verdicts": []}
    assert judge.score("Which?", ["alone"]) == [0]


# Elo


def likeliest_scores(wins):
    """Where sum of B_mn log sigmoid(e_m - e_n), the draft's likelihood, is highest: by ascent."""
    B = torch.tensor(wins, dtype=torch.float64).fill_diagonal_(0)
    e = torch.zeros(len(B), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [e], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = -(B * F.logsigmoid(e[:, None] - e[None])).sum()
        value.backward()
        return value

    optimizer.step(loss)
    loss()
    assert e.grad.abs().max() < 1e-7
    points = e.detach() * 400 / math.log(10)
    return (points - points.mean()).tolist()


@pytest.mark.reference
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_elo_is_the_maximum_of_the_drafts_likelihood(k):
    """Random tables of few games with ties among them; a ring of wins gives each a maximum."""
    rng = np.random.default_rng(k)
    for _ in range(5):
        wins = rng.integers(0, 3, (k, k)) * rng.integers(0, 2, (k, k))
        ring = rng.permutation(k)
        wins[ring, np.roll(ring, 1)] += 1
        np.fill_diagonal(wins, 0)
        assert judging.elo(wins) == pytest.approx(likeliest_scores(wins), abs=1e-3)
        swap = rng.permutation(k)  # nobody's place matters
        swapped = judging.elo(wins[np.ix_(swap, swap)])
        assert swapped == pytest.approx(np.array(judging.elo(wins))[swap], abs=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 1), (1, 40), (1000, 1)])
def test_elo_of_two_is_the_closed_form(a, b):
    half = 200 * math.log10(a / b)
    assert judging.elo([[0, a], [b, 0]]) == pytest.approx([half, -half], abs=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize(
    "wins",
    [
        [[0, 2, 2], [0, 0, 2], [0, 0, 0]],  # wins all, loses all
        [[0, 1, 0], [1, 0, 0], [0, 0, 0]],  # one never played
        [[0, 50, 0, 0], [0, 0, 0, 0], [0, 0, 0, 7], [0, 0, 0, 0]],
        [[0, 0], [0, 0]],
    ],
)
def test_elo_takes_the_prior_where_there_is_no_maximum(wins):
    with_prior = np.array(wins) + 0.5
    assert judging.elo(wins) == pytest.approx(likeliest_scores(with_prior), abs=1e-3)


def test_elo_of_cycles_and_sweeps():
    assert judging.elo([[0, 2, 0], [0, 0, 2], [2, 0, 0]]) == [0, 0, 0]
    found = judging.elo(np.triu(np.full((8, 8), 2.0), 1))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 8
    assert sum(found) == pytest.approx(0, abs=1e-4)
    assert (judging.elo(np.zeros((0, 0))), judging.elo([[0]])) == ([], [0])


# Length control and the pair


@pytest.mark.reference
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


@pytest.mark.parametrize(
    ("scores", "lengths", "unfinished", "rho", "expected"),
    [
        ([2.0, 5.0, -1.0, 3.0], [0, 1, 2, 3], (), 0.0, (1, 2)),
        ([2.0, 5.0, 2.0, 5.0], [0, 1, 2, 3], (), 0.0, (1, 0)),  # ties go to the first
        ([1.0, 2.0, 1.5], [10, 100, 10], (), 1.0, (2, 0)),  # shorter wins
        ([3.0, 3.0, 3.0], [5, 9, 7], (), 0.5, (0, 1)),
        ([3.0, 3.0, 3.0], [5, 9, 7], (), 0.0, None),
        ([0.3, 0.7, 0.1], [30, 70, 10], (), 1.0, None),  # all 0, up to rounding
        ([3.0], [1], (), 0.0, None),
        ([None, None], [0, 0], (), 0.0, None),
        ([], [], (), 0.0, None),
        ([1.0, None, 2.0], [4, 0, 6], (), 0.0, (2, 1)),  # what cannot be cut is rejected
        ([1.0, None, 2.0], [4, 0, 6], (), 9.0, (0, 1)),
        ([3.0, None, None], [1, 0, 0], (), 0.0, (0, 1)),  # one that finished, one that failed
        ([3.0, 9.0], [1, 1], (1,), 0.0, (0, 1)),  # what ran into the limit has failed
        ([9.0, 1.0, -9.0, None, 2.0], [1] * 5, (0, 2), 0.0, (4, 0)),  # the first that failed
        ([None, 1.0, 1.0], [0, 1, 1], (), 0.0, (1, 0)),
        ([9.0, 8.0], [1, 1], (0, 1), 0.0, None),  # nothing to choose
        ([None, 8.0], [0, 1], (1,), 0.0, None),
    ],
)
def test_the_pair(scores, lengths, unfinished, rho, expected):
    finished = [i not in unfinished for i in range(len(scores))]
    assert judging.choose_pair(scores, lengths, finished, rho) == expected


@pytest.mark.parametrize(
    ("scores", "unfinished", "expected"),
    [
        ([1.0, None, 2.0], (), (2, 0)),
        ([9.0, 1.0, -9.0, None, 2.0], (0, 2), (4, 1)),
        ([3.0, None, None], (), None),
        ([3.0, 9.0], (1,), None),
        ([None, 1.0, 1.0], (), None),
        ([None, None], (), None),
    ],
)
def test_the_pair_without_the_outputs_that_failed(scores, unfinished, expected):
    finished = [i not in unfinished for i in range(len(scores))]
    lengths = [1] * len(scores)
    assert judging.choose_pair(scores, lengths, finished, 0.0, reject_failed=False) == expected


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


def draw_rankings(liking, count=60, seed=5):
    """(scores, lengths, finished) of random rows, some failed; scores like length this much."""
    rng, rankings = np.random.default_rng(seed), []
    for _ in range(count):
        lengths = rng.lognormal(4, 0.5, 6).round()
        scores = (liking * lengths / 50 + rng.normal(size=6)).tolist()
        if rng.random() < 0.2:
            scores[rng.integers(6)] = None
        rankings.append((scores, lengths.tolist(), (rng.random(6) < 0.95).tolist()))
    return rankings


def row_of_ranking(ranking):
    scores, lengths, finished = ranking
    failed = [i for i, ended in enumerate(finished) if not ended]
    return score_row(scores, map(int, lengths), failed)


def mean_lengths(rankings, rho):
    """(chosen, rejected) over the pairs in which both have a response."""
    both = []
    for scores, lengths, finished in rankings:
        pair = judging.choose_pair(scores, lengths, finished, rho)
        if all(scores[i] is not None and finished[i] for i in pair):
            both.append([lengths[i] for i in pair])
    return np.mean(both, axis=0)


def test_pair_statistics():
    rankings = [
        ([1.0, 3.0, 2.0], [10, 30, 20], [True] * 3),
        ([5.0, 4.0], [8, 6], [True, True]),
        ([5.0, None], [100, 0], [True, True]),  # no length to compare
        ([5.0, 9.0], [100, 9], [True, False]),
        ([1.0, 1.0], [3, 3], [True, True]),
        ([None], [0], [True]),
        ([1.0], [2], [True]),
    ]
    assert judging.pair_statistics(rankings, 0.0) == {
        "rho": 0.0,
        "pairs": 4,
        "chosen_tokens": 19,
        "rejected_tokens": 8,
        "chosen_score": 4,
        "rejected_score": 2.5,
        "failed": 0.5,
        "no_pair": 3,
    }
    kept = judging.pair_statistics(rankings, 0.0, reject_failed=False)
    assert (kept["pairs"], kept["failed"], kept["no_pair"]) == (2, 0, 5)
    none = judging.pair_statistics(rankings[-1:], 0.0)
    assert (none["pairs"], none["failed"]) == (0, 0)


@pytest.mark.parametrize("liking", [-0.5, 0.0, 0.2, 0.4, 0.6, 5.0])
def test_rho_is_the_smallest_that_makes_the_chosen_no_longer(tmp_path, capsys, liking):
    rankings = draw_rankings(liking)
    scores = write_rows(tmp_path / "scores", map(row_of_ranking, rankings))
    made = judging.write_pairs(scores, tmp_path / "pairs", "auto")
    table = made["rhos"]
    assert [row["rho"] for row in table] == pytest.approx(np.linspace(0, 0.5, 11))
    means = [mean_lengths(rankings, row["rho"]) for row in table]
    for row, (chosen, rejected) in zip(table, means, strict=True):
        assert row["chosen_tokens"] == pytest.approx(chosen)
        assert row["rejected_tokens"] == pytest.approx(rejected)
    fits = [row["rho"] for row, (c, r) in zip(table, means, strict=True) if c <= r]
    assert made["rho"] == min(fits, default=0.5)
    assert ("warning: the chosen responses are longer" in capsys.readouterr().err) == (not fits)
    if liking in (-0.5, 5.0):
        assert made["rho"] == (0 if liking < 0 else 0.5)


def test_a_file_whose_rejected_outputs_all_failed_has_no_lengths_to_control(tmp_path, capsys):
    scores = write_rows(tmp_path / "scores", [score_row([1.0, None], [3, 0])] * 2)
    statistics = judging.write_pairs(scores, tmp_path / "pairs", "auto")
    assert (statistics["rho"], statistics["failed"], statistics["pairs"]) == (0, 1, 2)
    assert "warning: every rejected output failed" in capsys.readouterr().err


def test_rows_of_pairs():
    row = score_row([1.0, 3.0, 2.0], [2, 4, 1]) | {"category": "trees", "answer": "b"}
    equal, failed = score_row([1.0, 1.0], [1, 1]), score_row([None, 0.5], [0, 3])
    first, second = judging.build_pairs([row | {"verdicts": []}, equal, failed], 0.0)
    assert first == {
        "instruction": "Which?",
        "prompt": "<user>Which?<assistant>",
        "prompt_ids": [1, 2],
        "category": "trees",
        "answer": "b",
        "chosen": f"{MARK} <R> xxxx",
        "rejected": f"{MARK} <R> xx",
        "chosen_ids": [1, 7, 7],
        "rejected_ids": [0, 7, 7],
        "chosen_score": 3.0,
        "rejected_score": 1.0,
    }
    assert (second["chosen_ids"], second["rejected_ids"]) == ([1, 7, 7], [0, 7, 7])
    assert (second["chosen_score"], second["rejected_score"]) == (0.5, None)
    assert len(list(judging.build_pairs([row, equal, failed], 0.0, reject_failed=False))) == 1


def test_a_foreign_file_has_its_characters_counted():
    foreign = score_row([1.1, 1.0, 1.0], [8, 1, 2])
    for output in foreign["outputs"]:
        for name in ("text", "thought_tokens", "response_tokens"):
            del output[name]
    foreign["outputs"][1]["thought"] = ""
    del foreign["prompt_text"]
    assert judging.ranking_of(foreign)[1] == [8, 1, 2]
    (pair,) = judging.build_pairs([foreign], 5.0)
    texts = (pair["prompt"], pair["chosen"], pair["rejected"])
    assert texts == ("Which?", "x", f"{MARK}\n\nxxxxxxxx")


def test_pairs_are_written_with_the_rho_asked_for(tmp_path):
    rows = [row_of_ranking(ranking) for ranking in draw_rankings(0.4)]
    scores = write_rows(tmp_path / "scores", rows)
    rankings = [judging.ranking_of(row) for row in rows]
    for rho in ("auto", 0.25):
        found = judging.write_pairs(scores, tmp_path / "pairs", rho)
        table = found.pop("rhos")
        assert found == judging.pair_statistics(rankings, found["rho"])
        pairs = list(judging.build_pairs(rows, found["rho"]))
        assert read_rows(tmp_path / "pairs") == pairs and len(pairs) == found["pairs"]
        if rho == "auto":
            assert found in table and found["rho"] not in (0, 0.25)
        else:
            assert table == [found] and found["rho"] == 0.25


# Win rates


class Lengths:
    """A judge that scores by length, and keeps how many instructions it was given at once."""

    group = 3

    def __init__(self, stop_at=None):
        self.sizes, self.stop_at = [], stop_at

    def run(self, items):
        if self.stop_at is not None and len(self.sizes) == self.stop_at:
            raise KeyboardInterrupt
        self.sizes.append(len(items))
        return [{"scores": [float(len(text)) for text in texts]} for _, _, texts in items]


def test_win_rate_counts_a_tie_half():
    ours = ["aaa", "a", "aa", None, None, "a", "aaaa"]
    theirs = ["aa", "aa", "aa", "a", None, None, "aaa"]
    scores = [[y and float(len(y)) for y in texts] for texts in (ours, theirs)]
    rate, low, high = judging.win_rate(*scores)
    assert rate == pytest.approx((3 + 0.5 * 2) / 7)
    assert 0 < low < rate < high < 1


@pytest.mark.reference
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
    found = judging.win_rate([1.0] * wins + [0.0] * (n - wins), [0.5] * n)
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
    out = run_judge(*base, samples, "--output", scores, "--pairs", pairs, "--rho", "auto")
    assert "4 pairs" in out and "1 without a pair" in out
    found = read_rows(scores)
    for row, before, theirs in zip(found, rows, THEIRS["ArmoRM"], strict=True):
        for output, (score, *_) in zip(row["outputs"], theirs, strict=True):
            if output["response"]:
                assert output.pop("score") == pytest.approx(score, rel=2e-4)
            else:
                assert output.pop("score") is None  # an empty response is none
        assert row == before  # all that was there is carried along
    made = read_rows(pairs)
    assert [pair["instruction"] for pair in made] == [x for x, y in tiny_judges.cases() if y[1:]]
    run_judge(*base, scores, "--pairs", tmp_path / "other", "--rho", "auto")
    assert read_rows(tmp_path / "other") == made


REFUSED = {  # words of the command line, with {} the test's folder: the message
    "--output {}/scores": "scores exists already: remove it",
    "--pairs {}/none/pairs": "none/pairs: there is no folder",
    "": "nothing to do: give --output",
    "--output {}/a --pairs {}/a": "--output and --pairs name one file",
    "--output {}/a --rho nan": "--rho: nan is neither auto nor from 0 to 10",
    "--output {}/a --rho -1": "--rho: -1 is neither",
    "--output {}/a --rho some": "--rho: invalid number_or_auto value: 'some'",
    "--output {}/a --device tpu9": "--device tpu9",
    "--output {}/a --dtype int8": "--dtype",
    "--output {}/a --samples {}/none": "none",
    "--output {}/a --judge {}": "tokenizer.json",
    "--pairs {}/a": r"samples:1: outputs\[0\]: no score",
}


@pytest.mark.parametrize("line", REFUSED)
def test_commands_refused(run_judge, folders, tmp_path, line):
    samples = write_rows(tmp_path / "samples", [sample_row("x", ["a", "b"])])
    write_rows(tmp_path / "scores", [])
    before = sorted(tmp_path.iterdir())
    base = ("--judge", folders["ArmoRM"], "--samples", samples)
    with pytest.raises((InputError, OSError), match=REFUSED[line]):
        run_judge(*base, *line.replace("{}", str(tmp_path)).split())
    assert sorted(tmp_path.iterdir()) == before


GOOD = sample_row("x", ["a", "b"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x", "prompt_ids": []}, "no outputs"),
        (GOOD | {"outputs": []}, "outputs is empty"),
        (GOOD | {"outputs": [{"ids": [1], "thought": "", "response": "a"}]}, "no finished"),
        (GOOD | {"outputs": [GOOD["outputs"][0] | {"finished": None}]}, "finished is neither"),
        (GOOD | {"instruction": None}, "no instruction"),
        (GOOD | {"prompt_ids": None}, "no prompt_ids"),
    ],
)
def test_bad_samples_are_refused_by_line(folders, tmp_path, row, message):
    samples = write_rows(tmp_path / "samples", [GOOD, row])
    judge = judging.load_judge(folders["one label"])
    judge.group = 1
    with pytest.raises(InputError, match=rf"samples:2.*: {message}"):
        judging.score_file(judge, samples, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_bad_scores_are_refused_by_line(tmp_path, score):
    row = score_row([1.0, 2.0], [1, 2])
    row["outputs"][1]["score"] = score
    scores = write_rows(tmp_path / "scores", [row])
    with pytest.raises(InputError, match=r"scores:1: outputs\[1\].*score"):
        judging.write_pairs(scores, tmp_path / "pairs", 0.5)


def test_files_changed_at_random_are_read_or_refused(tmp_path):
    """Bytes cut, changed or put in: no other end than pairs or an InputError."""
    scores = write_rows(tmp_path / "scores", [score_row([1.0, 2.0, None], [5, 9, 0])] * 2)
    pairs = tmp_path / "pairs"
    read_or_refuse(lambda: judging.write_pairs(scores, pairs, 0.25), scores, [b"\\ud800"])


def test_judging_goes_on_after_the_last_whole_group(tmp_path):
    rows = [sample_row(f"x{i}", ["a" * (i % 4), None, "b" * i]) for i in range(10)]
    samples = write_rows(tmp_path / "samples.jsonl", rows)
    judging.score_file(Lengths(), samples, tmp_path / "whole.jsonl")
    scores, judge = tmp_path / "scores.jsonl", Lengths()
    with pytest.raises(KeyboardInterrupt):
        judging.score_file(Lengths(stop_at=2), samples, scores)
    assert not scores.exists()
    (partial,) = tmp_path.glob("scores.jsonl.*.partial")
    with open(partial, "ab") as file:  # of a kill in the midst of a row
        file.write(b'{"instr')
    with pytest.raises(KeyboardInterrupt):  # another judge does not take these rows
        judging.score_file(Lengths(stop_at=0), samples, scores, key="another")
    judging.score_file(judge, samples, scores)
    assert judge.sizes == [3, 1]
    assert scores.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(InputError, match="exists already"):  # made with whatever options
        judging.score_file(judge, samples, scores)
