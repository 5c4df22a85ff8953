"""Thought Preference Optimization (Figure 1, section 2.2): the iterations.

M_0 is the seed. At iteration t, M_(t-1) writes K outputs, thought and response, for each of some
fresh instructions; a judge scores the responses and never sees a thought; the best and the worst
output of an instruction become a pair; DPO on the pairs gives M_t. Only one model is on the device
at a time: the policy, then the judge, then the policy again.

    python train.py                           # the toy world of tests/toy, in minutes
    python train.py --model DIR --judge DIR --instructions FILE --validation FILE
    python train.py --report runs/a runs/b    # finished runs side by side

A run's folder holds options.json, log.jsonl and, for each iteration, samples.jsonl, scores.jsonl,
pairs.jsonl and checkpoint/. The same command resumes it.
"""

import gc
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import dpo
import judge as judging
import sample
from model import (
    DTYPES,
    Device,
    InputError,
    checkpoint_folder,
    hash_of,
    load_model,
    load_tokenizer,
    make_parser,
    option,
    options_of,
    random_stream,
    read_config,
    read_json,
    read_jsonl,
    run_main,
    save_model,
    set_deterministic,
    write_json,
    write_jsonl,
)

import torch


def tpo(run, rows, held_out):
    """All iterations; the numbers are the README's steps. A stage that is in the log is done."""
    plan_training(run)
    validate_seed(run, held_out)
    n = run.options.prompts_per_iteration
    last = run.options.iterations
    for t in range(1, last + 1):
        if not run.logged("validation", t):
            print(f"iteration {t} of {last}")
        sample_outputs(run, t, rows[(t - 1) * n : t * n])  # 1. ask for a thought, 2. sample
        judge_outputs(run, t)  # 3. judge the responses, 4. control the length, 5. build the pairs
        train_policy(run, t)  # 6. train with DPO
        select_epoch(run, t, held_out)  # 7. keep the best epoch
        if run.options.keep == "last" and t > 1:
            shutil.rmtree(run.policy_folder(t - 1), ignore_errors=True)


def sample_outputs(run, t, rows):
    """K outputs of M_(t-1) for each fresh instruction."""
    if run.logged("sample", t):
        return
    path = run.file(t, "samples.jsonl")
    # No second try here: an output that cannot be parsed is to be rejected (draft 2.2).
    write_samples(
        run, run.policy_folder(t - 1), rows, path, "sampling", f"iteration-{t}", resample=0
    )
    outputs = [output for row in read_rows(path) for output in row["outputs"]]
    tokens = sum(len(output["ids"]) for output in outputs)
    unparsed = mean([not output["response"] for output in outputs])
    row = {"stage": "sample", "iteration": t, "tokens": tokens, "unparsed": unparsed}
    text = f"{len(outputs):,} outputs, {tokens:,} tokens; {unparsed:.1%} not parsed"
    run.finish(row, "sampling", text)


def judge_outputs(run, t):
    """Scores of the responses, and the pairs of best and worst output."""
    if run.logged("judge", t):
        return
    scores = run.file(t, "scores.jsonl")
    if not scores.exists():
        judging.score_file(run.load_judge(), run.file(t, "samples.jsonl"), scores)
    losses = judging.check_judging(scores)
    statistics = judging.write_pairs(
        scores, run.file(t, "pairs.jsonl"), run.options.rho, run.options.reject_failed
    )
    row = {"stage": "judge", "iteration": t, **losses, **statistics}
    run.finish(row, "judging", judging.describe_pairs(statistics))


