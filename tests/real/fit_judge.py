"""Fits a judge on SmolLM2's own trunk: is this a good model's response, and to this question?

What a hidden state in the middle of the trunk knows of that is spread over the response, little of
it is at its end, which is what a one-label reward model reads. So the judge keeps the trunk's first
blocks as they are and gets one more, whose queries are zero: attention is then equal to all tokens,
and the last one receives their mean. It is still a Llama, and every program that reads one reads
it. A linear head on that mean is fitted by the Bradley-Terry loss on two kinds of pairs:

    a good model's response over a weak one's to the same instruction, of about the same length
    a response to the instruction over the same model's to another one, as long

Whatever the score would owe to length is taken out of the head before it is fitted: over the
responses to one instruction, score and logarithm of length have no covariance.

HELD_OUT instructions, kept out of all this, tell what the judge can tell; five folds of those that
are fitted choose the number of blocks and how far the head is held back.

In: the policy's folder and a file of instructions with one response of each of several models. Out:
a LlamaForSequenceClassification with one label; beside it the means that were read, which a second
call does not read again, and which instructions were used; figures on the terminal. Called by
make.py: its command is there. Under an hour on two busy cores.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from judge import load_judge, wilson_interval
from model import load_model, load_tokenizer, pack

# By AlpacaEval's length-controlled win rates: 19 to 26, and 2 to 4.
GOOD = (
    "Meta-Llama-3-8B-Instruct",
    "gpt4_0613_concise",
    "gpt-3.5-turbo-1106",
    "claude-instant-1.2",
    "Mistral-7B-Instruct-v0.3",
)
WEAK = (
    "Qwen1.5-1.8B-Chat",
    "baichuan-13b-chat",
    "guanaco-7b",
    "pythia-12b-mix-sft",
    "falcon-7b-instruct",
)
MODELS = GOOD + WEAK
HELD_OUT = 60  # instructions
FITTED = 127  # instructions; the others of the file stay unseen, but for responses as others'
FOLDS = 5
DEPTHS = (16, 20)  # of 30 blocks
DECAYS = (0.03, 0.1, 0.3)  # weight of the head's squared length
CUTS = (48, 320)  # tokens that are read of a response, spread evenly in their logarithm
OTHERS = 4  # responses to other instructions, of two good models and two weak ones
CLOSE, SAME = 0.8, 0.9  # least ratio of two lengths: in the fit, in the measurement


def read_rows(path, tokenizer):
    """The instructions in a fixed order, each with its responses' ids: (text, [ids] * models)."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    names = ("instruction", *MODELS)
    missing = {name for row in rows for name in names if name not in row}
    if missing or len(rows) < HELD_OUT + FITTED:
        sys.exit(
            f"{path}: found {len(rows)} rows, without {missing or 'nothing'}, expected {names}"
        )
    rows = [(r["instruction"], [tokenizer.encode(r[m].strip()) for m in MODELS]) for r in rows]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def another(rows, i, m, random, most):
    """A row whose response of model m is about as long as row i's, at the length they are cut.

    Held-out rows go with held-out ones, so that no response is in the fit and the measurement.
    """
    near = range(HELD_OUT) if i < HELD_OUT else range(HELD_OUT, len(rows))
    length = min(len(rows[i][1][m]), most)
    gaps = {j: abs(min(len(rows[j][1][m]), most) - length) for j in near if j != i}
    order = random.permutation(list(gaps))  # ties: in any order
    return int(random.choice(sorted(order, key=gaps.get)[:3]))


def make_case(rows, i, tokenizer):
    """Texts of row i's responses and of OTHERS to other rows, all cut at one length.

    Returns the texts and the index in MODELS of each.
    """
    random = np.random.default_rng([1, i])
    low, high = np.log(CUTS)
    most = CUTS[1] if i < HELD_OUT else int(np.exp(random.uniform(low, high)))
    half, n = OTHERS // 2, len(GOOD)
    some = [*random.permutation(n)[:half], *(n + random.permutation(len(WEAK))[:half])]
    made = [(i, m) for m in range(len(MODELS))]
    made += [(another(rows, i, m, random, most), int(m)) for m in some]
    return [tokenizer.decode(rows[j][1][m][:most]) for j, m in made], [m for _, m in made]


