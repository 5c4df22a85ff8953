"""Judging (section 2.2): scores of responses, length control, preference pairs.

A judge reads an instruction and a response, never the thought before it. The
outputs of the best and the worst response, thoughts included, become the pair.

    python judge.py --judge DIR --samples FILE --output FILE --pairs FILE
    python judge.py --samples SCORES --pairs FILE   # no judging

In: samples. Out: the same with a `score` in every output, and pairs for dpo.py.
"""

import argparse
import math
import sys
from itertools import pairwise, permutations
from os.path import commonprefix
from pathlib import Path

from model import DTYPES, Device, InputError, LanguageModel, Trunk
from model import check_device, check_output, checkpoint_folder, hash_of
from model import load_tokenizer, load_weights, make_parser, options_of, pack
from model import progress_bar, read_config, read_json, read_jsonl
from model import run_main, write_jsonl, write_rows
from sample import check_system_turn, generate

import numpy as np
import torch
from torch import nn


def length_control(scores, lengths, rho):
    """N(score) - rho N(length) of an instruction's responses (section 2.2).

    N(v) = (v - mean) / std over the given values; zeros where all are equal.

    >>> length_control([1.0, 2.0], [10, 30], 0.5)
    [-0.5, 0.5]
    """

    def normalize(values):
        values = np.asarray(values, dtype=np.float64)  # (K,)
        if not np.isfinite(values).all():  # NaN is not above or below anything
            raise InputError("length control: a score or a length is not finite")
        values = values - values[0]  # equal values become zeros exactly
        return (values - values.mean()) / (values.std() or math.inf)

    return (normalize(scores) - rho * normalize(lengths)).tolist()


def choose_pair(scores, lengths, finished, rho, reject_failed=True):
    """Indices (chosen, rejected) of the best and worst of K outputs, or None."""
    # No score: not parsed, empty, or too long for the judge. Not finished: truncated.
    good = [i for i in range(len(scores)) if scores[i] is not None and finished[i]]
    failed = [i for i in range(len(scores)) if i not in good]
    if not good:
        return None
    values = length_control([scores[i] for i in good], [lengths[i] for i in good], rho)
    # Where rho N(length) cancels N(score), rounding must not make a pair.
    values = np.round(values, 12)
    best = good[np.argmax(values)]  # the first of equals
    worst = good[np.argmin(values)]
    if failed and reject_failed:
        # Draft 2.2, for unparsed outputs. For all other failed ones: ours.
        return best, failed[0]
    return (best, worst) if max(values) > min(values) else None


def ranking_of(row):
    """(scores, lengths, finished) of a row: all that its pair depends on."""
    outputs = row["outputs"]
    scores = [o["score"] if has_response(o) else None for o in outputs]
    # The response's, in the policy's tokens; the paper seems to count characters.
    lengths = [output.get("response_tokens") for output in outputs]
    if any(has_response(o) and o.get("response_tokens") is None for o in outputs):
        # Another program's file may have no counts; a row must not mix units.
        lengths = [len(output["response"] or "") for output in outputs]
    return scores, lengths, [output["finished"] for output in outputs]


def has_response(output):
    """Whether an output was parsed and its response is not empty."""
    return bool((output["response"] or "").strip())


def build_pairs(rows, rho, reject_failed=True):
    """Yields the pair of each row of scores that gives one."""
    for row in rows:
        indices = choose_pair(*ranking_of(row), rho, reject_failed)
        if indices is None:
            continue
        left_out = ("outputs", "verdicts", "prompt_text")
        pair = {name: row[name] for name in row if name not in left_out}
        pair["prompt"] = row.get("prompt_text") or row["instruction"]
        for side, i in zip(("chosen", "rejected"), indices, strict=True):
            output = row["outputs"][i]
            # DPO trains the thought too, which no judge saw (section 2.2).
            parts = filter(None, (output["thought"], output["response"]))
            # Another program's file may have no text.
            pair[side] = output.get("text") or "\n\n".join(parts)
            pair[f"{side}_ids"] = output["ids"]
            pair[f"{side}_score"] = output["score"]  # without length control
        yield pair


