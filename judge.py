"""Judging (section 2.2): scores of responses, length control, and the pair of each instruction.

A judge sees an instruction and a response, never the thought before it. A pointwise judge gives a
response a number; a pairwise judge compares every two, and its verdicts become a number each (Elo).
The output whose response scores highest is the chosen, the lowest the rejected, with its thought.

In: a file of samples. Out: the same with a `score` in every output (null without a response), and
a file of pairs for dpo.py.

    python judge.py --judge DIR --samples FILE --output FILE [--pairs FILE] [--rho auto]
    python judge.py --judge DIR --samples SCORES --pairs FILE --rho 0.5   # other pairs, no judging
    python judge.py --judge DIR --samples FILE --against FILE    # the win rate of two files
"""

import argparse
import math
import sys
from itertools import pairwise, permutations
from os.path import commonprefix
from pathlib import Path

import model as lm
from sample import generate

import numpy as np
import torch
from torch import nn


def length_control(scores, lengths, rho):
    """N(score) - rho N(length) of the K responses to one instruction (section 2.2).

    N(v) = (v - mean) / std, std being the population's; zeros where all values are equal.

    >>> length_control([1.0, 2.0], [10, 30], 0.5), length_control([1.0, 1.0], [5, 5], 0.5)
    ([-0.5, 0.5], [0.0, 0.0])
    """

    def normalize(values):
        values = np.asarray(values, dtype=np.float64)
        values = values - values[0]  # so that equal values are zeros exactly
        return (values - values.mean()) / (values.std() or math.inf)

    return (normalize(scores) - rho * normalize(lengths)).tolist()


def choose_pair(scores, lengths, finished, rho, reject_failed=True):
    """(chosen, rejected), the highest and the lowest of K outputs by index; None without a pair.

    Ranked are the outputs that finished and have a response (their score is not None); a tie goes
    to the first. The others failed; with reject_failed the first of them is the rejected.
    Draft 2.2 has it so for what cannot be cut; for what ran into the token limit it is ours.
    """
    ranked = [i for i, score in enumerate(scores) if score is not None and finished[i]]
    failed = [i for i in range(len(scores)) if i not in ranked and reject_failed]
    if not ranked or len(ranked) + len(failed) < 2:
        return None
    controlled = length_control([scores[i] for i in ranked], [lengths[i] for i in ranked], rho)
    controlled = np.round(controlled, 12)  # rounding must not make a pair where all are equal
    best, worst = ranked[np.argmax(controlled)], ranked[np.argmin(controlled)]
    if failed:
        return best, failed[0]
    return (best, worst) if max(controlled) > min(controlled) else None


def ranking_of(row):
    """(scores, lengths, finished) of a row of scores: all that its pair depends on."""
    outputs = row["outputs"]
    # In tokens of the policy; in characters where another program's file has none.
    lengths = [o.get("response_tokens", len(o["response"] or "")) for o in outputs]
    return [o["score"] for o in outputs], lengths, [o["finished"] for o in outputs]


def build_pairs(rows, rho, reject_failed=True):
    """Yields the pair of each row of scores that gives one; its scores are the judge's own."""
    for row in rows:
        pair = choose_pair(*ranking_of(row), rho, reject_failed)
        if pair is None:
            continue
        made = {k: v for k, v in row.items() if k not in ("outputs", "verdicts", "prompt_text")}
        made["prompt"] = row.get("prompt_text", row["instruction"])
        for name, i in zip(("chosen", "rejected"), pair, strict=True):
            output = row["outputs"][i]
            # Another program's file may have no text.
            parts = filter(None, (output["thought"], output["response"]))
            made[name] = output.get("text", "\n\n".join(parts))
            made |= {f"{name}_ids": output["ids"], f"{name}_score": output["score"]}
        yield made


RHOS = [i / 20 for i in range(11)]  # 2.2: rho in [0, 0.5]; the steps are ours


def pair_statistics(rankings, rho, reject_failed=True):
    """What a rho makes of a file's rankings, as a dict.

    Means are over the pairs whose rejected output did not fail; failed: the share of the others.
    """
    found = [choose_pair(*ranking, rho, reject_failed) for ranking in rankings]
    no_pair, compared = found.count(None), []
    for (scores, lengths, finished), pair in zip(rankings, found, strict=True):
        if pair and scores[pair[1]] is not None and finished[pair[1]]:
            compared.append([of[i] for of in (lengths, scores) for i in pair])
    pairs = len(found) - no_pair
    names = ("chosen_tokens", "rejected_tokens", "chosen_score", "rejected_score")
    means = dict(zip(names, np.mean(compared or [[0.0] * 4], axis=0).tolist(), strict=True))
    failed = (pairs - len(compared)) / max(pairs, 1)
    return {"rho": rho, "pairs": pairs, **means, "failed": failed, "no_pair": no_pair}