def train_policy(run, t):
    """DPO of M_(t-1) on the pairs; every epoch is saved."""
    if run.logged("train", t):
        return
    folder = run.file(t, "")
    source = run.policy_folder(t - 1)
    pairs = dpo.read_pairs(folder / "pairs.jsonl", read_config(source))

    def end_of_epoch(epoch, model):
        path = folder / f"epoch-{epoch}" / "checkpoint"
        if not path.exists():
            save_model(model, path, source)

    def log(record):
        run.log({"stage": "dpo", "iteration": t, **record}, "step")

    options = replace(run.dpo, seed=f"{run.dpo.seed}/iteration-{t}")
    dpo.train(run.load_model(source), pairs, options, folder / "state", log, end_of_epoch)
    steps = run.logged("dpo", t)
    last_epoch = [row for row in steps if row["epoch"] == options.epochs]
    means = {
        name: sum(row[name] * row["pairs"] for row in last_epoch) / len(pairs)
        for name in ("loss", "accuracy", "margin")
    }
    text = (
        "{steps} steps; last epoch: loss {loss:.2f}, accuracy {accuracy:.2f}, margin {margin:.2f}"
    )
    text = text.format(steps=len(steps), **means)
    run.finish({"stage": "train", "iteration": t, **means}, "DPO", text)


def select_epoch(run, t, held_out):
    """Samples and judges the held-out instructions after every epoch; keeps the best (3.1)."""
    folder = run.file(t, "")
    is_done = bool(run.logged("validation", t))
    if not is_done:
        rows = validate_epochs(run, t, held_out)
        # The first of equals; no score, where nothing could be parsed, is below any score.
        best = max(rows, key=lambda r: (r["win_rate"], r["score"] is not None, r["score"] or 0))
        selected = rows[-1] if run.options.select == "last" else best
        text = f"epoch {selected['epoch']}: {figures(selected)}"
        run.finish({**selected, "stage": "validation"}, "validation", text)
    (selected,) = run.logged("validation", t)
    for path in list((folder / f"epoch-{selected['epoch']}").glob("*")):
        path.replace(folder / path.name)
    for path in [*folder.glob("epoch-*"), folder / "state"]:
        shutil.rmtree(path, ignore_errors=True)
    if not is_done:
        print(example(run, t))


def validate_epochs(run, t, held_out):
    """The figures of every epoch of iteration t, as rows of the log."""
    folder = run.file(t, "")
    epochs = range(1, run.dpo.epochs + 1)
    paths = {epoch: folder / f"epoch-{epoch}" / "validation.jsonl" for epoch in epochs}
    for epoch, path in paths.items():
        label = f"validation, epoch {epoch}"
        checkpoint = path.with_name("checkpoint")
        write_samples(run, checkpoint, held_out, path, label, "validation", num_samples=1)
    judge = run.load_judge()
    for epoch, path in paths.items():
        row = validate(run, judge, path, t, run.sampling.thought)
        run.log({"stage": "epoch", "epoch": epoch, **row}, "epoch")
    return run.logged("epoch", t)


def validate_seed(run, held_out):
    """The seed on held-out instructions, asked directly and, unless the style is none, to think.

    Every later win rate is against its direct responses.
    """
    styles = list(dict.fromkeys(["none", run.sampling.thought]))
    if len(run.logged("validation", 0)) == len(styles):
        return
    paths = {style: run.file(0, f"validation-{style}.jsonl") for style in styles}
    for style, path in reversed(paths.items()):  # thinking first: it is what may not work
        label = f"seed, {style}"
        changes = {"thought": style, "num_samples": 1}
        write_samples(run, run.seed, held_out, path, label, "validation", **changes)
    judge = run.load_judge()
    for style, path in paths.items():
        row = validate(run, judge, path, 0, style)
        if row["unparsed_left"] == 1:
            raise InputError(
                f"{path}: no output has the marker of --thought {style}; try another --thought, "
                "more --max-new-tokens, or a seed that follows instructions"
            )
        run.log({"stage": "validation", **row}, "thought")
        print(f"seed, {'directly' if style == 'none' else 'to think'}: {figures(row)}")
    print(example(run, 0))


def plan_training(run):
    """Tries out the longest possible pair: a lack of memory shows before the long work."""
    if not run.logged("plan", 0):
        fitted = dpo.fit_options(run.load_model(run.seed), run.longest_pair, run.dpo)
        run.log({"stage": "plan", "iteration": 0, "dpo": asdict(fitted)})
    run.dpo = dpo.Options(**run.logged("plan", 0)[0]["dpo"])