def pair_statistics(rankings, rho, reject_failed=True):
    """What a rho makes of a file's rankings: counts, shares and means."""
    pairs = [choose_pair(*ranking, rho, reject_failed) for ranking in rankings]
    num_pairs = len(pairs) - pairs.count(None)
    rows = []  # (n, 4): only pairs whose rejected output did not fail
    for (scores, lengths, finished), pair in zip(rankings, pairs, strict=True):
        if pair is None:
            continue
        rejected = pair[1]
        # A failed output has no length that rho could control.
        if scores[rejected] is not None and finished[rejected]:
            rows.append([lengths[i] for i in pair] + [scores[i] for i in pair])
    names = ("chosen_tokens", "rejected_tokens", "chosen_score", "rejected_score")
    # (4,). Without rows all are 0, and "auto" takes rho 0.
    means = np.mean(rows or [[0.0] * 4], axis=0).tolist()
    statistics = {"rho": rho, "pairs": num_pairs}
    statistics |= zip(names, means, strict=True)
    statistics["failed"] = (num_pairs - len(rows)) / max(num_pairs, 1)
    statistics["no_pair"] = pairs.count(None)
    return statistics


def write_pairs(scores_path, pairs_path, rho, reject_failed=True):
    """Writes the pairs of a file of scores; returns the statistics of its rho.

    rho: a number or "auto". Their `rhos`: the statistics of every rho tried.
    """
    rows = [row for _, row in read_samples(scores_path, scored=True)]
    rankings = [ranking_of(row) for row in rows]
    rhos = RHOS if rho == "auto" else [rho]  # RHOS: 0, 0.05, ... 0.5
    statistics = [pair_statistics(rankings, value, reject_failed) for value in rhos]
    # The authors' rule (draft 3.5): the smallest rho with which the chosen are on
    # average no longer than the rejected. Where none does that, the largest.
    no_longer = [s for s in statistics if s["chosen_tokens"] <= s["rejected_tokens"]]
    best = no_longer[0] if no_longer else statistics[-1]
    if rho == "auto" and best["pairs"] and best["failed"] == 1:
        text = "every rejected output failed: there are no lengths to compare, rho is 0"
        print(f"warning: {text}", file=sys.stderr)
    elif rho == "auto" and not no_longer:
        # A row of two distinct outputs, the better one longer, has N(score) = N(length): no
        # rho below 1 turns them. Where few outputs are distinct, many rows are like that.
        text = f"the chosen responses are longer than the rejected with every rho up to {RHOS[-1]}"
        print(f"warning: {text}", file=sys.stderr)
    write_jsonl(pairs_path, build_pairs(rows, best["rho"], reject_failed))
    return {**best, "rhos": statistics}


def elo(wins):
    """Elo of K responses, mean 0: the Bradley-Terry fit (section 2.2, draft B).

    wins (K, K): B_mn, how often m was preferred to n. The scores are
    400 / ln 10 (Elo's unit) times the e that maximize the sum of B_mn log sigmoid(e_m - e_n).

    >>> elo([[0, 10], [1, 0]])
    [200.0, -200.0]
    """
    wins = np.asarray(wins, dtype=np.float64)  # (K, K)
    K = len(wins)
    if K < 2:
        return [0.0] * K
    # reachable[m, n]: m beat n, directly or through others (a product of bools is or-and).
    # Unless all are, some never lost to the rest: there is no maximum, they rise for ever.
    reachable = np.linalg.matrix_power((wins > 0) | np.eye(K, dtype=bool), K)
    if not reachable.all():
        wins = wins + 0.5 * (1 - np.eye(K))  # half a win each way; ours
    games = wins + wins.T  # (K, K)
    strength = np.ones(K)  # exp(e)
    change = 1.0
    while change > 1e-12:  # minorize-maximize (Hunter 2004)
        new = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)  # (K,)
        new /= np.exp(np.log(new).mean())  # only ratios count
        change = np.abs(new / strength - 1).max()
        strength = new
    points = 400 * np.log10(strength)
    return (points - points.mean()).round(6).tolist()  # rounded: ties stay ties


class Judge:
    """What all judges share. A kind of judge defines `run` and `longest_chat`."""

    group = 64  # instructions judged together: what a kill can lose

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.context = model.config.max_position_embeddings

    def score(self, instruction, responses):
        """One float a response (text without a thought); higher is better."""
        (result,) = self.run([("--judge", instruction, responses)])
        scores = result["scores"]
        if None in scores:
            i = scores.index(None)
            raise InputError(f"response {i} does not fit into the judge's {self.context} tokens")
        return scores

    def chat(self, where, *turns, reply=False):
        """The ids, a tuple, of (role, text) turns; `where` is for errors."""
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=reply)
        except InputError as error:  # raised by the chat template
            raise InputError(f"{where}: {error}") from None
        return tuple(ids)

    def check_context(self, instructions, limits):
        """Refuses, before sampling, what may be too long; limits: most tokens of a response."""
        longest = max(map(self.longest_chat, instructions, limits))
        if longest > self.context:
            sizes = f"its context holds {self.context} tokens, and a chat may have {longest}"
            raise InputError(f"--judge: {sizes}: another judge, or fewer --max-new-tokens")