def write_pairs(scores_path, pairs_path, rho, reject_failed=True):
    """Writes the pairs of a file of scores; returns the pair statistics of the rho taken.

    rho: a number, or "auto", the authors' rule (draft 3.5): as large as it takes for the chosen
    responses to be on average no longer than the rejected ones; where none in RHOS does that, the
    largest. Under `rhos` come the pair statistics of every rho looked at.
    """
    rankings = [ranking_of(row) for _, row in read_samples(scores_path, scored=True)]
    rhos = RHOS if rho == "auto" else [rho]
    table = [pair_statistics(rankings, each, reject_failed) for each in rhos]
    shorter = [made for made in table if made["chosen_tokens"] <= made["rejected_tokens"]]
    taken = shorter[0] if shorter else table[-1]
    rows = (row for _, row in read_samples(scores_path, scored=True))
    lm.write_jsonl(pairs_path, build_pairs(rows, taken["rho"], reject_failed))
    if rho == "auto" and not shorter:
        print("warning: with no rho are the chosen as short as the rejected", file=sys.stderr)
    return {**taken, "rhos": table}


def elo(wins):
    """Elo of K responses, mean 0: the maximum-likelihood Bradley-Terry fit (section 2.2, draft B).

    wins (K, K): B_mn, how often m was preferred to n. The scores e maximize the sum of
    B_mn log sigmoid(e_m - e_n), in Elo's unit: 400 log10(a / b) where two beat each other a and b
    times. Where some never lost to the others there is no maximum, and every two get half a win
    more each way (ours). Rounded to 1e-6, so that the fit breaks no tie.

    >>> elo([[0, 10], [1, 0]]), elo([[0, 2], [0, 0]]) == elo([[0, 2.5], [0.5, 0]])
    ([200.0, -200.0], True)
    """
    wins = np.asarray(wins, dtype=np.float64)
    if len(wins) < 2:
        return [0.0] * len(wins)
    beaten = (wins > 0) | np.eye(len(wins), dtype=bool)
    beaten = np.linalg.matrix_power(beaten, len(wins))  # m beat n, or one who beat n, ...
    if not beaten.all():
        wins = wins + 0.5 * (1 - np.eye(len(wins)))
    games, strength, change = wins + wins.T, np.ones(len(wins)), 1.0
    while change > 1e-12:  # minorize-maximize (Hunter 2004)
        expected = (games / (strength[:, None] + strength)).sum(1)
        new = wins.sum(1) / expected
        new /= np.exp(np.log(new).mean())
        change, strength = np.abs(new / strength - 1).max(), new
    points = 400 * np.log10(strength)
    return (points - points.mean()).round(6).tolist()


class Judge:
    """What both kinds of judge share."""

    group = 64  # instructions judged between two saves

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def score(self, instruction, responses):
        """One float a response, higher is better. The responses are texts, without thoughts."""
        return self.run([(instruction, responses)])[0]["scores"]

    def chat(self, *turns, reply=0):
        """The ids, a tuple, of (role, text) turns: all that the judge reads before its reply."""
        messages = [{"role": role, "content": text} for role, text in turns]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=reply > 0)
        most = self.model.config.max_position_embeddings - reply
        lm.expect(len(ids) <= most, "what the judge reads", f"{len(ids)} tokens", f"{most} at most")
        return tuple(ids)


