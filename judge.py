"""Judging (section 2.2): scores of responses, length control, and the pair of each instruction.

A judge sees an instruction and a response, never the thought before it. A pointwise judge gives a
response a number; a pairwise judge compares two and writes its verdict, and all verdicts on the
responses to one instruction become one number each (Elo). Of the K outputs the one whose response
scores highest becomes the chosen, the lowest the rejected, thought and response both inside.

In: a judge's checkpoint and a file of samples. Out: a file of scores (the samples, with a `score`
in every output, null where there is no response) and a file of pairs for dpo.py.

    python judge.py --judge DIR --samples FILE --output FILE [--pairs FILE] [--rho 0.25]
    python judge.py --judge DIR --samples SCORES --pairs FILE --rho 0.5   # other pairs, no judging
    python judge.py --judge DIR --samples FILE --explain         # ArmoRM: what a score is made of
    python judge.py --judge DIR --samples FILE --against FILE    # the win rate of two files
"""

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import islice, pairwise, permutations

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from model import (
    DTYPES,
    InputError,
    Trunk,
    add_options,
    check_device,
    check_output,
    check_range,
    checkpoint_folder,
    expect,
    file_hash,
    fill,
    folder_hash,
    load_model,
    load_tokenizer,
    load_weights,
    option,
    pack,
    place,
    read_config,
    read_json,
    read_jsonl,
    read_options,
    run_main,
    shared_length,
    write_groups,
    write_jsonl,
)
from sample import generate

# Reward models: a trunk and a head, with the parameter names of the published checkpoints


