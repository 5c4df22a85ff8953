"""Judging (section 2.2): scores of responses, length control, and the pair of each instruction.

A judge sees an instruction and a response, never the thought before it. A pointwise judge gives a
response a number; a pairwise judge compares every two, and its verdicts become a number each (Elo).
The output whose response scores highest is the chosen, the lowest the rejected, with its thought.

In: a file of samples. Out: the same with a `score` in every output (null without a response), and
a file of pairs for dpo.py.

    python judge.py --judge DIR --samples FILE --output FILE [--pairs FILE] [--rho auto]
    python judge.py --judge DIR --samples SCORES --pairs FILE --rho 0.5   # other pairs, no judging
"""

import argparse
import math
import sys
from itertools import pairwise, permutations
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from model import (
    DTYPES,
    Device,
    InputError,
    LanguageModel,
    Trunk,
    check_device,
    check_output,
    checkpoint_folder,
    hash_of,
    is_count,
    is_number,
    load_tokenizer,
    load_weights,
    make_parser,
    options_of,
    pack,
    progress_bar,
    read_config,
    read_json,
    read_jsonl,
    run_main,
    set_deterministic,
    write_jsonl,
    write_rows,
)
from sample import check_system_turn, generate

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
        if not np.isfinite(values).all():  # an unknown length would make every comparison false
            raise InputError("length control: scores and lengths must be finite numbers")
        values = values - values[0]  # so that equal values are zeros exactly
        return (values - values.mean()) / (values.std() or math.inf)

    return (normalize(scores) - rho * normalize(lengths)).tolist()


def choose_pair(scores, lengths, finished, rho, reject_failed=True):
    """(chosen, rejected), the highest and the lowest of K outputs by index; None without a pair.

    Ranked are the outputs that finished and have a score, that is a response; a tie goes to the
    first. The others failed: with reject_failed the first of them is the rejected. Draft 2.2 has it
    so for what cannot be parsed; for what is empty or ran into the token limit it is ours.
    """
    K = len(scores)
    ranked = [i for i in range(K) if scores[i] is not None and finished[i]]
    failed = [i for i in range(K) if i not in ranked] if reject_failed else []
    if not ranked or len(ranked) + len(failed) < 2:
        return None
    controlled = length_control([scores[i] for i in ranked], [lengths[i] for i in ranked], rho)
    controlled = np.round(controlled, 12)  # rounding must not make a pair where all are equal
    best = ranked[np.argmax(controlled)]
    worst = ranked[np.argmin(controlled)]
    if failed:
        return best, failed[0]
    return (best, worst) if max(controlled) > min(controlled) else None


class Ranking(NamedTuple):
    """All that the pair of one instruction depends on: a list each, one value an output."""

    scores: list  # None: no response
    lengths: list  # of the responses
    finished: list  # False: truncated by the limit


def ranking_of(row):
    """The Ranking of a row of scores. Lengths are in the policy's tokens (the paper's: characters).

    An empty response is none. Another program's file may have no counts: characters then.
    """
    outputs = row["outputs"]
    scores = [output["score"] if has_response(output) else None for output in outputs]
    lengths = [output.get("response_tokens") for output in outputs]
    if any(has_response(output) and output.get("response_tokens") is None for output in outputs):
        lengths = [len(output["response"] or "") for output in outputs]
    return Ranking(scores, lengths, [output["finished"] for output in outputs])


def has_response(output):
    """Whether an output was parsed, and its response is not empty."""
    return bool((output["response"] or "").strip())


def build_pairs(rows, rho, reject_failed=True):
    """Yields the pair of each row of scores that gives one; its scores are the judge's own."""
    for row in rows:
        chosen_and_rejected = choose_pair(*ranking_of(row), rho, reject_failed)
        if chosen_and_rejected is None:
            continue
        left_out = ("outputs", "verdicts", "prompt_text")
        pair = {name: value for name, value in row.items() if name not in left_out}
        pair["prompt"] = row.get("prompt_text") or row["instruction"]
        for side, i in zip(("chosen", "rejected"), chosen_and_rejected, strict=True):
            output = row["outputs"][i]
            pair[side] = text_of(output)
            pair[f"{side}_ids"] = output["ids"]
            pair[f"{side}_score"] = output["score"]
        yield pair