class Pointwise(Judge):
    """s(x, y): a reward model reads the chat of an instruction and a response."""

    def run(self, items):
        """Judges (instruction, responses) pairs; returns a dict for each: its `scores`."""
        rows = [self.read(x, responses) if responses else [] for x, responses in items]
        return [{"scores": [row[0] for row in own]} for own in rows]

    @torch.inference_mode()
    def read(self, instruction, responses):
        """The head's rows for some responses. Equal ones are computed once: they tie."""
        chats = [self.chat(("user", instruction), ("assistant", text)) for text in responses]
        distinct = list(dict.fromkeys(chats))
        # What all begin with is computed once, up to their last tokens.
        begun = commonprefix([chat[:-1] for chat in distinct])  # noqa: RUF071, these are ids
        shared = len(begun) if len(distinct) > 1 else 0
        pieces = [(chat[shared:], 0 if shared else None) for chat in distinct]
        pieces = [(distinct[0][:shared], None)] * bool(shared) + pieces
        device = self.model.model.embed_tokens.weight.device
        ends, gates, offset = [], [], 0  # offset: tokens of the chats before
        for chat in distinct:
            gate = self.gate_position(chat) if isinstance(self.model, ArmoRM) else 0
            gates.append(gate if gate < shared else offset + gate)
            ends.append(offset + len(chat) - 1)
            offset += len(chat) - shared
        hidden = self.model.model(*lm.pack(pieces, device), wanted=ends + gates)[0].float()
        rows = self.model.head(*hidden.chunk(2)).tolist()  # (n, hidden) each
        return [rows[distinct.index(chat)] for chat in chats]

    def gate_position(self, chat):
        """Where ArmoRM's gate reads a chat: at the last assistant's header, even a quoted one."""
        header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ids = tuple(self.tokenizer.encode(header, add_special_tokens=False))
        places = [i for i in range(len(chat)) if chat[i : i + len(ids)] == ids]
        lm.expect(places, "the judge's chat", f"no {header!r}", "one")
        return places[-1]


class RewardModel(nn.Module):
    """LlamaForSequenceClassification with one label: a linear head at the last token."""

    def __init__(self, config, raw=None):  # raw: as ArmoRM's, not read
        super().__init__()
        self.config = config
        self.model = lm.Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def head(self, h_end, h_gate):
        """Hidden states (n, hidden) of the last tokens -> (n, 1) scores; h_gate is not read."""
        return self.score(h_end)


class ArmoRM(nn.Module):
    """LlamaForRewardModelWithGating: a reward for each objective, weighted by a gate."""

    def __init__(self, config, raw):  # raw: config.json whole
        super().__init__()
        self.config = config
        self.model = lm.Trunk(config)
        objectives = raw["num_objectives"]
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.register_buffer("reward_transform_matrix", torch.empty(objectives, objectives))
        hidden = [raw["gating_hidden_dim"]] * raw["gating_n_hidden"]
        widths = pairwise([config.hidden_size, *hidden, objectives])
        self.gating = nn.Module()  # only a name: parameters are called as in the checkpoint
        self.gating.layers = nn.ModuleList(nn.Linear(*width) for width in widths)
        self.gating.logit_scale = nn.Parameter(torch.empty(1))
        self.temperature = raw["gating_temperature"]

    def head(self, h_end, h_gate):
        """Hidden states (n, hidden) twice -> (n, 1 + 2 objectives): score, rewards, gate.

        h_end: of the last tokens. h_gate: of the tokens where the assistant's header begins.
        """
        rewards = self.regression_layer(h_end)  # (n, objectives)
        x, (*layers, last) = h_gate, self.gating.layers
        for layer in layers:
            x = layer(x).relu()
        gate = (last(x) / self.temperature).softmax(-1) * self.gating.logit_scale  # as rewards
        score = (gate * (rewards @ self.reward_transform_matrix)).sum(-1, keepdim=True)  # (n, 1)
        return torch.cat([score, rewards, gate], dim=-1)


