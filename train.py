"""Thought Preference Optimization (Figure 1, section 2.2): the iterations.

M_0 is the seed. At iteration t, M_(t-1) writes K outputs, thought and response, for
each of some fresh instructions. A judge scores the responses and never sees a thought.
The best and the worst output of an instruction are a pair; DPO on the pairs gives M_t.

    python train.py                           # the toy world of tests/toy, in minutes
    python train.py --model DIR --judge DIR --instructions FILE --validation FILE
    python train.py --report runs/a runs/b    # the tables of these runs

A run's folder holds options.json, log.jsonl and, for each iteration, samples.jsonl,
scores.jsonl, pairs.jsonl and checkpoint/. The same command resumes it.
"""

import gc
import re
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dpo
import judge as judging
import sample
from model import DTYPES, Device, InputError, checkpoint_folder, hash_of, load_model
from model import load_tokenizer, make_parser, option, options_of, random_stream, read_config
from model import read_json, read_jsonl, run_main, save_model, write_json, write_jsonl

import torch


def tpo(run, rows, held_out):
    """All iterations, on shuffled training rows. A stage in the log is done."""
    validate_seed(run, held_out)  # every win rate is against its direct answers
    n = run.options.prompts_per_iteration
    for t in range(1, run.options.iterations + 1):  # below: the README's steps
        print(f"iteration {t} of {run.options.iterations}")
        fresh = rows[(t - 1) * n : t * n]  # no instruction is used twice (3.1)
        sample_outputs(run, t, fresh)  # 1. ask for a thought, 2. sample
        judge_outputs(run, t)  # 3. judge, 4. control the length, 5. build the pairs
        train_policy(run, t)  # 6. train with DPO
        select_epoch(run, t, held_out)  # 7. keep the best epoch


def sample_outputs(run, t, rows):
    """K outputs of M_(t-1) for each fresh instruction."""
    if run.logged("sample", t):
        return
    path = run.file(t, "samples.jsonl")
    # No second try: an output that is not parsed is to be rejected (draft 2.2).
    write_samples(run, run.policy(t - 1), rows, path, f"iteration-{t}", resample=0)
    outputs = [output for row in read_rows(path) for output in row["outputs"]]
    tokens = sum(len(output["ids"]) for output in outputs)
    row = {"stage": "sample", "iteration": t, "tokens": tokens}
    row["unparsed"] = mean([not output["response"] for output in outputs])
    row["truncated"] = mean([not output["finished"] for output in outputs])
    run.log(row)
    shares = "{unparsed:.1%} not parsed, {truncated:.1%} truncated".format(**row)
    print(f"  sampling    {len(outputs):,} outputs, {shares}")


def judge_outputs(run, t):
    """Scores of the responses, and the pairs of best and worst output."""
    if run.logged("judge", t):
        return
    scores = run.file(t, "scores.jsonl")
    if not scores.exists():
        judge = run.load(judging.load_judge, run.judge_folder)
        judging.score_file(judge, run.file(t, "samples.jsonl"), scores)
    shares = judging.check_judging(scores)  # warns of what the judge could not do
    rules = (run.options.rho, run.options.reject_failed)  # rho "auto": anew each time
    statistics = judging.write_pairs(scores, run.file(t, "pairs.jsonl"), *rules)
    run.log({"stage": "judge", "iteration": t, **shares, **statistics})
    print(f"  judging     {judging.describe_pairs(statistics)}")


def train_policy(run, t):
    """DPO of M_(t-1) on the pairs; every epoch is saved, as any may be best."""
    if run.logged("train", t):
        return
    folder = run.iteration(t)
    source = run.policy(t - 1)  # both the start and the reference (2.2)
    pairs = dpo.read_pairs(folder / "pairs.jsonl", read_config(source))
    options = dpo.Options(**run.logged("plan", 0)[0]["dpo"])  # fitted by plan_training
    options.seed = f"{run.dpo.seed}/iteration-{t}"  # of the order of the pairs

    def end_of_epoch(epoch, model):
        path = folder / f"epoch-{epoch}" / "checkpoint"
        if not path.exists():  # after a stop an epoch may end a second time
            save_model(model, path, source)

    def log(record):
        run.log({"stage": "dpo", "iteration": t, **record}, "step")

    model = run.load(load_model, source)
    # A stopped training resumes from state/, at the end of its last whole epoch.
    dpo.train(model, pairs, options, folder / "state", log, end_of_epoch)
    steps = run.logged("dpo", t)
    last = [step for step in steps if step["epoch"] == options.epochs]
    row = {"stage": "train", "iteration": t, "steps": len(steps)}
    for name in ("loss", "accuracy", "margin"):  # each step has its pairs' means
        row[name] = sum(step[name] * step["pairs"] for step in last) / len(pairs)
    run.log(row)
    print("  DPO         loss {loss:.2f}, accuracy {accuracy:.2f}".format(**row))