class Pointwise(Judge):
    """s(x, y): a reward model reads the chat of instruction and response."""

    def run(self, items):
        """A dict with `scores` for each (where, instruction, responses) of a list."""
        results = []
        for where, instruction, responses in items:
            chats = [self.response_chat(where, instruction, y) for y in responses]
            rows = self.read(chats)
            # None: the context cannot hold the chat, so there is no score.
            results.append({"scores": [row and row[0] for row in rows]})
        return results

    def response_chat(self, where, instruction, response):
        return self.chat(where, ("user", instruction), ("assistant", response))

    def longest_chat(self, instruction, max_new_tokens):
        return len(self.response_chat("--judge", instruction, "")) + max_new_tokens

    @torch.inference_mode()
    def read(self, chats):
        """score_heads' row for each chat of one instruction; None if too long."""
        fitting = [chat for chat in chats if len(chat) <= self.context]
        distinct = list(dict.fromkeys(fitting))  # equal chats are read once, so they tie
        if not distinct:
            return [None] * len(chats)
        shared = 0  # the tokens that all begin with, which are computed once
        if len(distinct) > 1:
            # Without the last token, so that each chat has a piece with its own end.
            beginnings = [chat[:-1] for chat in distinct]
            shared = len(commonprefix(beginnings))  # noqa: RUF071, these are ids
        # The packed row: [shared tokens] [rest of chat 0] [rest of chat 1] ...
        pieces = [(distinct[0][:shared], None)] if shared else []
        ends = []  # where each chat's last token stands in the row
        gates = []  # where the token stands that ArmoRM's gate reads
        start = shared  # where the next rest begins
        for chat in distinct:
            pieces.append((chat[shared:], 0 if shared else None))
            end = start + len(chat) - shared
            places = [*range(shared), *range(start, end)]  # in the row, of the chat's tokens
            ends.append(places[-1])
            gates.append(places[self.gate_position(chat)])
            start = end
        device = self.model.model.embed_tokens.weight.device
        tokens, positions, attend = pack(pieces, device)  # (1, T) both
        hidden = self.model.model(tokens, positions, attend, keep=ends + gates)
        h_end, h_gate = hidden[0].float().chunk(2)  # (n, hidden) both, as in `keep`
        rows = self.model.score_heads(h_end, h_gate).tolist()
        rows = dict(zip(distinct, rows, strict=True))
        return [rows.get(chat) for chat in chats]

    def gate_position(self, chat):
        """Where ArmoRM's gate reads a chat: at the last assistant's header."""
        if not isinstance(self.model, ArmoRM):
            return len(chat) - 1  # any will do: there is no gate
        header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ids = tuple(self.tokenizer.encode(header, add_special_tokens=False))
        for i in reversed(range(len(chat))):  # the last, as published: even a quoted one
            if chat[i : i + len(ids)] == ids:
                return i
        raise InputError(f"{self.tokenizer.folder}: chat_template writes no {header!r}")