# The prompt that the Self-Taught Evaluator was trained on, MT-Bench's for pairs, word for word:
# facebookresearch/RAM, projects/self_taught_evaluator (MIT). The backslashes are part of it.
PAIRWISE_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI \
assistants to the user question displayed below. You should choose the assistant that follows the \
user's instructions and answers the user's question better. Your evaluation should consider \
factors such as the helpfulness, relevance, accuracy, depth, creativity, and level of detail of \
their responses. Begin your evaluation by comparing the two responses and provide a short \
explanation. Avoid any position biases and ensure that the order in which the responses were \
presented does not influence your decision. Do not allow the length of the responses to influence \
your evaluation. Do not favor certain names of the assistants. Be as objective as possible. After \
providing your explanation, output your final verdict by strictly following this format: \
\\"[[A]]\\" if assistant A is better, \\"[[B]]\\" if assistant B is better."""
PAIRWISE_USER = (
    "[User Question]\n{input}\n\n"
    "[The Start of Assistant A's Answer]\n{response_a}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{response_b}\n[The End of Assistant B's Answer]\n"
)


class Pairwise(Judge):
    """A language model that compares two responses, every two in both orders."""

    verdict_tokens = 2048  # most of a verdict; ours

    def run(self, items):
        """As Pointwise.run, with `scores` (Elo) and `verdicts`, one an ordered pair.

        A verdict has the indices `a` and `b` of the responses shown as A and B, `verdict` ("A", "B"
        or None) and the judge's `text`, which is greedy.
        """
        most, prompts = self.verdict_tokens, []
        for instruction, responses in items:
            for a, b in permutations(responses, 2):
                user = PAIRWISE_USER.format(input=instruction, response_a=a, response_b=b)
                prompts.append(self.chat(("system", PAIRWISE_SYSTEM), ("user", user), reply=most))
        greedy = {"temperature": 0, "stop_ids": self.tokenizer.stop_ids}
        completions = generate(self.model, prompts, 1, most, **greedy)
        texts = (self.tokenizer.decode(c.ids, skip_special_tokens=True) for (c,) in completions)
        results = []
        for _, responses in items:
            verdicts, wins = [], np.zeros((len(responses), len(responses)))
            for a, b in permutations(range(len(responses)), 2):
                text = next(texts)
                found = [letter for letter in "AB" if f"[[{letter}]]" in text]
                verdict = found[0] if len(found) == 1 else None  # both are no verdict either
                verdicts.append({"a": a, "b": b, "verdict": verdict, "text": text})
                wins[a, b] += verdict == "A"
                wins[b, a] += verdict == "B"
            results.append({"scores": elo(wins), "verdicts": verdicts})
        return results


def load_judge(path, device="cpu", dtype=torch.float32):
    """The judge in a checkpoint folder or hub id, its kind by `architectures` in config.json.

    A reward model with one label or ArmoRM is pointwise, any causal language model pairwise.
    """
    device, folder = lm.check_device(device), lm.checkpoint_folder(path)
    config, tokenizer = lm.read_config(folder), lm.load_tokenizer(folder)
    raw = lm.read_json(folder / "config.json")
    kind = (raw.get("architectures") or [None])[0]
    if str(kind).endswith("ForCausalLM"):
        return Pairwise(lm.load_model(folder, device, dtype), tokenizer)
    kinds = {"LlamaForRewardModelWithGating": ArmoRM, "LlamaForSequenceClassification": RewardModel}
    known = f"{', '.join(kinds)} or a causal language model"
    lm.expect(kind in kinds, f"{folder}/config.json: architectures", repr(kind), known)
    with torch.device("meta"):
        model = kinds[kind](config, raw)
    return Pointwise(lm.load_weights(model, folder, device, dtype), tokenizer)


def read_samples(path, scored=False):
    """Yields (line number, row) of a file of samples, or of scores; refuses what has gaps."""
    needed = {"ids", "thought", "response", "finished", *["score"] * scored}
    for line, row in lm.read_jsonl(path):
        missing = {"instruction", "prompt_ids", "outputs"} - row.keys()
        lm.expect(not missing, f"{path}:{line}", f"no {sorted(missing)}", "them")
        lm.expect(row["outputs"], f"{path}:{line}: outputs", "none", "one or more")
        for i, output in enumerate(row["outputs"]):
            where, missing = f"{path}:{line}: outputs[{i}]", needed - output.keys()
            lm.expect(not missing, where, f"no {sorted(missing)}", "them")
            score = output.get("score") or 0
            lm.expect(math.isfinite(score), f"{where}: score", score, "a finite number")
        yield line, row


def score_file(judge, samples_path, scores_path, key=None):
    """Writes the scores of a file of samples; the same call resumes after the last whole group."""
    rows = list(read_samples(samples_path))

    def score_part(part, bar):
        yield from score_rows(judge, part, samples_path)
        bar.update(len(part))

    key = {"samples": lm.hash_of(Path(samples_path)), "judge": key}
    lm.write_groups(scores_path, rows, judge.group, key, score_part, "judging", "instructions")


def score_rows(judge, rows, path):
    """Yields a row of scores for each (line, row of samples).

    An output without a response is shown to no judge; its score is None.
    """
    items, places = [], []
    for _, row in rows:
        texts = [output["response"] for output in row["outputs"]]
        places.append([i for i, text in enumerate(texts) if text is not None])
        items.append((row["instruction"], [texts[i] for i in places[-1]]))
    try:
        results = judge.run(items)
    except lm.InputError as error:
        raise lm.InputError(f"{path}:{rows[0][0]} and what follows: {error}") from None
    for (line, row), own, result in zip(rows, places, results, strict=True):
        scores = dict(zip(own, result.pop("scores"), strict=True))
        finite = all(map(math.isfinite, scores.values()))
        lm.expect(finite, f"{path}:{line}: scores", list(scores.values()), "finite numbers")
        for verdict in result.get("verdicts", ()):
            verdict |= {"a": own[verdict["a"]], "b": own[verdict["b"]]}
        outputs = [{**output, "score": scores.get(i)} for i, output in enumerate(row["outputs"])]
        yield {**row, "outputs": outputs, **result}


def win_rate(ours, theirs):
    """(rate, low, high) of our scores against theirs, on the same instructions.

    A tie is half a win; None is below any score. low, high: Wilson's 95% interval; ties widen it.
    """
    ours, theirs = ([-math.inf if s is None else s for s in side] for side in (ours, theirs))
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True))
    return wins / len(ours), *wilson_interval(wins / len(ours), len(ours))


def wilson_interval(rate, n):
    """[low, high]: Wilson's 95% interval of a share of n."""
    z = 1.959964
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def compare_files(judge, ours_path, theirs_path):
    """win_rate of two files of samples of the same instructions, by each row's first output."""
    ours, theirs = (list(read_samples(path)) for path in (ours_path, theirs_path))
    same = [row["instruction"] for _, row in ours] == [row["instruction"] for _, row in theirs]
    lm.expect(same, theirs_path, "other instructions", f"those of {ours_path}, in order")
    for (_, row), (_, other) in zip(ours, theirs, strict=True):
        row["outputs"] = [row["outputs"][0], other["outputs"][0]]
    judged = score_rows(judge, ours, ours_path)
    return win_rate(*zip(*(ranking_of(row)[0] for row in judged), strict=True))