class RewardModel(nn.Module):
    """LlamaForSequenceClassification with one label: a linear head at the last token."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)

    def head(self, h_end, h_gate):
        """Hidden states (n, hidden) of the last tokens -> (n, 1) scores; h_gate is not read."""
        return self.score(h_end)


class ArmoRM(nn.Module):
    """LlamaForRewardModelWithGating: a reward for each objective, weighted by a gate.

    settings: num_objectives, gating_temperature, gating_hidden_dim, gating_n_hidden.
    """

    def __init__(self, config, settings):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        objectives = settings["num_objectives"]
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.register_buffer("reward_transform_matrix", torch.empty(objectives, objectives))
        self.gating = Gating(config.hidden_size, settings)

    def head(self, h_end, h_gate):
        """Hidden states (n, hidden) twice -> (n, 1 + 2 objectives): score, rewards, gate.

        h_end: of the last tokens. h_gate: of the tokens where the assistant's header begins.
        """
        rewards = self.regression_layer(h_end)  # (n, objectives)
        gate = self.gating(h_gate)  # (n, objectives)
        score = (gate * (rewards @ self.reward_transform_matrix)).sum(-1, keepdim=True)  # (n, 1)
        return torch.cat([score, rewards, gate], dim=-1)


class Gating(nn.Module):
    """The prompt's hidden state (n, hidden) to the objectives' weights (n, objectives)."""

    def __init__(self, hidden_size, settings):
        super().__init__()
        hidden = [settings["gating_hidden_dim"]] * settings["gating_n_hidden"]
        widths = pairwise([hidden_size, *hidden, settings["num_objectives"]])
        self.temperature = settings["gating_temperature"]
        self.layers = nn.ModuleList(nn.Linear(*width) for width in widths)
        self.logit_scale = nn.Parameter(torch.empty(1))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return (self.layers[-1](x) / self.temperature).softmax(-1) * self.logit_scale


# Judges

# ArmoRM's gate reads the prompt at the first token of this text's last occurrence.
ASSISTANT_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class Judge:
    """What both kinds share. A kind has encode(instruction, responses), what it reads, and run.

    key: what scores depend on.
    """

    def __init__(self, model, tokenizer, options, key):
        self.model, self.tokenizer, self.options, self.key = model, tokenizer, options, key
        self.device = model.model.embed_tokens.weight.device
        # 2048 is the fastest of 1024 to 8192 on the CPU (tests/benchmark_judge.py); no GPU yet.
        standard = 2048 if self.device.type == "cpu" else 16384
        self.batch_tokens = options.judge_batch_tokens or standard
        self.context = model.config.max_positions

    def group(self, count):
        """How many instructions of `count` responses each are judged together, and then saved."""
        return 64

    def score(self, instruction, responses):
        """One float a response, higher is better. The responses are texts, without thoughts."""
        return score_batch(self, [("the judge", instruction, responses)])[0]["scores"]

    def fit(self, ids, room):
        """ids as a tuple; refused, or cut from the front, where there are more than `room`."""
        expected = f"at most {room} to fit its context; --cut-front drops the first ones"
        good = len(ids) <= room or self.options.cut_front
        expect(good, "what the judge reads", f"{len(ids)} tokens", expected)
        return tuple(ids[-room:])


def score_batch(judge, batch, first=0):
    """Scores (where, instruction, responses) triples together; `where` names each in errors.

    A response is a text, or None, whose score is None. first: the place of the first triple in
    its file. Returns a dict for each, with `scores` and what else the judge gives.
    """
    items, places = [], []
    for where, instruction, responses in batch:
        places.append([i for i, text in enumerate(responses) if text is not None])
        try:
            items.append(judge.encode(instruction, [responses[i] for i in places[-1]]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    results = judge.run(items, first)
    for (where, _, responses), place_of, result in zip(batch, places, results, strict=True):
        finite = all(map(math.isfinite, result["scores"]))
        expect(finite, f"{where}: scores", result["scores"], "finite numbers")
        scores = dict(zip(place_of, result["scores"], strict=True))
        result["scores"] = [scores.get(i) for i in range(len(responses))]
        for verdict in result.get("verdicts", ()):
            verdict |= {"a": place_of[verdict["a"]], "b": place_of[verdict["b"]]}
    return results


class Pointwise(Judge):
    """s(x, y) of a reward model. names: ArmoRM's objectives; empty where there is one label."""

    def __init__(self, model, tokenizer, options, key, names):
        super().__init__(model, tokenizer, options, key)
        self.names = names
        self.header = tuple(tokenizer.encode(ASSISTANT_HEADER, add_special_tokens=False))

    def encode(self, instruction, responses):
        """The chat of every response, as a tuple of ids: all that the judge reads."""
        chats = []
        for response in responses:
            turns = (("user", instruction), ("assistant", response))
            messages = [{"role": role, "content": content} for role, content in turns]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            chats.append(self.fit(ids, self.context))
            self.gate_position(chats[-1])  # refused here, where the line of the file is known
        return chats

    def run(self, items, first):
        """items: encode's chats, for each instruction. first is not read: nothing is drawn."""
        return [{"scores": [row[0] for row in rows]} for rows in self.read(items)]

    @torch.inference_mode()
    def read(self, items):
        """The head's row, a list of floats, of every chat of every instruction."""
        found = [{} for _ in items]
        for batch in self.batches(items):
            trees = [
                (chats[0][:shared], [chat[shared:] for chat in chats]) for _, shared, chats in batch
            ]
            tokens, positions, attend, offsets = pack(trees, self.device)
            owners, ends, gates = [], [], []
            for (i, shared, chats), (prompt, starts) in zip(batch, offsets, strict=True):
                for chat, start in zip(chats, starts, strict=True):
                    gate = self.gate_position(chat)
                    gates.append(prompt + gate if gate < shared else start + gate - shared)
                    ends.append(start + len(chat) - shared - 1)
                    owners.append((i, chat))
            hidden = self.model.model(tokens, positions, attend, kept=ends + gates)[0]
            h_end, h_gate = hidden.float().chunk(2)  # (n, hidden) each
            rows = self.model.head(h_end, h_gate).tolist()
            for (i, chat), row in zip(owners, rows, strict=True):
                found[i][chat] = row
        return [[rows[chat] for chat in chats] for rows, chats in zip(found, items, strict=True)]

    def batches(self, items):
        """Lists of (item, shared, chats) of about batch_tokens tokens, sorted by length.

        chats: those of an item, or a part of them, each once, so that equal responses tie
        exactly. shared: how many first ids they have in common; the judge reads these once.
        """
        pieces, most = [], self.batch_tokens
        for i, chats in enumerate(items):
            chats = sorted(dict.fromkeys(chats), key=len)
            shared = shared_length(chats)
            room = max(most - shared, 2 * shared)  # so that a long prompt is not read too often
            parts = fill(chats, [len(chat) - shared for chat in chats], room)
            pieces += [(i, shared, part) for part in parts]

        def size(piece):
            _, shared, chats = piece
            return shared + sum(len(chat) - shared for chat in chats)

        pieces.sort(key=size)
        return fill(pieces, map(size, pieces), most)

    def gate_position(self, chat):
        """Where the last assistant's header of a chat begins, the template's or a quoted one."""
        if not self.names:
            return 0  # no gate
        for start in range(len(chat) - len(self.header), -1, -1):
            if chat[start : start + len(self.header)] == self.header:
                return start
        raise InputError(f"the judge's chat: found no {ASSISTANT_HEADER!r}, expected one")