def write_samples(run, policy, rows, path, label, name, **changes):
    """Samples `rows` with a policy's checkpoint into a file, unless it is there.

    changes: of the run's options. name: names the random streams.
    """
    if path.exists():
        return
    options = replace(run.sampling, seed=f"{run.sampling.seed}/{name}", **changes)
    tokenizer = load_tokenizer(run.seed)
    sample.sample_file(run.load_model(policy), tokenizer, rows, options, path, {}, name, label)


def validate(run, judge, path, t, style):
    """The figures of one file of validation samples, as log.jsonl holds them."""
    judged = path.with_name(f"{path.stem}-judged.jsonl")
    scores = path.with_name(f"{path.stem}-scores.jsonl")
    if not scores.exists():
        # The seed's direct output stands beside ours, so that a pairwise judge can compare them.
        direct_rows = read_rows(run.file(0, "validation-none.jsonl"))
        both = zip(read_rows(path), direct_rows, strict=True)
        write_jsonl(judged, ({**a, "outputs": a["outputs"] + b["outputs"]} for a, b in both))
        judging.score_file(judge, judged, scores)
    if path.name != "validation-none.jsonl":  # the seed's direct responses beside themselves
        judging.check_judging(scores)
    rows = read_rows(scores)
    by_category = {}
    for name in sorted({row["category"] for row in rows if "category" in row}):
        by_category[name] = measure([row for row in rows if row.get("category") == name])
    return {"iteration": t, "thought": style, **measure(rows), "by_category": by_category}


def read_rows(path):
    return [row for _, row in read_jsonl(path)]


def measure(rows):
    """Figures of rows of scores: of each first output, beside the second, the seed's."""
    outputs = [row["outputs"][0] for row in rows]
    rate, *interval = judging.win_rate(
        [row["outputs"][0]["score"] for row in rows], [row["outputs"][1]["score"] for row in rows]
    )
    right = [is_right(row) for row in rows if "answer" in row]
    parsed = [output for output in outputs if output["response"]]
    scores = [output["score"] for output in parsed if output["score"] is not None]
    return {
        "count": len(outputs),
        "score": mean(scores),
        "win_rate": rate,
        "win_rate_interval": interval,
        "exact_match": mean(right),
        "exact_match_interval": judging.wilson_interval(mean(right), len(right)) if right else None,
        "unparsed": mean([not o["response"] or o["tries"] > 1 for o in outputs]),  # first try
        "unparsed_left": 1 - len(parsed) / len(outputs),  # after the last try
        "thought_tokens": mean([output["thought_tokens"] for output in parsed]),
        "response_tokens": mean([output["response_tokens"] for output in parsed]),
    }


def mean(values):
    return sum(values) / len(values) if values else None


def is_right(row):
    output = row["outputs"][0]
    finished = output.get("finished", True)
    return "answer" in row and exact_match(output["response"], row["answer"], finished)


def exact_match(response, answer, finished=True):
    r"""Whether a response gives the known answer; finished: whether it ended by itself.

    A known answer that is a number is compared as one; any other as text, the whole of it.

    >>> exact_match("The answer is Paris. Enjoy!", "paris"), exact_match("$1,200.00", "#### 1200")
    (True, True)
    >>> exact_match(r"The answer is \boxed{1{,}200}.", "1200"), exact_match("It is -$5.", "-5")
    (True, True)
    >>> exact_match("It is 70.", "7"), exact_match("The answer is room 5.", "room 15")
    (False, False)
    """
    if response is None:
        return False
    wanted = final_answer(str(answer))
    is_number = re.fullmatch(NUMBER, wanted) is not None
    given = final_answer(response, finished, is_number)
    if is_number and given is not None:
        given, wanted = value(given), value(wanted)
    return given == wanted