def select_epoch(run, t, held_out):
    """The epoch that does best on the held-out instructions becomes M_t (3.1)."""
    folder = run.iteration(t)
    if not run.logged("validation", t):
        epochs = range(1, run.dpo.epochs + 1)
        paths = [folder / f"epoch-{epoch}" / "validation.jsonl" for epoch in epochs]
        policies = [(p.with_name("checkpoint"), run.sampling.thought, p) for p in paths]
        for epoch, row in enumerate(validate_policies(run, t, held_out, policies), 1):
            run.log({"stage": "epoch", "epoch": epoch, **row}, "epoch")
        rows = run.logged("epoch", t)
        # The first of equals. No score, as nothing was parsed, is below any score.
        best = max(rows, key=lambda r: (r["win_rate"], r["score"] is not None, r["score"] or 0))
        run.log({**best, "stage": "validation"})
        text = f"epoch {best['epoch']}: win rate {best['win_rate']:.1%}"
        if best["exact_match"] is not None:
            text += f", exact match {best['exact_match']:.1%}"
        print(f"  validation  {text}")
    # The log has the choice before a file moves: a resume finishes what is left.
    (best,) = run.logged("validation", t)
    for path in list((folder / f"epoch-{best['epoch']}").glob("*")):
        path.replace(folder / path.name)
    for path in [*folder.glob("epoch-*"), folder / "state"]:
        shutil.rmtree(path, ignore_errors=True)


def validate_seed(run, held_out):
    """The seed on the held-out instructions, asked directly and asked to think."""
    styles = dict.fromkeys(["none", run.sampling.thought])  # one style if they are equal
    if len(run.logged("validation", 0)) == len(styles):
        return
    policies = [(run.seed_model, s, run.file(0, f"validation-{s}.jsonl")) for s in styles]
    for row in validate_policies(run, 0, held_out, policies):
        if row["failed_left"] == 1:  # no output could be the chosen one of a pair
            path = run.file(0, f"validation-{row['thought']}.jsonl")
            hint = "more --max-new-tokens, another --thought or --model, and another --output"
            raise InputError(f"{path}: no output has a response and an end: take {hint}")
        run.log({"stage": "validation", **row}, "thought")
    print(report(run.logged("validation", 0)))


def validate_policies(run, t, held_out, policies):
    """Validation rows of the log, one for each (checkpoint, style, samples file)."""
    for policy, style, path in policies:  # the same random streams for each
        changes = {"thought": style, "num_samples": 1}
        write_samples(run, policy, held_out, path, "validation", **changes)
    judge = run.load(judging.load_judge, run.judge_folder)  # one model at a time: sampling is over
    return [validate(run, judge, path, t, style) for _, style, path in policies]


def write_samples(run, policy, rows, path, name, **changes):
    """Samples `rows` into a file, unless it is there; name: of the random streams."""
    if not path.exists():
        options = replace(run.sampling, seed=f"{run.sampling.seed}/{name}", **changes)
        model = run.load(load_model, policy)
        tokenizer = load_tokenizer(run.seed_model)  # training leaves it as it is
        sample.sample_file(model, tokenizer, rows, options, path, {}, name, label=path.stem)


def validate(run, judge, path, t, style):
    """Judges a file of validation samples; returns its row of the log."""
    judged = path.with_name(f"{path.stem}-judged.jsonl")
    scores = path.with_name(f"{path.stem}-scores.jsonl")
    direct = run.file(0, "validation-none.jsonl")
    if not scores.exists():
        both = zip(read_rows(path), read_rows(direct), strict=True)  # a pairwise judge needs both
        write_jsonl(judged, ({**a, "outputs": a["outputs"] + b["outputs"]} for a, b in both))
        judging.score_file(judge, judged, scores)
    if path != direct:  # there the seed meets itself: no verdict is no fault
        judging.check_judging(scores)
    rows = read_rows(scores)
    by_category = {}
    for name in sorted({str(row["category"]) for row in rows if row.get("category") is not None}):
        by_category[name] = measure([row for row in rows if str(row.get("category")) == name])
    return {"iteration": t, "thought": style, **measure(rows), "by_category": by_category}