def text_of(output):
    """An output's text; another program's file may have only its parts."""
    parts = [output["thought"], output["response"]]
    return output.get("text") or "\n\n".join(part for part in parts if part)


RHOS = [i / 20 for i in range(11)]  # section 2.2: rho in [0, 0.5]; the steps are ours


def pair_statistics(rankings, rho, reject_failed=True):
    """What a rho makes of a file's rankings, as a dict.

    Mean lengths and scores are over the pairs whose rejected output did not fail: only there is a
    length to control. failed: the share of the other pairs.
    """
    num_pairs = 0
    columns = {"chosen_tokens": [], "rejected_tokens": [], "chosen_score": [], "rejected_score": []}
    for ranking in rankings:
        pair = choose_pair(*ranking, rho, reject_failed)
        if pair is None:
            continue
        num_pairs += 1
        chosen, rejected = pair
        scores, lengths, finished = ranking
        if scores[rejected] is not None and finished[rejected]:
            columns["chosen_tokens"].append(lengths[chosen])
            columns["rejected_tokens"].append(lengths[rejected])
            columns["chosen_score"].append(scores[chosen])
            columns["rejected_score"].append(scores[rejected])
    num_compared = len(columns["chosen_tokens"])
    means = {name: float(np.mean(values or [0.0])) for name, values in columns.items()}
    return {
        "rho": rho,
        "pairs": num_pairs,
        **means,
        "failed": (num_pairs - num_compared) / max(num_pairs, 1),
        "no_pair": len(rankings) - num_pairs,
    }


def write_pairs(scores_path, pairs_path, rho, reject_failed=True):
    """Writes the pairs of a file of scores; returns the pair statistics of the rho taken.

    rho: a number, or "auto", the authors' rule (draft 3.5): the smallest in RHOS for which the
    chosen responses are on average no longer than the rejected, or the largest where none does
    that. Under `rhos` come the pair statistics of every rho looked at.
    """
    rankings = [ranking_of(row) for _, row in read_samples(scores_path, scored=True)]
    rhos = RHOS if rho == "auto" else [rho]
    statistics = [pair_statistics(rankings, value, reject_failed) for value in rhos]
    no_longer = [row for row in statistics if row["chosen_tokens"] <= row["rejected_tokens"]]
    best = no_longer[0] if no_longer else statistics[-1]
    rows = (row for _, row in read_samples(scores_path, scored=True))
    write_jsonl(pairs_path, build_pairs(rows, best["rho"], reject_failed))
    if rho == "auto" and best["pairs"] and best["failed"] == 1:
        print(
            "warning: every rejected output failed: no lengths to compare, rho 0", file=sys.stderr
        )
    elif rho == "auto" and not no_longer:
        print("warning: with no rho are the chosen as short as the rejected", file=sys.stderr)
    return {**best, "rhos": statistics}


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
    K = len(wins)
    if K < 2:
        return [0.0] * K
    # reachable[m, n]: m beat n, directly or through others. The fit converges only if all are.
    reachable = np.linalg.matrix_power((wins > 0) | np.eye(K, dtype=bool), K)
    if not reachable.all():
        wins = wins + 0.5 * (1 - np.eye(K))
    games = wins + wins.T
    strength = np.ones(K)
    change = 1.0
    while change > 1e-12:  # minorize-maximize (Hunter 2004)
        expected = (games / (strength[:, None] + strength)).sum(1)
        new = wins.sum(1) / expected
        new /= np.exp(np.log(new).mean())
        change = np.abs(new / strength - 1).max()
        strength = new
    points = 400 * np.log10(strength)
    return (points - points.mean()).round(6).tolist()