class RewardModel(nn.Module):
    """A family's ForSequenceClassification with one label: a linear head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def score_heads(self, h_end, h_gate):
        """Hidden states of the last tokens, (n, hidden) -> (n, 1)."""
        return self.score(h_end)  # h_gate: only ArmoRM reads it


class ArmoRM(nn.Module):
    """LlamaForRewardModelWithGating: a reward for each objective, weighted by a gate."""

    def __init__(self, config, raw):  # raw: config.json whole
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        K = raw["num_objectives"]  # 19 as published
        self.regression_layer = nn.Linear(config.hidden_size, K, bias=False)
        self.register_buffer("reward_transform_matrix", torch.empty(K, K))
        hidden = [raw["gating_hidden_dim"]] * raw["gating_n_hidden"]
        widths = pairwise([config.hidden_size, *hidden, K])
        self.gating = nn.Module()  # for the checkpoint's names
        self.gating.layers = nn.ModuleList(nn.Linear(*width) for width in widths)
        self.gating.logit_scale = nn.Parameter(torch.empty(1))
        self.temperature = float(raw["gating_temperature"])

    def score_heads(self, h_end, h_gate):
        """(n, hidden) twice -> (n, 1 + 2 K): score, K rewards, their gate."""
        rewards = self.regression_layer(h_end)  # (n, K)
        # h_gate: before the response, so that the instruction weighs the objectives.
        *layers, last_layer = self.gating.layers
        x = h_gate
        for layer in layers:
            x = layer(x).relu()  # (n, gating_hidden_dim)
        gate = (last_layer(x) / self.temperature).softmax(-1)  # (n, K)
        gate = gate * self.gating.logit_scale  # logit_scale: (1,)
        # The matrix takes from each reward what it owes to verbosity.
        score = gate * (rewards @ self.reward_transform_matrix)  # (n, K)
        score = score.sum(-1, keepdim=True)  # (n, 1)
        return torch.cat([score, rewards, gate], dim=-1)


# The Self-Taught Evaluator's prompt, MT-Bench's for pairs, word for word, with the
# backslashes: facebookresearch/RAM, projects/self_taught_evaluator (MIT).
PAIRWISE_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the responses provided \
by two AI assistants to the user question displayed below. You should choose the \
assistant that follows the user's instructions and answers the user's question \
better. Your evaluation should consider factors such as the helpfulness, relevance, \
accuracy, depth, creativity, and level of detail of their responses. Begin your \
evaluation by comparing the two responses and provide a short explanation. Avoid any \
position biases and ensure that the order in which the responses were presented does \
not influence your decision. Do not allow the length of the responses to influence \
your evaluation. Do not favor certain names of the assistants. Be as objective as \
possible. After providing your explanation, output your final verdict by strictly \
following this format: \\"[[A]]\\" if assistant A is better, \\"[[B]]\\" if \
assistant B is better."""
PAIRWISE_USER = (
    "[User Question]\n{input}\n\n"
    "[The Start of Assistant A's Answer]\n{response_a}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{response_b}\n[The End of Assistant B's Answer]\n"
)


class Pairwise(Judge):
    """A language model that compares every two responses, in both orders."""

    verdict_tokens = 2048  # of a verdict at most; ours

    def run(self, items):
        """As Pointwise.run: `scores` (Elo), and `verdicts`, one for each ordered pair."""
        prompts = []
        compared = []  # of each item: indices of its responses
        for where, instruction, responses in items:
            indices = self.readable(where, instruction, responses)
            compared.append(indices)
            for texts in permutations([responses[i] for i in indices], 2):
                # (a, b) and (b, a), against position bias.
                prompts.append(self.comparison(where, instruction, *texts))
        settings = {"temperature": 0, "stop_ids": self.tokenizer.stop_ids}  # greedy: repeatable
        completions = iter(generate(self.model, prompts, 1, self.verdict_tokens, **settings))
        results = []
        for (_, _, responses), indices in zip(items, compared, strict=True):
            verdicts = []
            wins = np.zeros((len(responses), len(responses)))
            for a, b in permutations(indices, 2):  # in the order of the prompts
                (completion,) = next(completions)
                text = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
                letters = [letter for letter in "AB" if f"[[{letter}]]" in text]
                # Neither or both: no verdict, a win for nobody (draft B).
                verdict = letters[0] if len(letters) == 1 else None
                verdicts.append({"a": a, "b": b, "verdict": verdict, "text": text})
                wins[a, b] += verdict == "A"
                wins[b, a] += verdict == "B"
            points = elo(wins[np.ix_(indices, indices)])
            scores = dict(zip(indices, points, strict=True))
            scores = [scores.get(i) for i in range(len(responses))]
            results.append({"scores": scores, "verdicts": verdicts})
        return results

    def readable(self, where, instruction, responses):
        """Indices of responses of which any two fit into the context."""
        lengths = [len(self.comparison(where, instruction, text, "")) for text in responses]
        indices = np.argsort(lengths, kind="stable").tolist()
        while len(indices) > 1:  # until the two longest fit
            orders = permutations([responses[i] for i in indices[-2:]])
            chats = [self.comparison(where, instruction, *texts) for texts in orders]
            if max(map(len, chats)) + self.verdict_tokens <= self.context:
                break
            indices.pop()  # the longest gets no score
        if len(indices) == 1 and len(responses) > 1:
            return []  # one that nothing was compared with has no score either
        return sorted(indices)

    def comparison(self, where, instruction, a, b):
        """The chat that asks which of two responses is better."""
        user = PAIRWISE_USER.format(input=instruction, response_a=a, response_b=b)
        return self.chat(where, ("system", PAIRWISE_SYSTEM), ("user", user), reply=True)

    def longest_chat(self, instruction, max_new_tokens):
        """Most tokens of a comparison of two drawn responses, with its verdict."""
        chat = self.comparison("--judge", instruction, "", "")
        return len(chat) + 2 * max_new_tokens + self.verdict_tokens