def read_rows(path):
    return [row for _, row in read_jsonl(path)]


def measure(rows):
    """Metrics of scored rows: output 0 is ours, output 1 the seed's direct answer."""
    outputs = [row["outputs"][0] for row in rows]
    ours = [o["score"] for o in outputs]
    seeds = [row["outputs"][1]["score"] for row in rows]
    rate, *interval = judging.win_rate(ours, seeds)  # the intervals are of 95%
    right = [is_right(row) for row in rows if row.get("answer") is not None]
    share = mean(right)  # None where no answer is known
    parsed_at_once = [o for o in outputs if o["response"] and o["tries"] == 1]
    parsed = [o for o in outputs if o["response"]]  # after the last try
    ended = [o for o in parsed if o["finished"]]
    return {
        "count": len(outputs),
        "score": mean([score for score in ours if score is not None]),
        "win_rate": rate,
        "win_rate_interval": interval,
        "exact_match": share,
        "exact_match_interval": judging.wilson_interval(share, len(right)) if right else None,
        "unparsed": 1 - len(parsed_at_once) / len(outputs),
        "unparsed_left": 1 - len(parsed) / len(outputs),
        "failed_left": 1 - len(ended) / len(outputs),
        "thought_tokens": mean([o["thought_tokens"] for o in parsed]),
        "response_tokens": mean([o["response_tokens"] for o in parsed]),
    }


def mean(values):
    return sum(values) / len(values) if values else None


def is_right(row):
    output = row["outputs"][0]
    known = row.get("answer")
    return known is not None and exact_match(output["response"], known, output["finished"])


# "#### Step 2" is a heading, and "the answer is not 5" gives none.
MARK = re.compile(r"(?<!#)####(?!#|\s*step)|\\boxed\{|\banswer\s+is\b(?!\s+not\b)", re.I)
# A model may go on with a question of its own, and answer that.
INVENTED = re.compile(r"^\W*(?:next |new )?(?:question|q|problem|user)[ \d]*:", re.I | re.M)
IN_BOX = re.compile(r"(?:[^{}]|\{[^{}]*\})*")  # up to its brace; one level inside it
IN_SENTENCE = re.compile(r"(?:(?![.!?]\s|\n|####).)*", re.S)  # 1.5 has no end in it
EQUATION = re.compile(r"(?:[^=\w]|\d|\b[a-z]\b)*=", re.I)  # no words before the "="
NUMBER = (
    r"(?:(?<![\w)])-)?"  # a sign; 15-10 has none
    r"(?:(?:\d+ )?\d+/0*[1-9]\d*"  # a fraction: 3/4, 1 3/4; not 3/0
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,200.50, .5; 1,2 is two numbers
)
# The ^2 of m^2, ^{10} of x^{10}, _1 of x_1.
POWER_OR_INDEX = re.compile(r"(?<=[\w)}])(?:\s?\^\s?|_)(?:\{[^{}]*\}|\([^()]*\)|-?[\w.]*\w)")


def exact_match(response, answer, finished=True):
    r"""Whether a response gives the known answer; finished: whether it ended by itself.

    A known answer that is a number is compared as one, any other as text. The answer
    stands behind a mark ("####", \boxed{} or "answer is"), up to the end of the
    sentence, line or box. Without a mark it is the last number, or the whole text. A
    truncated response counts only if its marked answer is complete.

    >>> exact_match("The answer is Paris. Enjoy!", "paris"), exact_match("$1,200.00", "#### 1200")
    (True, True)
    >>> exact_match(r"The answer is \boxed{1{,}200}.", "1200"), exact_match("It is -$5.", "-5")
    (True, True)
    >>> exact_match("#### 9 * 2 = 18 m^2", "18"), exact_match("The answer is 18", "18", False)
    (True, False)
    """
    if response is None:
        return False
    known = plain(str(answer))
    marked = marked_passages(known)  # GSM8K's "9 * 2 = 18 #### 18" is 18
    final = [row for row in marked if row[0] == "####"]
    if marked:
        known = (final or marked)[0][1]
    known = fold(known)
    is_number = re.fullmatch(NUMBER, known) is not None

    def answers(text):  # passages that hold a number, if one is asked for
        rows = marked_passages(text)
        return [row for row in rows if (numbers(row[1]) if is_number else row[1].strip())]

    text = plain(response)
    passages = []
    for mark, passage, is_whole in answers(text):
        if finished or is_whole:  # a truncated 18 may be 180
            passages.append((mark, passage))
    if not passages:  # the last number, or all of the text
        same = numbers(text)[-1:] == numbers(known) if is_number else fold(text) == known
        return finished and same
    after_hashes = [passage for mark, passage in passages if mark == "####"]
    # Without them the last mark counts: "answer is" may be corrected later.
    given = after_hashes[0] if after_hashes else passages[-1][1]
    inner = answers(given)  # "#### The answer is Paris."
    given = inner[-1][1] if inner else given
    if not is_number:
        return fold(given) == known
    while EQUATION.match(given):  # "9 * 2 = 18" is 18
        left, _, right = given.partition("=")
        if not numbers(right) or re.fullmatch(NUMBER, left.strip()):  # "18 = x", "18 = 9 * 2"
            break
        given = right
    return numbers(given)[:1] == numbers(known)  # "18 for 2 days" is 18