def chat_ids(tokenizer, instruction, response):
    """What the judge reads. SmolLM2's template ends in a line end, the judge's before it."""
    turns = (("user", instruction), ("assistant", response))
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=False)[:-1]


@torch.inference_mode()
def read_means(trunk, tokenizer, instruction, responses):
    """Means over each chat of the normed states after DEPTHS: {"16": (n, hidden), ...}, lengths.

    What all chats begin with is computed once. A response's length is that of its chat beyond it.
    """
    chats = [chat_ids(tokenizer, instruction, response) for response in responses]
    most = min(map(len, chats)) - 1
    shared = next((k for k in range(most) if len({chat[k] for chat in chats}) > 1), most)
    pieces = [(chats[0][:shared], None), *((chat[shared:], 0) for chat in chats)]
    seen = {}
    hooks = [
        trunk.layers[depth - 1].register_forward_hook(
            lambda block, given, out, depth=depth: seen.update({depth: out[0]})
        )
        for depth in DEPTHS
    ]
    trunk(*pack(pieces))
    for hook in hooks:
        hook.remove()
    lengths = [len(ids) for ids, _ in pieces]
    means = {}
    for depth, x in seen.items():
        first, *parts = F.rms_norm(x, x.shape[-1:], eps=trunk.norm.eps).split(lengths)
        means[str(depth)] = torch.stack(
            [(first.sum(0) + part.sum(0)) / (len(first) + len(part)) for part in parts]
        )
    return {**means, "lengths": torch.tensor(lengths[1:])}