RHO_HELP = "weight of length control, paper 2.2, or auto: the authors' rule, draft 3.5"
PAIRS_TEXT = "{pairs:,} pairs ({failed:.0%} reject failed), rho {rho:g}; {no_pair} without a pair"
FAILED_HELP = "reject an output that cannot be cut, draft 2.2, or did not end, ours"


def number_or_auto(text):
    """The type of --rho."""
    rho = text if text == "auto" else float(text)
    lm.expect(rho == "auto" or 0 <= rho <= 10, "--rho", text, "auto, or a number from 0 to 10")
    return rho


def main():
    parser = lm.make_parser("Samples in, scores and pairs out.", lm.Device)
    add = parser.add_argument
    add("--judge", required=True, help="checkpoint folder or hub id")
    add("--samples", required=True, help="file of samples, from sample.py")
    add("--output", help="file of scores to write")
    add("--pairs", help="file of pairs to write; without --output, --samples is a file of scores")
    add("--rho", type=number_or_auto, default="0.0", help=RHO_HELP + " (default 0.0)")
    add("--reject-failed", action=argparse.BooleanOptionalAction, default=True, help=FAILED_HELP)
    add("--against", help="file of samples: print the win rate of --samples' first outputs")
    args = parser.parse_args()
    some = args.output or args.pairs or args.against
    lm.expect(some, "the command", "nothing to do", "--output, --pairs or --against")
    for path in filter(None, (args.output, args.pairs)):
        lm.check_output(path)
    where = lm.options_of(lm.Device, args)
    if args.output or args.against:
        judge = load_judge(args.judge, where.device, lm.DTYPES[where.dtype])
    if args.output:
        key = [lm.hash_of(lm.checkpoint_folder(args.judge)), args.dtype]
        score_file(judge, args.samples, args.output, key)
    if args.against:
        rate, low, high = compare_files(judge, args.samples, args.against)
        print(f"win rate {rate:.1%}, 95% interval {low:.1%} to {high:.1%}")
    if args.pairs:
        scores = args.output or args.samples
        made = write_pairs(scores, args.pairs, args.rho, args.reject_failed)
        for row in made["rhos"]:  # what length control makes of the pairs
            cells = [f"{name} {x:.5g}" for name, x in row.items() if isinstance(x, int | float)]
            print(", ".join(cells).replace("_", " "))
        print(PAIRS_TEXT.format(**made))


if __name__ == "__main__":
    lm.run_main(main)