# The prompt that the Self-Taught Evaluator was trained on, MT-Bench's for pairs, word for word:
# facebookresearch/RAM, projects/self_taught_evaluator (MIT). The backslashes are part of it.
PAIRWISE_SYSTEM = (
    "Please act as an impartial judge and evaluate the quality of the responses provided by two AI "
    "assistants to the user question displayed below. You should choose the assistant that follows "
    "the user's instructions and answers the user's question better. Your evaluation should "
    "consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and level "
    "of detail of their responses. Begin your evaluation by comparing the two responses and "
    "provide a short explanation. Avoid any position biases and ensure that the order in which the "
    "responses were presented does not influence your decision. Do not allow the length of the "
    "responses to influence your evaluation. Do not favor certain names of the assistants. Be as "
    "objective as possible. After providing your explanation, output your final verdict by "
    'strictly following this format: \\"[[A]]\\" if assistant A is better, \\"[[B]]\\" if '
    "assistant B is better."
)
PAIRWISE_USER = (
    "[User Question]\n{input}\n\n"
    "[The Start of Assistant A's Answer]\n{response_a}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{response_b}\n[The End of Assistant B's Answer]\n"
)


def read_verdict(text):
    """'A', 'B', or None where both or neither is given.

    >>> read_verdict("B rambles: [[A]]"), read_verdict("[[A]] or [[B]]?")
    ('A', None)
    """
    a, b = "[[A]]" in text, "[[B]]" in text
    return None if a == b else "A" if a else "B"