class Judge:
    """What both kinds of judge share. Another kind is a subclass with `run` and `longest_chat`."""

    group = 64  # instructions judged together

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.context = model.config.max_position_embeddings

    def score(self, instruction, responses):
        """One float a response, higher is better. The responses are texts, without thoughts."""
        (result,) = self.run([("the judge's chat", instruction, responses)])
        if None in result["scores"]:
            i = result["scores"].index(None)
            raise InputError(f"response {i} does not fit into the judge's {self.context} tokens")
        return result["scores"]

    def chat(self, where, *turns, reply=False):
        """The ids, a tuple, of (role, text) turns; `where` is for errors."""
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=reply))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def check_context(self, instructions, max_new_tokens):
        """Refuses, before anything is sampled, what the judge could not read if it came."""
        longest = max(self.longest_chat(text, max_new_tokens) for text in instructions)
        if longest > self.context:
            raise InputError(
                f"--judge: its context holds {self.context} tokens, and a chat may have {longest}; "
                "take another judge, a smaller --max-new-tokens or shorter instructions"
            )


class Pointwise(Judge):
    """s(x, y): a reward model reads the chat of an instruction and a response."""

    def run(self, items):
        """Judges (where, instruction, responses); returns a dict for each: its `scores`.

        A response that the context cannot hold has no score: None.
        """
        results = []
        for where, instruction, responses in items:
            chats = [self.response_chat(where, instruction, text) for text in responses]
            readable = [chat for chat in chats if len(chat) <= self.context]
            scores = {chat: row[0] for chat, row in zip(readable, self.read(readable), strict=True)}
            results.append({"scores": [scores.get(chat) for chat in chats]})
        return results

    def response_chat(self, where, instruction, response):
        return self.chat(where, ("user", instruction), ("assistant", response))

    def longest_chat(self, instruction, max_new_tokens):
        return len(self.response_chat("the judge's chat", instruction, "")) + max_new_tokens

    @torch.inference_mode()
    def read(self, chats):
        """The heads' rows for some chats of one instruction. Equal chats are one, so they tie."""
        if not chats:
            return []
        distinct = list(dict.fromkeys(chats))
        # The tokens that all chats begin with are computed once. Each chat's last token stays its
        # own: pack allows no empty piece, and a score is read at the chat's own end.
        shared = 0
        if len(distinct) > 1:
            begun = commonprefix([chat[:-1] for chat in distinct])  # noqa: RUF071, these are ids
            shared = len(begun)
        pieces = [(distinct[0][:shared], None)] if shared else []
        starts = []  # where each chat's own tokens begin in the packed row
        num_tokens = shared
        for chat in distinct:
            pieces.append((chat[shared:], 0 if shared else None))
            starts.append(num_tokens)
            num_tokens += len(chat) - shared

        def place(j, i):
            """Where token i of chat j stands in the packed row."""
            return i if i < shared else starts[j] + i - shared

        ends = [place(j, len(chat) - 1) for j, chat in enumerate(distinct)]
        gates = ends
        if isinstance(self.model, ArmoRM):
            gates = [place(j, self.gate_position(chat)) for j, chat in enumerate(distinct)]
        tokens, positions, attend = pack(pieces, self.model.model.embed_tokens.weight.device)
        hidden = self.model.model(tokens, positions, attend, keep=ends + gates)[0].float()
        h_end, h_gate = hidden.chunk(2)  # (n, hidden) each
        rows = self.model.score_heads(h_end, h_gate).tolist()
        return [rows[distinct.index(chat)] for chat in chats]

    def gate_position(self, chat):
        """Where ArmoRM's gate reads a chat: at the last assistant's header, even a quoted one."""
        header = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ids = tuple(self.tokenizer.encode(header, add_special_tokens=False))
        places = [i for i in range(len(chat)) if chat[i : i + len(ids)] == ids]
        if not places:
            raise InputError(f"{self.tokenizer.folder}: chat_template writes no {header!r}")
        return places[-1]


class RewardModel(nn.Module):
    """A family's ForSequenceClassification with one label: a linear head at the last token."""

    def __init__(self, config, raw=None):  # raw: as ArmoRM's, not read
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def score_heads(self, h_end, h_gate):
        """Hidden states (n, hidden) of the last tokens -> (n, 1) scores; h_gate is not read."""
        return self.score(h_end)