# What an answer stands behind. "#### Step 2" is a heading; "the answer is not 5" answers nothing.
MARK = re.compile(
    r"(?<!#)####(?!#)(?!\s*(?:step|part)\b)|\\boxed\{|\banswer\s+is\b(?!\s+not\b)", re.IGNORECASE
)
# How a question starts that a model makes up when it goes on after its answer.
QUESTION = re.compile(
    r"^[# \t]*(?:next |new )?(?:question|q|problem|exercise|instruction|human|user)[ \d.]*(?::|$)",
    re.IGNORECASE | re.MULTILINE,
)
SENTENCE_END = re.compile(r"[.!?](?:\s|$)|\n|####")
BOX = re.compile(r"((?:[^{}]|\{[^{}]*\})*)(\}?)")
# What only explains an answer: "18 (9 x 2)", "18, for 2 days", "18 because x = 9".
REMARK = re.compile(r"(?<=\w) \([^()]*\)?")
CLAUSE_END = re.compile(r"[,;](?!\d)|\b(?:because|since|where|when|if|as)\b", re.IGNORECASE)
SUM = re.compile(r"\d[^=\d]*[-+*/x\u00d7\u00f7]\s*\.?\d")  # "9 * 2": still to be worked out
NUMBER = (
    r"(?:(?<![\w)}])-)?"  # the minus of 10-5 is no sign
    r"(?:\d+/0*[1-9]\d*(?!\.?\d)"  # 3/4
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"  # 1,200 and 18.00
    r"|(?<!\.)\.\d+)"  # .5
)
INDEX = r"(?<=[\w)}])(?:\s?\^\s?|_)(?:\{[^{}]*\}|\([^()]*\)|-?\w+(?:\.\d+)?)"  # x^2, 10^{-3}, x_1


def final_answer(text, finished=True, number=False):
    r"""The answer that a text gives, case and spaces folded; None where it gives none.

    - Marks are "####", \boxed{} and the words "answer is"; the answer is what follows, up to the
      end of the sentence, the line or the box.
    - Where a number is asked for, a mark with no number behind it is none.
    - Marks in a question that the model made up afterwards ("Question: ...") do not count.
    - The first "####" counts, since a model is done there; else the last mark, since before it a
      model may correct itself.
    - Behind a mark the number is an equation's right side, else the first number.
    - Without a mark it is the last number that is no exponent and no index.
    - Where text is asked for and there is no mark, the whole text is the answer.
    - A text that was cut off answers only behind a mark, and only if the end of that sentence,
      line or box is there: "The answer is 18" might have become 180, or 18.50 after a full stop.

    >>> final_answer("The answer is 9 * 2 = $18 for 2 days.", number=True)
    '18'
    >>> final_answer("#### 18 (9 x 2)\n\nQuestion: What is 3 + 4?\n#### 7", number=True)
    '18'
    >>> final_answer("2 rooms of 3 m x 3 m have 18 m^2", number=True)
    '18'
    >>> final_answer("**The answer is:**\n\nParis, France!")
    'paris, france'
    >>> final_answer("The answer is 18. It", finished=False)
    '18'
    >>> final_answer("The answer is 18", finished=False)
    """
    text = plain(text)
    passages = [
        (mark, passage)
        for mark, passage, is_whole in marked_passages(text)
        if (numbers(passage) if number else passage) and (finished or is_whole)
    ]
    if not passages and not finished:
        return None
    if not number:
        return fold(choose(passages) if passages else text)
    found = numbers(right_side(choose(passages)))[:1] if passages else numbers(text)[-1:]
    return found[0] if found else None


def plain(text):
    r"""A text without what only dresses an answer: emphasis, LaTeX, "$" and "%".

    >>> plain(r"**\boxed{-\$1{,}200\text{ a day}}** or \(\frac{3}{4}\)")
    '\\boxed{-1,200 a day} or 3/4'
    """
    text = text.replace("\u2212", "-").replace("{,}", ",")
    text = re.sub(r"(?<=[\w)])\*\*(?=[\d.,]+(?![\d.,]|\*\*))", "^", text)  # 10**3, no emphasis
    text = re.sub(r"\*\*|__", "", text)
    text = re.sub(r"\\(?:text|math)\w*\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\{?(-?\d+)\}?\{?(\d+)\}?", r"\1/\2", text)
    text = re.sub(r"\\(?:times|cdot|div)\b", "*", text)
    text = re.sub(r"\\[()\[\],;:! ]|\\(?=[$%#])", "", text)  # \(18\), 1\,200, \$18
    text = re.sub(r"-[$€£]\s?", "-", text)
    return re.sub(r"[$€£%]", "", text)