class Pairwise(Judge):
    """A language model that compares two responses, every two in both orders."""

    def group(self, count):
        verdicts = max(1, count * (count - 1))
        return max(1, 448 // verdicts)  # 8 instructions at the paper's K: enough to fill a GPU

    def encode(self, instruction, responses):
        """(K, the prompt of every ordered pair as ids): all that the judge reads."""
        room, prompts = self.context - self.options.verdict_tokens, []
        check_range("--verdict-tokens", self.options.verdict_tokens, 1, self.context - 1)
        for a, b in permutations(responses, 2):
            user = PAIRWISE_USER.format(input=instruction, response_a=a, response_b=b)
            turns = (("system", PAIRWISE_SYSTEM), ("user", user))
            messages = [{"role": role, "content": content} for role, content in turns]
            prompts.append(self.fit(self.tokenizer.apply_chat_template(messages), room))
        return len(responses), prompts

    def run(self, items, first):
        """items: from encode, for each instruction. first names the verdicts' random streams.

        Beside `scores` (Elo) each gets `verdicts`, one an ordered pair: indices `a` and `b` of
        the responses shown as A and B, `verdict` ("A", "B" or None) and the judge's `text`.
        """
        completions = generate(
            self.model,
            [prompt for _, prompts in items for prompt in prompts],
            1,
            self.options.verdict_tokens,
            self.options.verdict_temperature,
            self.options.verdict_top_p,
            self.tokenizer.stop_ids,
            f"{self.options.verdict_seed}/verdicts/{first}",
        )
        texts = (self.tokenizer.decode(c.ids, skip_special_tokens=True) for (c,) in completions)
        results = []
        for count, _ in items:
            verdicts, wins = [], np.zeros((count, count))
            for a, b in permutations(range(count), 2):
                text = next(texts)
                verdict = read_verdict(text)
                verdicts.append({"a": a, "b": b, "verdict": verdict, "text": text})
                wins[a, b] += verdict == "A"
                wins[b, a] += verdict == "B"
            results.append({"scores": elo(wins), "verdicts": verdicts})
        return results


PRIOR_WINS = 0.5  # ours: the usual correction of a count of zero


def elo(wins):
    """Elo of K responses, mean 0: the maximum-likelihood Bradley-Terry fit (section 2.2).

    wins (K, K): how often i beat j. P(i beats j) = 1 / (1 + 10 ** ((elo_j - elo_i) / 400)), so
    two responses that beat each other a and b times are 400 log10(a / b) apart. The likelihood
    has no maximum where some responses never lost to any other; then, and only then, every two
    get PRIOR_WINS more wins each way (ours). Rounded to 1e-6, so that the fit breaks no tie.

    >>> elo([[0, 10], [1, 0]]), elo([[0, 2], [0, 0]]) == elo([[0, 2.5], [0.5, 0]])
    ([200.0, -200.0], True)
    """
    wins = np.asarray(wins, dtype=np.float64)
    if len(wins) < 2:
        return [0.0] * len(wins)
    beaten = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in wins:
        beaten = beaten @ beaten  # i beat j, or one who beat j, ...
    if not beaten.all():
        wins = wins + PRIOR_WINS * (1 - np.eye(len(wins)))
    games, strength, step = wins + wins.T, np.zeros(len(wins)), np.ones(1)
    while np.abs(step).max() > 1e-10:
        chance = 1 / (1 + np.exp(strength[None] - strength[:, None]))  # (K, K): i beats j
        gradient = (wins - games * chance).sum(1)
        weight = games * chance * (1 - chance)
        step = np.linalg.pinv(np.diag(weight.sum(1)) - weight) @ gradient  # Newton's
        step /= max(1, 2 * np.ptp(step))  # so short that the likelihood rises
        strength += step
    return (400 / math.log(10) * (strength - strength.mean())).round(6).tolist()


# Length control and the pair


def length_control(scores, lengths, rho):
    """N(score) - rho N(length) of the K responses to one instruction (section 2.2).

    N(v) = (v - mean) / std, std being the population's; zeros where all values are equal.

    >>> length_control([1.0, 2.0], [10, 30], 0.5), length_control([1.0, 1.0], [5, 5], 0.5)
    ([-0.5, 0.5], [0.0, 0.0])
    """
    return (normalize(scores) - rho * normalize(lengths)).tolist()


def normalize(values):
    """N(v) of length_control: (K,) float64."""
    values = np.asarray(values, dtype=np.float64)
    values = values - values[:1]  # so that equal values are zeros exactly
    std = values.std() if len(values) else 0
    return (values - values.mean()) / std if std > 0 else np.zeros_like(values)


def choose_pair(scores, lengths, finished, rho, reject_failed=False):
    """(chosen, rejected), the indices of the highest and the lowest of K outputs; None for no pair.

    scores: None where there is no response. Normalized and ranked are the outputs that have a
    response and finished; a tie goes to the first. There is no pair where fewer than two are
    ranked, or where all rank alike.

    An output that failed, having no response or not having finished, is never chosen. Nor is it
    rejected, by default: the paper rejects by score, and it has none, or that of a response cut
    short by our limit. reject_failed rejects the first failed output instead of the lowest, which
    teaches the format and to come to an end. Both are choices of ours.
    """
    ranked = [i for i, score in enumerate(scores) if score is not None and finished[i]]
    if len(ranked) < 2:
        return None
    controlled = length_control([scores[i] for i in ranked], [lengths[i] for i in ranked], rho)
    controlled = np.round(controlled, 12)  # rounding must not make a pair where all are equal
    best, worst = int(np.argmax(controlled)), int(np.argmin(controlled))
    failed = sorted(set(range(len(scores))) - set(ranked))
    if reject_failed and failed:
        return ranked[best], failed[0]
    return (ranked[best], ranked[worst]) if controlled[best] > controlled[worst] else None


def build_pairs(rows, rho, tokenizer, reject_failed=False):
    """Yields a row for each row of scores that gives a pair (section 2.2).

    rho: the weight of the length in tokens of the policy (`response_tokens`), or of `tokenizer`
    where a file lacks these. The scores in a pair are the judge's, before length control.
    """
    told = False
    for row in rows:
        outputs, lengths = row["outputs"], []
        for output in outputs:
            length = output.get("response_tokens")
            if length is None and output["response"] is not None:
                length = len(tokenizer.encode(output["response"], add_special_tokens=False))
                if rho and not told:
                    print("no response_tokens: counted the judge's tokens", file=sys.stderr)
                    told = True
            lengths.append(length)
        scores, finished = ([output[key] for output in outputs] for key in ("score", "finished"))
        pair = choose_pair(scores, lengths, finished, rho, reject_failed)
        if pair is not None:
            chosen, rejected = (outputs[i] for i in pair)
            yield {
                **{k: v for k, v in row.items() if k not in ("outputs", "verdicts", "prompt_text")},
                "prompt": row.get("prompt_text", row["instruction"]),
                "chosen": output_text(chosen),
                "rejected": output_text(rejected),
                "chosen_ids": chosen["ids"],
                "rejected_ids": rejected["ids"],
                "chosen_score": chosen["score"],
                "rejected_score": rejected["score"],
            }


def output_text(output):
    """An output whole; another program's file may have it in its two parts alone."""
    parts = (output["thought"], output["response"])
    return output["text"] if "text" in output else "\n\n".join(filter(None, parts))


# Win rates


def win_rate(judge, instructions, ours, theirs):
    """(rate, low, high) of our responses against theirs, one each for every instruction.

    A response is a text, or None where none could be cut: it loses to any.
    """
    triples, scores = [], []
    for i, (instruction, *pair) in enumerate(zip(instructions, ours, theirs, strict=True), 1):
        triples.append((f"instruction {i}", instruction, pair))
    group = judge.group(2)
    for first in range(0, len(triples), group):
        results = score_batch(judge, triples[first : first + group], first)
        scores += [result["scores"] for result in results]
    return win_rate_of_scores([a for a, _ in scores], [b for _, b in scores])


def win_rate_of_scores(ours, theirs):
    """(rate, low, high) of our scores against theirs, by one judge on the same instructions.

    A tie is half a win; None is below any score. low, high: wilson_interval's, which takes ties
    to vary as much as wins and losses do, and so errs on the wide side.
    """
    n, wins = len(ours), 0
    expect(n > 0, "win rate", "no instruction", "some to compare on")
    for pair in zip(ours, theirs, strict=True):
        a, b = (-math.inf if score is None else score for score in pair)
        wins += (a > b) + 0.5 * (a == b)
    return wins / n, *wilson_interval(wins / n, n)


def wilson_interval(rate, n):
    """[low, high]: Wilson's 95% interval of a share of n."""
    z = 1.959964
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, middle - reach), min(1.0, middle + reach)]