class ArmoRM(nn.Module):
    """LlamaForRewardModelWithGating: a reward for each objective, weighted by a gate."""

    def __init__(self, config, raw):  # raw: config.json whole
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        objectives = raw["num_objectives"]
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.register_buffer("reward_transform_matrix", torch.empty(objectives, objectives))
        hidden = [raw["gating_hidden_dim"]] * raw["gating_n_hidden"]
        widths = pairwise([config.hidden_size, *hidden, objectives])
        self.gating = nn.Module()  # only a name: parameters are called as in the checkpoint
        self.gating.layers = nn.ModuleList(nn.Linear(*width) for width in widths)
        self.gating.logit_scale = nn.Parameter(torch.empty(1))
        self.temperature = raw["gating_temperature"]

    def score_heads(self, h_end, h_gate):
        """Hidden states (n, hidden) twice -> (n, 1 + 2 objectives): score, rewards, gate.

        h_end: of the last tokens. h_gate: of the tokens where the assistant's header begins.
        """
        rewards = self.regression_layer(h_end)  # (n, objectives)
        *layers, last_layer = self.gating.layers
        x = h_gate
        for layer in layers:
            x = layer(x).relu()
        gate = (last_layer(x) / self.temperature).softmax(
            -1
        ) * self.gating.logit_scale  # as rewards
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
        compared = []  # of each item: the indices of the responses that are compared
        prompts = []
        for where, instruction, responses in items:
            readable = self.readable(where, instruction, responses)
            compared.append(readable)
            for a, b in permutations(readable, 2):
                prompts.append(self.comparison(where, instruction, responses[a], responses[b]))
        completions = generate(
            self.model,
            prompts,
            num_samples=1,
            max_new_tokens=self.verdict_tokens,
            temperature=0,
            stop_ids=self.tokenizer.stop_ids,
        )
        texts = iter(
            [self.tokenizer.decode(c.ids, skip_special_tokens=True) for (c,) in completions]
        )
        results = []
        for (_, _, responses), readable in zip(items, compared, strict=True):
            verdicts = []
            wins = np.zeros((len(responses), len(responses)))
            for a, b in permutations(readable, 2):
                text = next(texts)
                letters = [letter for letter in "AB" if f"[[{letter}]]" in text]
                verdict = letters[0] if len(letters) == 1 else None  # both are no verdict either
                verdicts.append({"a": a, "b": b, "verdict": verdict, "text": text})
                wins[a, b] += verdict == "A"
                wins[b, a] += verdict == "B"
            scores = [None] * len(responses)
            for i, points in zip(readable, elo(wins[np.ix_(readable, readable)]), strict=True):
                scores[i] = points
            results.append({"scores": scores, "verdicts": verdicts})
        return results

    def readable(self, where, instruction, responses):
        """Indices of responses of which any two fit into the context; the longest are left out."""
        indices = sorted(range(len(responses)), key=lambda i: len(responses[i]))
        room = self.context - self.verdict_tokens
        while len(indices) > 1:
            a, b = (responses[i] for i in indices[-2:])
            chats = [self.comparison(where, instruction, *pair) for pair in ((a, b), (b, a))]
            if max(map(len, chats)) <= room:
                break
            indices.pop()
        return sorted(indices)

    def comparison(self, where, instruction, a, b):
        """The chat that asks which of two responses is better."""
        user = PAIRWISE_USER.format(input=instruction, response_a=a, response_b=b)
        return self.chat(where, ("system", PAIRWISE_SYSTEM), ("user", user), reply=True)

    def longest_chat(self, instruction, max_new_tokens):
        chat = self.comparison("the judge's chat", instruction, "", "")
        return len(chat) + 2 * max_new_tokens + self.verdict_tokens


def load_judge(path, device="cpu", dtype=torch.float32):
    """The judge in a checkpoint folder or hub id, its kind by `architectures` in config.json.

    A reward model with one label or ArmoRM is pointwise, any causal language model pairwise.
    """
    device = check_device(device)
    judge = empty_judge(path)
    load_weights(judge.model, judge.tokenizer.folder, device, dtype)
    return judge


