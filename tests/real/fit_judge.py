"""Fits a judge on SmolLM2's own trunk: does this response answer this question, or another one?

A linear head reads the hidden state at the response's end, not of the last block, which knows
little but the next token, but of an earlier one: the judge keeps only the blocks up to there. The
blocks stay as they are; the head is fitted by the Bradley-Terry loss on pairs of a response to the
question and a response to another one. A third of the instructions, kept out of the fit, tell what
the judge can tell.

In: the policy's folder and a file of instructions with one response of each of several models,
weakest first in MODELS. Out: a LlamaForSequenceClassification with one label; figures on the
terminal. Called by make.py: its command is there. Under ten minutes on two free cores.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from judge import load_judge
from model import load_model, load_tokenizer

MODELS = ("text_davinci_003", "Meta-Llama-3-8B-Instruct", "gpt4_1106_preview")
HELD_OUT = 60  # instructions
DEPTHS = (16, 18, 20, 22)  # of 30 blocks
DECAYS = (1e-3, 3e-3, 1e-2)  # weight of the head's squared length
CUTS = (16, 400)  # tokens that the fit reads of a response, spread evenly in their logarithm
LONGEST = (100, 400)  # tokens of a response in the two measurements
MATCHED = 0.15  # two lengths are called equal within this


def read_rows(path, tokenizer):
    """The instructions in a fixed order, each with its responses' ids: (text, [ids] * models)."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    names = ("instruction", *MODELS)
    missing = {name for row in rows for name in names if name not in row}
    if missing or len(rows) < 2 * HELD_OUT:
        sys.exit(
            f"{path}: found {len(rows)} rows, without {missing or 'nothing'}, expected {names}"
        )
    rows = [(r["instruction"], [tokenizer.encode(r[m]) for m in MODELS]) for r in rows]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def another(rows, i, m, random, most):
    """A row whose response of model m is about as long as row i's, at the length they are cut."""
    length = min(len(rows[i][1][m]), most)
    gaps = [abs(min(len(ids[m]), most) - length) for _, ids in rows]
    order = random.permutation([j for j in range(len(rows)) if j != i])  # ties: in any order
    return int(random.choice(sorted(order, key=lambda j: gaps[j])[:3]))


def make_cases(rows, tokenizer, cut):
    """For each row, texts of its responses and of as many, and as long ones, to other rows.

    cut(random): the most tokens of a response. Returns (instruction, right, other) triples.
    """
    random, cases = np.random.default_rng(1), []
    for i, (instruction, responses) in enumerate(rows):
        right, other = [], []
        for m, ids in enumerate(responses):
            most = cut(random)
            right.append(tokenizer.decode(ids[:most]))
            other.append(tokenizer.decode(rows[another(rows, i, m, random, most)][1][m][:most]))
        cases.append((instruction, right, other))
    return cases


@torch.inference_mode()
def read_states(policy, tokenizer, cases):
    """Hidden states at the end of all six chats of each case: {depth: (cases, 6, hidden)}."""
    trunk, seen, states = policy.model, {}, {depth: [] for depth in DEPTHS}
    for depth in DEPTHS:
        trunk.layers[depth - 1].register_forward_hook(
            lambda block, given, out, depth=depth: seen.update({depth: out})
        )
    trunk.layers = trunk.layers[: max(DEPTHS)]
    for instruction, right, other in cases:
        chats = [chat_ids(tokenizer, instruction, response) for response in right + other]
        width = max(map(len, chats))
        trunk(torch.tensor([ids + [0] * (width - len(ids)) for ids in chats]))
        ends = [len(ids) - 1 for ids in chats]
        for depth, found in states.items():
            found.append(trunk.norm(seen[depth][range(len(chats)), ends]))
    return {depth: torch.stack(found) for depth, found in states.items()}