def marked_passages(text):
    """All (mark, what follows up to its end, whether that end is there)."""
    # INVENTED counts only behind a mark: before it the question may be restated.
    first = MARK.search(text)
    invented = first and INVENTED.search(text, first.end())
    text = text[: invented.start()] if invented else text
    passages = []
    for mark in MARK.finditer(text):
        after = text[mark.end() : mark.end() + 400].lstrip(" :`\n\t")  # answers are short
        pattern = IN_BOX if mark[0].endswith("{") else IN_SENTENCE
        passage = pattern.match(after)[0]
        passages.append((mark[0], passage, len(passage) < len(after)))
    return passages


def numbers(text):
    """The numbers of a text as floats, without exponents and indices."""
    values = []
    for number in re.findall(NUMBER, POWER_OR_INDEX.sub("", text)):
        sign = -1 if number.startswith("-") else 1
        # "1 3/4" is 1 and 3/4; of another number `whole` is "".
        whole, _, part = number.replace(",", "").lstrip("-").rpartition(" ")
        top, _, bottom = part.partition("/")
        values.append(sign * (float(whole or 0) + float(top) / float(bottom or 1)))
    return values


def plain(text):
    """A text without emphasis, LaTeX, currencies and percent signs."""
    text = text.replace("\u2212", "-").replace("{,}", ",")  # a minus sign; 1{,}200
    # 10**3 is a power; is**10** and is**1.5** are emphasis.
    text = re.sub(r"(?<=[\w)])\*\*(?=\d+(?!\d|[.,]\d|\*\*))", "^", text)
    text = re.sub(r"\*\*|__", "", text)  # emphasis
    text = re.sub(r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1", text)  # 18\text{ days}
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # 1\frac{3}{4}
    fraction = r"\\[dt]?frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))"  # \frac{3}{4}, \frac34
    text = re.sub(fraction, r"\1\2/\3\4", text)
    text = re.sub(r"\\(?:times|cdot|div)\b", "*", text)  # not a word
    text = re.sub(r"\\[()\[\],;:! ]|\\(?=[$%#])", "", text)  # \(18\), 1\,200, \$18
    text = re.sub(r"-[$\u20ac\u00a3]\s?", "-", text)  # -$ 5
    return re.sub(r"[$\u20ac\u00a3%]", "", text)


def fold(text):
    """Case and spaces folded; stops, colons, quotes and brackets around it dropped."""
    text = " ".join(text.casefold().split())
    return re.sub(r"^(?:[ :`\"'(\[]|\.(?!\d))+|[ :.`\"')\]]+$", "", text)  # .5 keeps its point


def report(rows):
    """The paper's table for the rows of a log; lengths are in tokens."""
    table = [["", "exact match", "win rate", "not parsed", "thought", "response"]]
    for row in [row for row in rows if row["stage"] == "validation"]:
        seed = "seed, directly" if row["thought"] == "none" else "seed, to think"
        cells = [f"iteration {row['iteration']}" if row["iteration"] else seed]
        for key in ("exact_match", "win_rate", "unparsed", "thought_tokens", "response_tokens"):
            form = ".1f" if key.endswith("tokens") else ".1%"
            cell = "-" if row[key] is None else format(row[key], form)
            if row.get(f"{key}_interval"):  # of 95%
                low, high = row[f"{key}_interval"]
                cell += f" ({100 * low:.0f} to {100 * high:.0f})"
            cells.append(cell)
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def print_example(run):
    """A held-out instruction, one that the seed got wrong if any, before and after."""
    before = read_rows(run.file(0, f"validation-{run.sampling.thought}-scores.jsonl"))
    after = read_rows(run.file(run.options.iterations, "validation-scores.jsonl"))

    def effort(i):  # a short question whose answer is a number is checked at a glance
        row = before[i]
        return is_right(row), not numbers(str(row.get("answer"))), len(row["instruction"])

    i = min(range(len(before)), key=effort)
    texts = [before[i]["instruction"]]
    for name, rows in (("before", before), ("after", after)):
        texts.append(f"{name:8}{rows[i]['outputs'][0]['text']}")
    for text in texts:
        text = "".join(c if c.isprintable() else " " for c in text)  # no "\x1b" on a terminal
        print(textwrap.fill(text, 80, subsequent_indent=" " * 8, max_lines=6))


class Run:
    """A run's options, folder and log; every stage gets it."""

    def __init__(self, args):
        for name in PATHS:
            if getattr(args, name) is None:
                raise InputError(f"--{name} is missing: a path, or a recipe that has one")
        self.args = args
        self.options = options_of(Options, args)
        self.device = options_of(Device, args)
        self.sampling = options_of(sample.Options, args)
        # dpo: as given; the log's plan has the defaults filled in.
        self.dpo = options_of(dpo.Options, args)
        self.folder = Path(self.options.output or f"runs/{self.sampling.thought}")
        self.log_file = self.folder / "log.jsonl"
        self.seed_model = checkpoint_folder(self.options.model)
        self.judge_folder = checkpoint_folder(self.options.judge)

    def iteration(self, t):
        folder = self.folder / f"iteration-{t}"
        folder.mkdir(exist_ok=True)
        return folder

    def file(self, t, name):
        return self.iteration(t) / name

    def policy(self, t):
        """The folder of M_t: the seed, or what iteration t trained."""
        return self.file(t, "checkpoint") if t else self.seed_model

    def load(self, load, folder):
        """Loads a model or a judge; callers have dropped the one before."""
        gc.collect()  # autograd may leave it in a cycle of references
        torch.cuda.empty_cache()  # the KV cache needs nearly all of the memory
        return load(folder, self.device.device, DTYPES[self.device.dtype])

    def logged(self, stage, t):
        """The log's rows of a stage of iteration t."""
        rows = read_rows(self.log_file)
        return [row for row in rows if (row["stage"], row["iteration"]) == (stage, t)]

    def log(self, row, *keys):
        """Adds a row, in place of one of the same stage, iteration and keys."""
        keys = ("stage", "iteration", *keys)
        rows = read_rows(self.log_file)  # a resume repeats some of them
        others = [old for old in rows if any(old.get(k) != row.get(k) for k in keys)]
        write_jsonl(self.log_file, [*others, row])


def read_inputs(run):
    """The rows of training instructions, shuffled, and of held-out ones."""
    path = run.options.instructions
    rows = {row["instruction"]: row for row in sample.read_instructions(path)}
    held_out = sample.read_instructions(run.options.validation)
    needed = run.options.iterations * run.options.prompts_per_iteration
    if len(rows) < needed:
        raise InputError(f"{path}: {len(rows)} different instructions, {needed} are needed")
    both = rows.keys() & {row["instruction"] for row in held_out}
    if both:  # the best epoch would be the one that learned them
        raise InputError(f"{path}: {len(both)} are in --validation too, as {min(both)!r:.60}")
    rows = list(rows.values())  # each instruction once (3.1)
    order = random_stream(run.sampling.seed, "instructions").permutation(len(rows))
    return [rows[i] for i in order[:needed]], held_out


def plan_training(run, rows, held_out):
    """Tries the longest possible chat and pair: a lack of room shows at once."""
    if run.logged("plan", 0):  # a resumed run has its micro-batches: they decide how sums round
        return
    config = read_config(run.seed_model)
    shared = (load_tokenizer(run.seed_model), run.sampling.thought, config)
    prompts = sample.make_prompts(rows, *shared, run.options.instructions)
    prompts += sample.make_prompts(held_out, *shared, run.options.validation)
    ids = [row["prompt_ids"] for row in prompts]

    def most_tokens(prompt):  # of an output; it ends where the context is full
        return min(run.sampling.max_new_tokens, config.max_position_embeddings - len(prompt))

    longest = max(ids, key=lambda prompt: len(prompt) + 2 * most_tokens(prompt))
    output = [0] * most_tokens(longest)  # any ids
    texts = [row["instruction"] for row in prompts]
    judging.empty_judge(run.judge_folder).check_context(texts, map(most_tokens, ids))
    pair = dpo.Pair("the longest possible pair", longest, output, output)
    fitted = dpo.fit_options(run.load(load_model, run.seed_model), pair, run.dpo)
    run.log({"stage": "plan", "iteration": 0, "dpo": asdict(fitted)})


def lock(folder):
    """Keeps a second process off a run while the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows has no fcntl: nothing is locked there
    except OSError:
        raise InputError(f"{folder}: another process is at work on this run") from None
    return file


def check_same_run(run):
    """Refuses a folder of other options or files; a new one gets options.json."""
    skip = ("output", "recipe", "report")  # no result depends on them
    values = {name: value for name, value in vars(run.args).items() if name not in skip}
    paths = (run.seed_model, run.judge_folder, run.options.instructions, run.options.validation)
    for name, path in zip(PATHS, paths, strict=True):  # equal names, other contents
        values[f"{name}_sha256"] = hash_of(Path(path))
    path = run.folder / "options.json"
    run.log_file.touch()  # so that it can be read from here on
    if not run.logged("plan", 0):  # nothing is done yet: other options may be what helps
        write_json(path, values)
    before = read_json(path)
    for name in {**before, **values}:
        if before.get(name) != values.get(name):
            change = f"{name} was {before.get(name)!r} and is {values.get(name)!r}"
            raise InputError(f"{path}: {change}: the same again, or another --output")


@dataclass
class Options:
    """The loop's own options; sample.py, judge.py and dpo.py add theirs."""

    model: str = option(None, "the seed M_0: checkpoint folder or hub id")
    judge: str = option(None, "the judge: checkpoint folder or hub id")
    instructions: str = option(None, "file of training instructions")
    validation: str = option(None, "file of held-out instructions")
    output: str = option(None, "the run's folder (default: runs/ and the thought's style)")
    iterations: int = option(4, "rounds of sampling and DPO; paper: up to 4", low=1)
    prompts_per_iteration: int = option(5000, "fresh instructions; paper 3.1", low=1)
    rho: judging.number_or_auto = option("auto", judging.RHO_HELP)
    reject_failed: bool = option(True, judging.FAILED_HELP)
    resample: int = option(3, "more tries without a response, at evaluation; ours", low=0)
    seed: int = option(0, "names every random stream of the run", low=0)


PATHS = ("model", "judge", "instructions", "validation")


def read_recipe(path, names):
    """The flags of a recipe, a JSON object; paths may be relative to its folder."""
    flags = []
    for name, value in read_json(path).items():
        if name not in names:
            raise InputError(f"{path}: {name!r} is not an option of train.py")
        flag = name.replace("_", "-")
        if name in PATHS and (Path(path).parent / str(value)).exists():
            value = Path(path).parent / value  # else a hub id
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags.append(f"--{flag}={value}")
    return flags


def main():
    # Of equal names the first counts: the loop's --seed and --resample.
    classes = (Options, sample.Options, dpo.Options, Device)
    parser = make_parser("Thought Preference Optimization.", *classes)
    add = parser.add_argument
    add("--recipe", help="JSON object of options (default: the toy world's)")
    add("--report", nargs="+", metavar="RUN", help="show finished runs and stop")
    args = parser.parse_args()
    if args.report:
        for folder in args.report:
            print(f"{folder}\n{report(read_rows(Path(folder, 'log.jsonl')))}\n")
        return
    if not (args.recipe or args.model):
        args.recipe = Path(__file__).parent / "tests" / "toy" / "recipe.json"
    if args.recipe:  # the command line comes last, and so wins
        args = parser.parse_args([*read_recipe(args.recipe, vars(args)), *sys.argv[1:]])
    run = Run(args)
    rows, held_out = read_inputs(run)
    options = run.options
    size = f"K = {run.sampling.num_samples} outputs to {options.prompts_per_iteration:,}"
    print(f"{options.iterations} iterations on {run.device.device}: {size} instructions")
    print(f"seed {options.model}\njudge {options.judge}\nrun {run.folder}")
    with lock(run.folder):
        check_same_run(run)
        plan_training(run, rows, held_out)
        tpo(run, rows, held_out)
    print()
    print_example(run)
    print(f"\n{report(read_rows(run.log_file))}")
    last = f"{run.policy(options.iterations)} --thought {run.sampling.thought}"
    print(f"python sample.py --model {last} --show-thought")


if __name__ == "__main__":
    run_main(main, resumes=True)