def load_judge(path, device="cpu", dtype=torch.float32):
    """The judge in a checkpoint folder or hub id."""
    judge = empty_judge(path)
    load_weights(judge.model, judge.tokenizer.folder, check_device(device), dtype)
    return judge


def empty_judge(path):
    """The judge without its weights, which can tell how long its chats are."""
    folder = checkpoint_folder(path)
    file = folder / "config.json"
    tokenizer = load_tokenizer(folder)
    config = read_config(folder)
    raw = read_json(file)  # with the keys that only a judge has
    families = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
    reward_models = [f"{name}ForSequenceClassification" for name in families]
    kind = raw.get("architectures")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    with torch.device("meta"):  # no memory until the weights come
        if kind in reward_models:
            return Pointwise(RewardModel(config), tokenizer)
        if kind == "LlamaForRewardModelWithGating":
            try:
                return Pointwise(ArmoRM(config, raw), tokenizer)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{file}: num_objectives or gating_*: {error!r}") from None
        if str(kind).endswith("ForCausalLM"):
            # The system turn is what asks for a verdict.
            check_system_turn(tokenizer, PAIRWISE_SYSTEM, "a pairwise judge needs it")
            return Pairwise(LanguageModel(config), tokenizer)
    known = f"{', '.join(reward_models)}, ArmoRM and language models"
    raise InputError(f"{file}: architectures is {kind!r}; judges are {known}")


def read_samples(path, scored=False):
    """Yields (place, row) of samples, or of scores; refuses what has gaps."""
    names = ["ids", "thought", "response", "finished"] + ["score"] * scored
    for place, row in read_jsonl(path):
        for name in ("instruction", "prompt_ids", "outputs"):
            if row.get(name) is None:
                raise InputError(f"{place}: no {name}")
        if not row["outputs"]:
            raise InputError(f"{place}: outputs is empty")
        for i, output in enumerate(row["outputs"]):
            where = f"{place}: outputs[{i}]"
            for name in names:
                if name not in output:
                    raise InputError(f"{where}: no {name}")
            if type(output["finished"]) is not bool:
                raise InputError(f"{where}: finished is neither true nor false")
            if not math.isfinite(output.get("score") or 0):  # JSON may say NaN
                raise InputError(f"{where}: score {output['score']} is not finite")
        yield place, row


def score_file(judge, samples_path, scores_path, key=None):
    """Writes the scores of a file of samples; the same call resumes it."""
    rows = list(read_samples(samples_path))

    def make_rows(left):
        done = len(rows) - len(left)
        with progress_bar("judging", len(rows), done, "instructions") as bar:
            for first in range(0, len(left), judge.group):
                group = left[first : first + judge.group]
                yield from score_rows(judge, group)
                bar.update(len(group))

    # Other samples (seen by hash) or another key: nothing is resumed.
    write_rows(scores_path, rows, [hash_of(Path(samples_path)), key], make_rows)


def score_rows(judge, rows):
    """Yields a row of scores for each (place, row of samples)."""
    items = []
    places = []  # of each row: the indices of the outputs to judge
    for place, row in rows:
        outputs = row["outputs"]
        indices = [i for i, output in enumerate(outputs) if has_response(output)]
        places.append(indices)
        # All that a judge gets to see of an output: the thought stays here.
        responses = [outputs[i]["response"] for i in indices]
        items.append((place, row["instruction"], responses))
    results = judge.run(items)
    for (place, row), indices, result in zip(rows, places, results, strict=True):
        scores = dict(zip(indices, result.pop("scores"), strict=True))
        if not all(math.isfinite(score or 0) for score in scores.values()):
            raise InputError(f"{place}: the judge's scores are not finite: {scores}")
        for verdict in result.get("verdicts", ()):  # indices of outputs
            verdict["a"] = indices[verdict["a"]]
            verdict["b"] = indices[verdict["b"]]
        outputs = [{**o, "score": scores.get(i)} for i, o in enumerate(row["outputs"])]
        yield {**row, "outputs": outputs, **result}