def read_all(policy, rows, tokenizer, folder):
    """read_means of the rows that are used, each kept in a file of the folder and not read again.

    Returns [(means and lengths, models)] in the order of rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trunk, found, began = None, [], time.monotonic()
    for i, (instruction, _) in enumerate(rows[: HELD_OUT + FITTED]):
        responses, models = make_case(rows, i, tokenizer)
        file = folder / f"{i}.safetensors"
        if not file.exists():
            if trunk is None:
                trunk = load_model(policy).model
                trunk.layers = trunk.layers[: max(DEPTHS)]
            save_file(read_means(trunk, tokenizer, instruction, responses), f"{file}.partial")
            Path(f"{file}.partial").rename(file)
            if i % 20 == 19:
                print(f"  read: {i + 1} of {HELD_OUT + FITTED}, {time.monotonic() - began:.0f} s")
        found.append((load_file(file), models))
    return found


def pairs(case, least):
    """Of one case: pairs of good and weak, their lengths' ratio `least` at least; right and other.

    Each is (the better's index, the worse's).
    """
    (means, models), n = case, len(MODELS)
    lengths = means["lengths"].tolist()
    quality = [(a, b) for a in range(len(GOOD)) for b in range(len(GOOD), n)]
    relevance = [(models[k], k) for k in range(n, len(models))]
    return [
        [(a, b) for a, b in kind if ratio(lengths[a], lengths[b]) >= least]
        for kind in (quality, relevance)
    ]


def ratio(a, b):
    return min(a, b) / max(a, b)


def fit(cases, depth, decay):
    """The head's weight (hidden,): logistic regression on differences, without a bias.

    Both kinds of pairs weigh the same in all.
    """
    x = torch.cat([means[depth] for means, _ in cases])
    scale = x.std(0) + 1e-6
    differences, kinds, shared = [], [], 0
    for case in cases:
        means, n = case[0], len(MODELS)
        x, length = means[depth] / scale, means["lengths"].log()
        shared = shared + (length[:n] - length[:n].mean()) @ (x[:n] - x[:n].mean(0))
        for kind, found in enumerate(pairs(case, CLOSE)):
            differences += [x[a] - x[b] for a, b in found]
            kinds += [kind] * len(found)
    x, kinds = torch.stack(differences), torch.tensor(kinds)
    along = shared / shared.norm()  # the direction in which scores go with length
    x = x - (x @ along)[:, None] * along
    share = 0.5 / kinds.bincount()[kinds]
    weight = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=80)

    def loss():
        optimizer.zero_grad()
        value = -(share * F.logsigmoid(x @ weight)).sum() + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = weight.detach()
    return (weight - (weight @ along) * along) / scale


def with_constant(cases, depth, weight):
    """Two rows (2, hidden): the head, centred, and a direction in which every mean is nearly 1.

    The last norm divides by what it finds; with the second beside the first that is a constant.
    """
    x = torch.cat([means[depth] for means, _ in cases]).double()
    square = x.T @ x / len(x)
    little = 1e-3 * square.trace() / len(square) * torch.eye(len(square))
    ones = torch.linalg.solve(square + little, x.mean(0))
    ones = (ones / (x @ ones).mean()).float()
    return torch.stack([weight - (x.float() @ weight).mean() * ones, ones])


def told(cases, scores):
    """What scores tell: {name: [bool]}, and the rank correlation with length by instruction."""
    names = ("good over weak, same length", "right over other", "longer over shorter")
    found, correlations = {name: [] for name in names}, []
    for case, score in zip(cases, scores, strict=True):
        quality, relevance = pairs(case, SAME)
        n = len(MODELS)
        lengths, own = case[0]["lengths"][:n], score[:n]
        longer = (lengths[:, None] > lengths).nonzero().tolist()
        for name, kind in zip(names, (quality, relevance, longer), strict=True):
            found[name] += [bool(score[a] > score[b]) for a, b in kind]
        if len(set(lengths.tolist())) > 1:
            both = np.stack([ranks(lengths.numpy()), ranks(own.numpy())])
            correlations.append(np.corrcoef(both)[0, 1])
    return found, float(np.mean(correlations))


def ranks(values):
    """Ranks; equal values share the mean of theirs."""
    return np.array([((values < x).sum() + (values <= x).sum()) / 2 for x in values])


def choose(cases):
    """The depth and decay that tell most of the two kinds together, over folds by instruction."""
    best = {}
    for depth in map(str, DEPTHS):
        for decay in DECAYS:
            scores = [None] * len(cases)
            for k in range(FOLDS):
                weight = fit([c for i, c in enumerate(cases) if i % FOLDS != k], depth, decay)
                for i in range(k, len(cases), FOLDS):
                    scores[i] = cases[i][0][depth] @ weight
            found, rho = told(cases, scores)
            shares = {name: np.mean(values) for name, values in found.items()}
            cells = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
            print(f"  {depth} blocks, {decay}: {cells}, correlation {rho:+.2f}", flush=True)
            best[depth, decay] = sum(list(shares.values())[:2])
    return max(best, key=best.get)


def measure(cases, scores):
    """Prints what the judge tells of held-out cases."""
    found, rho = told(cases, scores)
    for name, values in found.items():
        good, count = sum(values), len(values)
        low, high = wilson_interval(good / count, count)
        print(f"  {name}: {good} of {count}, {good / count:.3f} ({low:.3f} to {high:.3f})")
    print(f"  rank correlation with length, mean over instructions: {rho:+.3f}")


def make_judge(policy, data, folder, write):
    """The whole of it. write(policy, folder, two rows, depth) writes the checkpoint."""
    began, tokenizer = time.monotonic(), load_tokenizer(policy)
    rows = read_rows(data, tokenizer)
    beside = folder.with_name(f"{folder.name}-means")
    cases = read_all(policy, rows, tokenizer, beside)
    held, cases = cases[:HELD_OUT], cases[HELD_OUT:]
    texts = [instruction for instruction, _ in rows]
    used = HELD_OUT + FITTED
    split = {"held_out": texts[:HELD_OUT], "fit": texts[HELD_OUT:used], "unused": texts[used:]}
    text = json.dumps(split, ensure_ascii=False, indent=1)
    folder.with_name(f"{folder.name}-split.json").write_text(text + "\n", encoding="utf-8")
    depth, decay = choose(cases)
    head = with_constant(cases, depth, fit(cases, depth, decay))
    write(policy, folder, head, int(depth))
    print(f"{folder}: made of {depth} blocks and one, decay {decay}")
    print(f"{len(held)} instructions that it has not seen, {CUTS[1]} tokens of a response at most:")
    measure(held, [means[depth] @ head[0] for means, _ in held])
    judge, gap = load_judge(folder), 0.0
    for i in range(3):
        means = held[i][0][depth]
        loaded = torch.tensor(judge.score(texts[i], make_case(rows, i, tokenizer)[0]))
        gap = max(gap, (loaded - means @ head[0]).abs().max().item())
    print(f"the folder's own scores part from these by at most {gap:.3f}")
    print(f"{time.monotonic() - began:.0f} s in all")