def empty_judge(path):
    """The judge without its weights: enough to tell how long its chats are."""
    folder = checkpoint_folder(path)
    tokenizer = load_tokenizer(folder)
    config = read_config(folder)
    raw = read_json(folder / "config.json")
    named = raw.get("architectures")
    kind = str(named[0] if isinstance(named, list) and named else named)
    if kind.endswith("ForCausalLM"):
        check_system_turn(tokenizer, PAIRWISE_SYSTEM, "a pairwise judge needs it")
        with torch.device("meta"):
            return Pairwise(LanguageModel(config), tokenizer)
    families = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
    kinds = {f"{family}ForSequenceClassification": RewardModel for family in families}
    kinds["LlamaForRewardModelWithGating"] = ArmoRM
    if kind not in kinds:
        known = f"{', '.join(kinds)} and causal language models"
        raise InputError(f"{folder}/config.json: architectures is {named!r}; judges are {known}")
    if kinds[kind] is ArmoRM:
        for key in ("num_objectives", "gating_hidden_dim", "gating_n_hidden"):
            if not is_count(raw.get(key)):
                raise InputError(f"{folder}/config.json: {key} is {raw.get(key)!r}, not a count")
        if not is_number(raw.get("gating_temperature")):
            raise InputError(f"{folder}/config.json: gating_temperature must be above 0")
    with torch.device("meta"):
        return Pointwise(kinds[kind](config, raw), tokenizer)


def read_samples(path, scored=False):
    """Yields (line number, row) of a file of samples, or of scores; refuses what has gaps."""
    needed = ["ids", "thought", "response", "finished"] + ["score"] * scored
    for line, row in read_jsonl(path):
        for name in ("instruction", "prompt_ids", "outputs"):
            if row.get(name) is None:
                raise InputError(f"{path}:{line}: no {name}")
        if not row["outputs"]:
            raise InputError(f"{path}:{line}: outputs is empty")
        for i, output in enumerate(row["outputs"]):
            where = f"{path}:{line}: outputs[{i}]"
            for name in needed:
                if name not in output:
                    raise InputError(f"{where}: no {name}")
            if not isinstance(output["finished"], bool):
                raise InputError(f"{where}: finished is neither true nor false")
            if scored:
                check_score(output, where)
        yield line, row


def check_score(output, where):
    score = output["score"]
    if score is not None and not math.isfinite(score):
        raise InputError(f"{where}: score {score} is not a finite number")


def score_file(judge, samples_path, scores_path, key=None):
    """Writes the scores of a file of samples; the same call resumes after the last group."""

    def make_rows(rows):
        done = num_rows - len(rows)
        with progress_bar("judging", num_rows, done, "instructions") as bar:
            for first in range(0, len(rows), judge.group):
                group = rows[first : first + judge.group]
                yield from score_rows(judge, group, samples_path)
                bar.update(len(group))

    rows = list(read_samples(samples_path))
    num_rows = len(rows)
    key = {"samples": hash_of(Path(samples_path)), "judge": key}
    write_rows(scores_path, rows, key, make_rows)


def score_rows(judge, rows, path):
    """Yields a row of scores for each (line, row of samples).

    An output without a response is shown to no judge; its score is None.
    """
    items = []
    places = []  # of each row: the indices of the outputs that are judged
    for line, row in rows:
        judged = [i for i, output in enumerate(row["outputs"]) if has_response(output)]
        places.append(judged)
        responses = [row["outputs"][i]["response"] for i in judged]
        items.append((f"{path}:{line}", row["instruction"], responses))
    results = judge.run(items)
    for (line, row), judged, result in zip(rows, places, results, strict=True):
        scores = dict(zip(judged, result.pop("scores"), strict=True))
        for i, score in scores.items():
            if score is not None and not math.isfinite(score):
                raise InputError(f"{path}:{line}: outputs[{i}]: the judge's score is {score}")
        for verdict in result.get("verdicts", ()):
            verdict["a"] = judged[verdict["a"]]
            verdict["b"] = judged[verdict["b"]]
        outputs = [{**output, "score": scores.get(i)} for i, output in enumerate(row["outputs"])]
        yield {**row, "outputs": outputs, **result}