def marked_passages(text):
    """(mark, what follows it, whether the end of that is there) for each mark of a text."""
    first = MARK.search(text)
    question = first and QUESTION.search(text, first.end())
    text = text[: question.start()] if question else text
    marks, outer = [*MARK.finditer(text), None], None
    for mark, following in pairwise(marks):
        after = text[mark.end() : following.end() if following else len(text)]
        if mark[0].endswith("{"):
            passage, end = BOX.match(after).groups()
        else:
            after = after.lstrip(" :`\n\t")
            found = SENTENCE_END.search(after)
            passage, end = (after[: found.start()], found[0]) if found else (after, "")
        name = outer or mark[0]
        # "#### The answer is 18" is what "####" gives, but the words before the 18 do not count.
        outer = name if following and not end else None
        if not outer:
            # A full stop with nothing behind it may be a decimal point.
            yield name, passage.strip(), end not in ("", ".", "!", "?")


def choose(passages):
    """Of (mark, what follows it): what follows the first "####", else the last."""
    return next((passage for mark, passage in passages if mark == "####"), passages[-1][1])


def right_side(passage):
    """The right side of an equation; of "18 = 9 * 2" the left, which is worked out."""
    clauses = [*CLAUSE_END.split(REMARK.sub("", passage)), passage]
    clause = next(clause for clause in clauses if numbers(clause))
    sides = [side for side in clause.split("=") if numbers(side)]
    return ([side for side in sides if not SUM.search(side)] or sides)[-1]


def numbers(text):
    """The numbers of a text as they are written, without exponents and indices."""
    return [number for number in re.findall(f"{INDEX}|({NUMBER})", text) if number]


def value(number):
    top, _, bottom = number.replace(",", "").partition("/")
    return float(top) / float(bottom or 1)


def fold(text):
    """Case and spaces folded; without the stops and colons around, but ".5" keeps its point."""
    text = " ".join(text.casefold().split())
    return re.sub(r"^(?:[ :`]|\.(?!\d))+|[ :.`]+$", "", text)


def figures(row):
    """As in "exact match 70.2%, win rate 50.0%"; without answers the win rate alone."""
    names = [key for key in ("exact_match", "win_rate") if row[key] is not None]
    return ", ".join(f"{key.replace('_', ' ')} {percent(row, key)}" for key in names)


def percent(row, key):
    """As in 70.2%, or 70.2% (66 to 74) where the row has a 95% interval too."""
    if row[key] is None:
        return "-"
    text = f"{row[key]:.1%}"
    interval = row.get(f"{key}_interval")
    if interval is None:
        return text
    low, high = interval
    return f"{text} ({100 * low:.0f} to {100 * high:.0f})"


def report(rows, by_category=False):
    """The paper's table for the validation rows of a log; lengths are in tokens."""
    rows = [row for row in rows if row["stage"] == "validation"]
    table = [["", "exact match", "win rate", "not parsed", "thought", "response"]]
    for row in rows:
        seed = "seed, directly" if row["thought"] == "none" else "seed, to think"
        name = f"iteration {row['iteration']}" if row["iteration"] else seed
        shares = [percent(row, key) for key in ("exact_match", "win_rate", "unparsed")]
        lengths = (row["thought_tokens"], row["response_tokens"])
        lengths = ["-" if length is None else f"{length:.1f}" for length in lengths]
        table.append([name, *shares, *lengths])
    text = aligned(table)
    categories = sorted({name for row in rows for name in row["by_category"]})
    if by_category and categories:
        names = [line[0] for line in table[1:]]
        table = [["exact match", *names]]
        for category in categories:
            parts = [row["by_category"][category] for row in rows]
            table.append([category, *(percent(part, "exact_match") for part in parts)])
        text += "\n\n" + aligned(table)
    return text