def check_judging(scores_path):
    """Warns of unread responses and missing verdicts; returns the share of each."""
    unread = []
    missing = []
    for _, row in read_jsonl(scores_path):
        outputs = filter(has_response, row["outputs"])
        # A response that the context could not hold counts as failed.
        unread += [output["score"] is None for output in outputs]
        missing += [v["verdict"] is None for v in row.get("verdicts", ())]
    shares = {}
    for name, flags in (("unread", unread), ("missing_verdicts", missing)):
        shares[name] = sum(flags) / max(len(flags), 1)
    if any(unread):
        text = f"{sum(unread)} of {len(unread)} responses do not fit into the judge's context"
        print(f"warning: {text}: they count as failed", file=sys.stderr)
    if any(missing):
        text = f"{sum(missing)} of {len(missing)} comparisons have no verdict [[A]] or [[B]]"
        if shares["missing_verdicts"] >= 0.95:  # it does not follow its prompt; ours
            raise InputError(f"{scores_path}: {text}: take another judge")
        print(f"warning: {text}", file=sys.stderr)
    return shares


def win_rate(ours, theirs):
    """(rate, low, high) of our scores against theirs on the same instructions."""
    # Without a response there is no score: it loses to any.
    ours = [-math.inf if score is None else score for score in ours]
    theirs = [-math.inf if score is None else score for score in theirs]
    # A tie is half a win.
    points = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]
    rate = sum(points) / len(points)
    return rate, *wilson_interval(rate, len(points))


def wilson_interval(rate, n):
    """[low, high]: Wilson's 95% interval of a share of n."""
    z = 1.959964  # 95% of a normal distribution is within z std
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    variance = rate * (1 - rate) / n + z * z / (4 * n * n)
    reach = z * math.sqrt(variance) / (1 + z * z / n)
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


def describe_pairs(statistics):
    """The pair statistics of a file in a line."""
    text = "{pairs:,} pairs ({failed:.0%} with a failed one), rho {rho:g}; {no_pair} without a pair"
    return text.format(**statistics)


RHOS = [i / 20 for i in range(11)]  # section 2.2: rho in [0, 0.5]; the steps are ours
RHO_HELP = "weight of length control, paper 2.2, or auto: the authors' rule, draft 3.5"
FAILED_HELP = "reject an output that cannot be parsed, draft 2.2, or is empty or truncated, ours"


def number_or_auto(text):
    """The type of --rho."""
    if text != "auto" and not 0 <= float(text) <= 10:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor from 0 to 10")
    return text if text == "auto" else float(text)


def main():
    parser = make_parser("Samples in, scores and pairs out.", Device)
    add = parser.add_argument
    add("--judge", help="checkpoint folder or hub id; --output needs it")
    add("--samples", required=True, help="file of samples; of scores without --output")
    add("--output", help="file of scores to write")
    add("--pairs", help="file of pairs to write")
    add("--rho", type=number_or_auto, default="0.0", help=RHO_HELP + " (default 0.0)")
    add("--reject-failed", action=argparse.BooleanOptionalAction, default=True, help=FAILED_HELP)
    args = parser.parse_args()
    if not args.output and not args.pairs:
        raise InputError("nothing to do: give --output, --pairs or both")
    if args.output and not args.judge:
        raise InputError("--output needs a judge: give --judge")
    if args.output and args.pairs and Path(args.output).resolve() == Path(args.pairs).resolve():
        raise InputError("--output and --pairs name one file: give two")
    for path in filter(None, (args.output, args.pairs)):
        check_output(path)
    device = options_of(Device, args)
    if args.output:  # resumes, where a stop left some rows
        judge = load_judge(args.judge, device.device, DTYPES[device.dtype])
        key = [hash_of(checkpoint_folder(args.judge)), args.dtype]
        score_file(judge, args.samples, args.output, key)
        check_judging(args.output)
    if args.pairs:
        scores = args.output or args.samples
        statistics = write_pairs(scores, args.pairs, args.rho, args.reject_failed)
        for row in statistics["rhos"]:  # what each makes of the pairs
            print(", ".join(f"{name} {value:.5g}" for name, value in row.items()))
        print(describe_pairs(statistics))


if __name__ == "__main__":
    run_main(main, resumes=any(word.startswith("--output") for word in sys.argv))