def chat_ids(tokenizer, instruction, response):
    """What the judge reads. SmolLM2's template ends in a line end, the judge's before it."""
    turns = (("user", instruction), ("assistant", response))
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=False)[:-1]


def differences(states):
    """(cases, 6, hidden) -> (9 cases, hidden): every right response less every other one."""
    right, other = states.chunk(2, dim=1)
    return (right[:, :, None] - other[:, None]).flatten(0, 2)


def fit(states, decay):
    """The head's weight (hidden,): logistic regression on differences, without a bias."""
    x = differences(states)
    weight = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = -logsigmoid(x @ weight).mean() + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def choose(states):
    """The depth and decay that tell best in 4-fold cross-validation on the fit's own cases."""
    best = {}
    for depth in DEPTHS:
        folds = torch.arange(len(states[depth])) % 4
        for decay in DECAYS:
            told = [
                differences(states[depth][folds == k]) @ fit(states[depth][folds != k], decay) > 0
                for k in range(4)
            ]
            best[depth, decay] = torch.cat(told).float().mean().item()
        print(f"  {depth} blocks: {max(best[depth, decay] for decay in DECAYS):.3f} of folds told")
    return max(best, key=best.get)


def interval(good, count):
    """Wilson's interval of 95%."""
    z, rate = 1.96, good / count
    middle, spread = rate + z * z / (2 * count), z * z / (4 * count * count)
    half = z * (rate * (1 - rate) / count + spread) ** 0.5
    return [(middle + sign * half) / (1 + z * z / count) for sign in (-1, 1)]


def comparisons(scores, lengths):
    """Yields (what is told, whether it is, whether the lengths match) for one held-out case.

    scores, lengths: of the three right responses, weakest model first, then the three others.
    """
    n = len(MODELS)
    pairs = [("right question, same model", m, n + m) for m in range(n)]
    pairs += [("right question, any model", a, n + b) for a in range(n) for b in range(n)]
    pairs += [(f"{MODELS[a]} over {MODELS[b]}", a, b) for a in range(n) for b in range(a)]
    for name, better, worse in pairs:
        short, long = sorted((lengths[better], lengths[worse]))
        yield name, scores[better] > scores[worse], short >= (1 - MATCHED) * long


def measure(folder, cases, tokenizer):
    """Prints what the judge in `folder`, loaded as judge.py does, tells of held-out cases."""
    judge, found = load_judge(folder), {}
    for instruction, right, other in cases:
        responses = right + other
        lengths = [len(tokenizer.encode(response)) for response in responses]
        for name, told, same in comparisons(judge.score(instruction, responses), lengths):
            for key in (name, name + ", lengths matched") if same else (name,):
                found.setdefault(key, []).append(told)
    for name in sorted(found):
        good, count = sum(found[name]), len(found[name])
        low, high = interval(good, count)
        print(f"  {name}: {good} of {count}, {good / count:.2f} ({low:.2f} to {high:.2f})")


def make_judge(policy, data, folder, write):
    """The whole of it. write(folder, tensors, head's weight, depth) writes the checkpoint."""
    began, tokenizer = time.monotonic(), load_tokenizer(policy)
    rows = read_rows(data, tokenizer)
    low, high = np.log(CUTS)
    cases = make_cases(
        rows[HELD_OUT:], tokenizer, lambda random: int(np.exp(random.uniform(low, high)))
    )
    states = read_states(load_model(policy), tokenizer, cases)
    depth, decay = choose(states)
    weight = fit(states[depth], decay)
    write(policy, folder, weight, depth)
    print(f"{folder}: made of {depth} blocks in {time.monotonic() - began:.0f} s")
    for longest in LONGEST:
        print(f"responses of {longest} tokens at most, {HELD_OUT} instructions:")
        cases = make_cases(rows[:HELD_OUT], tokenizer, lambda _, longest=longest: longest)
        measure(folder, cases, tokenizer)
    print(f"{time.monotonic() - began:.0f} s in all")