def aligned(table):
    """A table's rows as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def example(run, t):
    """How M_t answers the first held-out instruction that the seed got wrong; thought dimmed."""
    seed_rows = read_rows(run.file(0, f"validation-{run.sampling.thought}-scores.jsonl"))
    wrong = (i for i, row in enumerate(seed_rows) if not is_right(row))
    i = next(wrong, 0)
    row = read_rows(run.file(t, "validation-scores.jsonl"))[i] if t else seed_rows[i]
    name = f"iteration {t}" if t else "seed"
    if "answer" in row:
        name += ", right" if is_right(row) else ", wrong"
    output = row["outputs"][0]
    thought = output["text"] if output["response"] is None else output["thought"]
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    thought = one_line(thought or "")
    response = one_line(output["response"] or "")
    lines = [f"{dim}{thought}{plain}"] if thought else []
    if response:
        lines.append(response)
    question = "" if t else f"    {one_line(row['instruction'])}\n"
    return question + (f"    {name:20}" + f"\n{'':24}".join(lines)).rstrip()


def one_line(text):
    """A text as a line of the terminal, without the control characters that a model may write."""
    width = shutil.get_terminal_size().columns - 24
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 4].rstrip() + " ..."


class Run:
    """A run's folder, its options, and its log; what every stage is handed."""

    def __init__(self, args):
        self.args = args
        self.options = options_of(Options, args)
        self.sampling = options_of(sample.Options, args)
        self.dpo = options_of(dpo.Options, args)
        self.device = options_of(Device, args)
        for name in PATHS:
            if getattr(args, name) is None:
                raise InputError(f"--{name} is missing: a path, or a recipe that has one")
        self.folder = Path(self.options.output or f"runs/{self.sampling.thought}")
        self.seed = checkpoint_folder(self.options.model)
        self.judge = checkpoint_folder(self.options.judge)
        self.log_rows = []
        self.longest_pair = None  # set by begin, which reads the instructions
        self.lock_file = None

    def file(self, t, name):
        """A file of iteration t; its folder is made."""
        folder = self.folder / f"iteration-{t}"
        folder.mkdir(exist_ok=True)
        return folder / name

    def policy_folder(self, t):
        """The folder of M_t: the seed, or what iteration t trained."""
        return self.file(t, "checkpoint") if t else self.seed

    def load_model(self, folder):
        free_memory()
        return load_model(folder, self.device.device, DTYPES[self.device.dtype])

    def load_judge(self):
        free_memory()
        return judging.load_judge(self.judge, self.device.device, DTYPES[self.device.dtype])

    def log(self, row, *keys):
        """Adds a row to log.jsonl, in place of one of the same stage, iteration and keys."""
        keys = ("stage", "iteration", *keys)
        others = [old for old in self.log_rows if any(old.get(k) != row.get(k) for k in keys)]
        self.log_rows = [*others, row]
        write_jsonl(self.folder / "log.jsonl", self.log_rows)

    def finish(self, row, name, text):
        """Logs the end of a stage and says it."""
        self.log(row)
        print(f"  {name:12}{text}")

    def logged(self, stage, t):
        """The log's rows of a stage of iteration t."""
        return [r for r in self.log_rows if (r["stage"], r["iteration"]) == (stage, t)]


def free_memory():
    """Gives the memory of the model before back to the device: the KV cache takes that room."""
    gc.collect()
    torch.cuda.empty_cache()


def begin(run):
    """Checks all inputs before the long work; returns training and validation rows."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock_file = lock(run.folder)
    rows, held_out = read_both(run.options)
    check_same_run(run)
    log = run.folder / "log.jsonl"
    run.log_rows = read_rows(log) if log.exists() else []
    longest = longest_prompt(run, rows, held_out)
    context = read_config(run.seed).max_position_embeddings
    output = [0] * min(run.sampling.max_new_tokens, context - len(longest))
    run.longest_pair = dpo.Pair("the longest possible pair", longest, output, output)
    instructions = [row["instruction"] for row in rows + held_out]
    judging.empty_judge(run.judge).check_context(instructions, len(output))
    order = random_stream(run.sampling.seed, "instructions").permutation(len(rows))
    return [rows[i] for i in order], held_out


def lock(folder):
    """Keeps a second process off the run, where the platform can; as long as the file is open."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return None
    file = open(folder / "lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{folder}: another process is at work on this run") from None
    return file