def check_judging(scores_path):
    """What the judge could not do, from a file of scores; says it on standard error.

    Returns a dict: unread, the share of responses that its context could not hold, and
    missing_verdicts, the share of comparisons that ended without one (None for a pointwise judge).
    A judge that gives no verdict in 19 of 20 comparisons is refused (ours).
    """
    has_score = []
    has_verdict = []
    for _, row in read_jsonl(scores_path):
        outputs = filter(has_response, row["outputs"])
        has_score += [output["score"] is not None for output in outputs]
        has_verdict += [verdict["verdict"] is not None for verdict in row.get("verdicts", ())]
    unread = has_score.count(False) / max(len(has_score), 1)
    missing = has_verdict.count(False) / len(has_verdict) if has_verdict else None
    if unread:
        text = f"{has_score.count(False)} of {len(has_score)} responses ({unread:.1%})"
        print(f"warning: {text} do not fit into the judge's context: failed", file=sys.stderr)
    if missing:
        text = f"{has_verdict.count(False)} of {len(has_verdict)} comparisons ({missing:.1%})"
        if missing >= 0.95:
            raise InputError(f"{scores_path}: {text} have no verdict [[A]] or [[B]]: another judge")
        print(f"warning: {text} have no verdict [[A]] or [[B]]", file=sys.stderr)
    return {"unread": unread, "missing_verdicts": missing}


def win_rate(ours, theirs):
    """(rate, low, high) of our scores against theirs, on the same instructions.

    A tie is half a win; None is below any score. low, high: Wilson's 95% interval; ties widen it.
    """
    wins = 0.0
    for our_score, their_score in zip(ours, theirs, strict=True):
        a = -math.inf if our_score is None else our_score
        b = -math.inf if their_score is None else their_score
        wins += 1.0 if a > b else 0.5 if a == b else 0.0
    rate = wins / len(ours)
    return rate, *wilson_interval(rate, len(ours))


def wilson_interval(rate, n):
    """[low, high]: Wilson's 95% interval of a share of n."""
    z = 1.959964
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


RHO_HELP = "weight of length control, paper 2.2, or auto: the authors' rule, draft 3.5"
FAILED_HELP = "reject an output that cannot be parsed, draft 2.2, or is empty or truncated, ours"


def describe_pairs(statistics):
    """The pair statistics of a file in a line."""
    return (
        "{pairs:,} pairs ({failed:.0%} reject failed), rho {rho:g}; {no_pair} without a pair"
    ).format(**statistics)


def number_or_auto(text):
    """The type of --rho."""
    if text == "auto":
        return text
    rho = float(text)
    if not 0 <= rho <= 10:
        raise argparse.ArgumentTypeError(f"{text} is neither auto nor from 0 to 10")
    return rho


def main():
    parser = make_parser("Samples in, scores and pairs out.", Device)
    add = parser.add_argument
    add("--judge", required=True, help="checkpoint folder or hub id")
    add("--samples", required=True, help="file of samples, from sample.py")
    add("--output", help="file of scores to write")
    add("--pairs", help="file of pairs to write; without --output, --samples is a file of scores")
    add("--rho", type=number_or_auto, default="0.0", help=RHO_HELP + " (default 0.0)")
    add("--reject-failed", action=argparse.BooleanOptionalAction, default=True, help=FAILED_HELP)
    args = parser.parse_args()
    if not args.output and not args.pairs:
        raise InputError("nothing to do: give --output, --pairs or both")
    for path in filter(None, (args.output, args.pairs)):
        check_output(path)
    device = options_of(Device, args)
    set_deterministic(device)
    if args.output:
        judge = load_judge(args.judge, device.device, DTYPES[device.dtype])
        key = [hash_of(checkpoint_folder(args.judge)), args.dtype]
        score_file(judge, args.samples, args.output, key)
        check_judging(args.output)
    if args.pairs:
        scores = args.output or args.samples
        statistics = write_pairs(scores, args.pairs, args.rho, args.reject_failed)
        for row in statistics["rhos"]:  # what length control makes of the pairs
            cells = [f"{name} {x:.5g}" for name, x in row.items()]
            print(", ".join(cells).replace("_", " "))
        print(describe_pairs(statistics))


if __name__ == "__main__":
    run_main(main, resumes=any(word.startswith("--output") for word in sys.argv))