# A judge's checkpoint

# The objectives of ArmoRM-Llama3-8B-v0.1 in the order of its rewards, from its model card.
ARMORM_OBJECTIVES = """
helpsteer-helpfulness helpsteer-correctness helpsteer-coherence helpsteer-complexity
helpsteer-verbosity ultrafeedback-overall_score ultrafeedback-instruction_following
ultrafeedback-truthfulness ultrafeedback-honesty ultrafeedback-helpfulness beavertails-is_safe
prometheus-score argilla-overall_quality argilla-judge_lm code-complexity code-style
code-explanation code-instruction-following code-readability
""".split()


@dataclass
class Options:
    """What scores depend on, beside the judge and the samples."""

    judge_batch_tokens: int = option(
        None, "pointwise: tokens judged at once; ours: 2048 on the CPU, else 16384", low=1, kind=int
    )
    cut_front: bool = option(False, "drop the first tokens of what is longer, instead of refusing")
    verdict_tokens: int = option(2048, "pairwise: most tokens of a verdict; ours", low=1)
    verdict_temperature: float = option(0.0, "pairwise: 0 is greedy; ours", low=0, high=100)
    verdict_top_p: float = option(1.0, "pairwise: mass of the nucleus; ours", low=1e-6, high=1)
    verdict_seed: int = option(0, "pairwise: names every random stream", low=0)