def read_both(options):
    """Training and held-out rows; refuses too few of the first, and any that is in both."""
    path = options.instructions
    distinct = {row["instruction"]: row for row in sample.read_instructions(path)}
    rows = list(distinct.values())  # no instruction is used twice (3.1)
    held_out = sample.read_instructions(options.validation)
    needed = options.iterations * options.prompts_per_iteration
    if len(rows) < needed:
        raise InputError(
            f"{path}: {len(rows)} different instructions, and {options.iterations} iterations of "
            f"{options.prompts_per_iteration} take {needed}"
        )
    both = distinct.keys() & {row["instruction"] for row in held_out}
    if both:
        raise InputError(
            f"{path}: {len(both)} of its instructions are in --validation too: {min(both)!r:.60}"
        )
    return rows, held_out


def check_same_run(run):
    """Refuses a folder that other options or other files began; writes options.json where new."""
    values = dict(vars(run.args))
    for name in ("output", "recipe", "report"):  # the folder may be moved
        del values[name]
    files = (run.seed, run.judge, Path(run.options.instructions), Path(run.options.validation))
    for name, path in zip(PATHS, files, strict=True):
        values[f"{name}_sha256"] = hash_of(path)
    path = run.folder / "options.json"
    if not path.exists():
        write_json(path, values)
    before = read_json(path)
    for name in {**before, **values}:
        if before.get(name) != values.get(name):
            raise InputError(
                f"{path}: {name} was {before.get(name)!r} and is {values.get(name)!r}: "
                "give the same again, or another --output"
            )


def longest_prompt(run, rows, held_out):
    """The ids of the longest prompt; refuses one that the policy's context cannot hold."""
    tokenizer = load_tokenizer(run.seed)
    config = read_config(run.seed)
    prompts = []
    for path, part in ((run.options.instructions, rows), (run.options.validation, held_out)):
        prompts += sample.make_prompts(part, tokenizer, run.sampling.thought, config, path)
    return max((row["prompt_ids"] for row in prompts), key=len)


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
    resample: int = option(3, "more tries for what has no response, at evaluation; ours", low=0)
    select: str = option("best", "which epoch; paper 3.1: the best", choices=("best", "last"))
    keep: str = option("all", "checkpoints to keep; ours", choices=("all", "last"))
    seed: int = option(0, "names every random stream of the run", low=0)


PATHS = ("model", "judge", "instructions", "validation")


def read_recipe(path, names):
    """The flags of a recipe, a JSON object; a path in it may be relative to its own folder."""
    flags = []
    for name, value in read_json(path).items():
        if name not in names:
            raise InputError(f"{path}: {name!r} is not an option of train.py")
        flag = "--" + name.replace("_", "-")
        if name in PATHS and (Path(path).parent / str(value)).exists():
            value = Path(path).parent / value
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags.append(f"{flag}={value}")
    return flags


def main():
    parser = make_parser(
        "Thought Preference Optimization.", Options, sample.Options, dpo.Options, Device
    )
    parser.add_argument("--recipe", help="JSON object of options (default: the toy world's)")
    parser.add_argument("--report", nargs="+", metavar="RUN", help="show finished runs and stop")
    args = parser.parse_args()
    if args.report:
        for folder in args.report:
            print(f"{folder}\n\n{report(read_rows(Path(folder, 'log.jsonl')), by_category=True)}\n")
        return
    if not (args.recipe or args.model):
        args.recipe = Path(__file__).parent / "tests" / "toy" / "recipe.json"
    if args.recipe:  # flags come last, and so win
        args = parser.parse_args([*read_recipe(args.recipe, vars(args)), *sys.argv[1:]])
    run = Run(args)
    set_deterministic(run.device)
    rows, held_out = begin(run)
    options = run.options
    print(
        f"{options.iterations} iterations on {run.device.device}: K = {run.sampling.num_samples} "
        f"outputs to {options.prompts_per_iteration:,} instructions, a judge, then DPO"
    )
    print(f"seed {options.model}\njudge {options.judge}\nrun {run.folder}")
    tpo(run, rows, held_out)
    print("\n" + report(run.log_rows))
    print(f"python sample.py --model {run.policy_folder(options.iterations)} --show-thought")


if __name__ == "__main__":
    run_main(main, resumes=True)