def load_judge(path, device="cpu", dtype=torch.float32, options=None):
    """The judge in a checkpoint folder or hub id, its kind by `architectures` in config.json.

    LlamaForRewardModelWithGating and LlamaForSequenceClassification with one label are pointwise,
    any causal language model is pairwise. The rest is refused, and no code of a folder is run.
    """
    options = options or Options()
    device, folder = check_device(device), checkpoint_folder(path)
    config, tokenizer, file = read_config(folder), load_tokenizer(folder), folder / "config.json"
    key = {"judge": str(path), "dtype": str(dtype), **vars(options)}
    raw = read_json(file)
    kind = raw.get("architectures")
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    if str(kind).endswith("ForCausalLM"):
        return Pairwise(load_model(folder, device, dtype), tokenizer, options, key)
    with torch.device("meta"):
        if kind == "LlamaForRewardModelWithGating":
            model, names = ArmoRM(config, read_gating(raw, file)), objective_names(raw)
        elif kind == "LlamaForSequenceClassification":
            check_one_label(raw, file)
            model, names = RewardModel(config), []
        else:
            raise InputError(
                f"{file}: architectures: found {kind!r}, expected LlamaForRewardModelWithGating, "
                "LlamaForSequenceClassification or a causal language model"
            )
    load_weights(model, folder, device, dtype).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith("model."):  # the head reads few positions: float32 costs nothing
            place(model, name, tensor.data.float())
    return Pointwise(model, tokenizer, options, key, names)


def read_gating(raw, file):
    """The sizes of ArmoRM's head from config.json."""
    keys = ("num_objectives", "gating_hidden_dim", "gating_n_hidden", "gating_temperature")
    for key in keys:
        value, kinds = raw.get(key), (int, float) if key == "gating_temperature" else int
        good = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < 1e6
        expect(good, f"{file}: {key}", repr(value), "a number above 0")
    return {key: raw[key] for key in keys}


def objective_names(raw):
    """The published names where there are as many objectives, else config.json's, else numbers."""
    count, labels = raw["num_objectives"], raw.get("id2label")
    if count == len(ARMORM_OBJECTIVES):
        return ARMORM_OBJECTIVES
    labels = labels if isinstance(labels, dict) and len(labels) == count else {}
    return [str(labels.get(str(i), f"objective {i}")) for i in range(count)]


def check_one_label(raw, file):
    """Refuses a head of several labels; a config that does not say has transformers' two."""
    labels = raw.get("id2label")
    counts = [raw.get("num_labels"), len(labels) if isinstance(labels, dict) else None]
    if counts == [None, None]:
        counts = ["none given, which means 2"]
    others = [str(count) for count in counts if count not in (None, 1)]
    expect(not others, f"{file}: labels", " and ".join(others), "1")


# Files: samples in, scores out


def read_samples(path, scored=False):
    """Yields (line number, row) of a file of samples, or of scores; refuses other rows."""
    of_row = {"instruction": str, "prompt_ids": list, "outputs": list}
    of_output = {"ids": list, "thought": str | None, "response": str | None, "finished": bool}
    of_output |= {"score": object} if scored else {}
    for line, row in read_jsonl(path):
        check_fields(f"{path}:{line}", row, of_row)
        expect(row["outputs"], f"{path}:{line}: outputs", "none", "at least one")
        for i, output in enumerate(row["outputs"]):
            check_fields(f"{path}:{line}: outputs[{i}]", output, of_output)
            for name in ("score", "response_tokens"):  # where they are, numbers
                number, where = output.get(name), f"{path}:{line}: outputs[{i}]: {name}"
                good = isinstance(number, float | int) and abs(number) < 1e30
                expect(good or number is None, where, repr(number), "a number")
        yield line, row


def check_fields(where, row, kinds):
    expect(isinstance(row, dict), where, repr(row)[:40], "a JSON object")
    for name, kind in kinds.items():
        found = repr(row[name])[:40] if name in row else "nothing"
        good = name in row and isinstance(row[name], kind)
        expect(good, f"{where}: {name}", found, getattr(kind, "__name__", kind))


def score_file(judge, samples_path, scores_path):
    """Writes the scores of a file of samples; a second start goes on after the last whole group."""
    counts = [len(row["outputs"]) for _, row in read_samples(samples_path)]
    group = judge.group(max(counts, default=1))
    key = {**judge.key, "samples": file_hash(samples_path)}

    def groups(done):
        first = done * group
        rows = islice(read_jsonl(samples_path), first, None)
        with tqdm(total=len(counts), initial=first, desc="judging", unit="instruction") as bar:
            while batch := list(islice(rows, group)):
                yield score_rows(judge, batch, samples_path, first)
                first += len(batch)
                bar.update(len(batch))

    write_groups(scores_path, key, groups)


def score_rows(judge, rows, path, first):
    """Rows of scores of (line, row of samples) pairs, judged together by their responses alone."""
    batch = [
        (f"{path}:{line}", row["instruction"], [output["response"] for output in row["outputs"]])
        for line, row in rows
    ]
    scored = []
    for (_, row), result in zip(rows, score_batch(judge, batch, first), strict=True):
        pairs = zip(row["outputs"], result.pop("scores"), strict=True)
        scored.append({**row, "outputs": [{**o, "score": score} for o, score in pairs], **result})
    return scored


def compare_files(judge, ours_path, theirs_path):
    """win_rate of two files of samples of the same instructions, by each row's first output."""
    rows = [[row for _, row in read_samples(path)] for path in (ours_path, theirs_path)]
    instructions, others = ([row["instruction"] for row in side] for side in rows)
    expected = f"those of {ours_path}, in order"
    expect(instructions == others, theirs_path, "other instructions", expected)
    responses = ([row["outputs"][0]["response"] for row in side] for side in rows)
    return win_rate(judge, instructions, *responses)


# Command line


def print_objectives(judge, path):
    """ArmoRM's reward and weight of each objective, for every response of a file of samples."""
    expect(getattr(judge, "names", None), "--explain", "a judge without objectives", "ArmoRM")
    n = len(judge.names)
    for line, row in read_samples(path):
        responses = [output["response"] for output in row["outputs"]]
        texts = {i: text for i, text in enumerate(responses) if text is not None}
        (parts,) = judge.read([judge.encode(row["instruction"], texts.values())])
        for i, (score, *rest) in zip(texts, parts, strict=True):
            print(f"{path}:{line} outputs[{i}] score {score:.6f}")
            print(f"{'objective':40}{'reward':>10}{'gate':>10}")
            for name, reward, gate in zip(judge.names, rest[:n], rest[n:], strict=True):
                print(f"{name:40}{reward:10.4f}{gate:10.4f}")


def main():
    parser = argparse.ArgumentParser(description="Samples in, scores and pairs out.")
    add = parser.add_argument
    add("--judge", required=True, help="checkpoint folder or hub id")
    add("--samples", required=True, help="file of samples, from sample.py")
    add("--output", help="file of scores to write")
    add("--pairs", help="file of pairs to write; without --output, --samples is a file of scores")
    add("--rho", type=float, default=0.0, help="weight of length control, paper 2.2 (default 0.0)")
    add(
        "--reject-failed",
        action="store_true",
        help="reject an output without a response, or unfinished, before one that scores low",
    )
    add("--explain", action="store_true", help="print ArmoRM's rewards by objective, and its gate")
    add("--against", help="file of samples: print the win rate of --samples' first outputs")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="of the judge (default float32)")
    add_options(parser, Options)
    args = parser.parse_args()
    if not (args.output or args.pairs or args.explain or args.against):
        parser.error("expected --output, --pairs, --explain or --against")
    check_range("--rho", args.rho, 0)
    options = read_options(Options, vars(args))
    for path in filter(None, (args.output, args.pairs)):
        check_output(path)
    rows = (row for _, row in read_samples(args.samples))
    some = any(output["response"] is not None for row in rows for output in row["outputs"])
    expect(some, args.samples, "no response", "some to judge")
    if args.output or args.explain or args.against:
        judge = load_judge(args.judge, args.device, DTYPES[args.dtype], options)
    if args.output:
        judge.key["judge"] = folder_hash(checkpoint_folder(args.judge))
        score_file(judge, args.samples, args.output)
    if args.explain:
        print_objectives(judge, args.samples)
    if args.against:
        rate, low, high = compare_files(judge, args.samples, args.against)
        print(f"win rate {rate:.1%}, 95% interval {low:.1%} to {high:.1%}")
    if args.pairs:
        rows = (row for _, row in read_samples(args.output or args.samples, scored=True))
        tokenizer = load_tokenizer(args.judge)
        write_jsonl(args.pairs, build_pairs(rows, args.rho, tokenizer, args.reject_failed))


if __name__ == "__main__":
    run_main(main)
