"""Thought Preference Optimization (Figure 1, section 2.2): the iterations.

M_0 is the seed. At iteration t, M_(t-1) writes K outputs, thought and response, for each of some
fresh instructions; a judge scores the responses and never sees a thought; the best and the worst
output of an instruction become a pair; DPO on the pairs gives M_t. Only one model is on the device
at a time: the policy, then the judge, then the policy again.

A run's folder holds options.json, log.jsonl and, for each iteration, samples.jsonl, scores.jsonl,
pairs.jsonl and checkpoint/. The same command resumes it.

    python train.py                           # the toy world of tests/toy, in minutes
    python train.py --model DIR --judge DIR --instructions FILE --validation FILE
    python train.py --report runs/a runs/b    # finished runs side by side
"""

import fcntl
import gc
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dpo
import judge as judging
import model as lm
import sample

import torch


def tpo(run, rows, held_out):
    """All iterations; the numbers are the README's steps. A stage that is in the log is done."""
    validate_seed(run, held_out)
    n, last = run.options.prompts_per_iteration, run.options.iterations
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
    model, path = run.load(run.policy_folder(t - 1)), run.file(t, "samples.jsonl")
    # No second try: what cannot be cut is to be rejected.
    write_samples(run, model, rows, path, "sampling", f"iteration-{t}", resample=0)
    outputs = [output for row in read(path) for output in row["outputs"]]
    tokens = sum(len(output["ids"]) for output in outputs)
    unparsed = mean([output["response"] is None for output in outputs])
    row = {"stage": "sample", "iteration": t, "tokens": tokens, "unparsed": unparsed}
    text = f"{len(outputs):,} outputs, {tokens:,} tokens; {unparsed:.1%} not cut"
    run.finish(row, "sampling", text)


def judge_outputs(run, t):
    """Scores of the responses, and the pairs of best and worst output."""
    if run.logged("judge", t):
        return
    scores, pairs = run.file(t, "scores.jsonl"), run.file(t, "pairs.jsonl")
    judging.score_file(run.load(), run.file(t, "samples.jsonl"), scores)
    made = judging.write_pairs(scores, pairs, run.options.rho, run.options.reject_failed)
    made |= {"stage": "judge", "iteration": t}
    run.finish(made, "judging", judging.PAIRS_TEXT.format(**made))


def train_policy(run, t):
    """DPO of M_(t-1) on the pairs; every epoch is saved."""
    if run.logged("train", t):
        return
    folder, source = run.file(t, ""), run.policy_folder(t - 1)
    pairs = dpo.read_pairs(folder / "pairs.jsonl", lm.read_config(source))

    def end_of_epoch(epoch, model):
        path = folder / f"epoch-{epoch}" / "checkpoint"
        if not path.exists():
            lm.save_model(model, path, source)

    def log(record):
        run.log({"stage": "dpo", "iteration": t, **record}, "step")

    options = replace(run.dpo, seed=f"{run.dpo.seed}/iteration-{t}")
    dpo.train(run.load(source), pairs, options, folder / "state", log, end_of_epoch)
    text = "{step} steps; the last: loss {loss:.2f}, accuracy {accuracy:.2f}, margin {margin:.2f}"
    text = text.format(**run.logged("dpo", t)[-1])
    run.finish({"stage": "train", "iteration": t}, "DPO", text)


def select_epoch(run, t, held_out):
    """Samples and judges the held-out instructions after every epoch; keeps the best (3.1)."""
    folder, done = run.file(t, ""), run.logged("validation", t)
    if not done:
        epochs = range(1, run.dpo.epochs + 1)
        paths = {epoch: folder / f"epoch-{epoch}" / "validation.jsonl" for epoch in epochs}
        for epoch, path in paths.items():
            model, label = run.load(path.with_name("checkpoint")), f"validation, epoch {epoch}"
            write_samples(run, model, held_out, path, label, "validation", num_samples=1)
            del model
        judge = run.load()
        for epoch, path in paths.items():
            row = validate(run, judge, path, t, run.sampling.thought)
            run.log({"stage": "epoch", "epoch": epoch, **row}, "epoch")
        rows = run.logged("epoch", t)
        # The first of equals; no score, where nothing could be cut, is below any score.
        kept = max(rows, key=lambda r: (r["win_rate"], r["score"] is not None, r["score"] or 0))
        kept = rows[-1] if run.options.select == "last" else kept
        text = f"epoch {kept['epoch']}: {figures(kept)}"
        run.finish({**kept, "stage": "validation"}, "validation", text)
    (kept,) = run.logged("validation", t)
    for path in list((folder / f"epoch-{kept['epoch']}").glob("*")):
        path.replace(folder / path.name)
    for path in [*folder.glob("epoch-*"), folder / "state"]:
        shutil.rmtree(path, ignore_errors=True)
    if not done:
        print(example(run, t))


def validate_seed(run, held_out):
    """The seed on held-out instructions, asked directly and, unless the style is none, to think.

    Every later win rate is against its direct responses. The longest possible pair is tried out
    first, so that a lack of memory shows before the long work.
    """
    styles = (run.sampling.thought, "none")
    paths = {style: run.file(0, f"validation-{style}.jsonl") for style in styles}
    if len(run.logged("validation", 0)) < len(paths):
        model = run.load(run.seed)
        if not run.logged("plan", 0):
            fitted = dpo.fit_options(model, run.longest_pair, run.dpo)
            run.log({"stage": "plan", "iteration": 0, "dpo": asdict(fitted)})
        for style, path in paths.items():
            changes = {"thought": style, "num_samples": 1}
            write_samples(run, model, held_out, path, f"seed, {style}", "validation", **changes)
        del model
        judge = run.load()
        for style, path in reversed(paths.items()):
            row = validate(run, judge, path, 0, style)
            hint = "another --thought, more --max-new-tokens, or a seed that follows instructions"
            lm.expect(row["unparsed_left"] < 1, path, "no output that can be cut", f"some: {hint}")
            run.log({"stage": "validation", **row}, "thought")
            print(f"seed, {'directly' if style == 'none' else 'to think'}: {figures(row)}")
        print(example(run, 0))
    run.dpo = dpo.Options(**run.logged("plan", 0)[0]["dpo"])


def write_samples(run, model, rows, path, label, name, **changes):
    """Samples `rows` into a file, with changed options; `name` names the random streams."""
    options = replace(run.sampling, seed=f"{run.sampling.seed}/{name}", **changes)
    sample.sample_file(model, lm.load_tokenizer(run.seed), rows, options, path, {}, name, label)


def validate(run, judge, path, t, style):
    """The figures of one file of validation samples, as log.jsonl holds them."""
    judged, scores = (path.with_name(f"{path.stem}-{name}.jsonl") for name in ("judged", "scores"))
    # The seed's direct output is judged beside ours, so that a pairwise judge can compare them.
    both = zip(read(path), read(run.file(0, "validation-none.jsonl")), strict=True)
    lm.write_jsonl(judged, ({**a, "outputs": a["outputs"] + b["outputs"]} for a, b in both))
    judging.score_file(judge, judged, scores)
    rows = read(scores)
    by_category = {
        name: measure([row for row in rows if row.get("category") == name])
        for name in sorted({row["category"] for row in rows if "category" in row})
    }
    return {"iteration": t, "thought": style, **measure(rows), "by_category": by_category}


def read(path):
    return [row for _, row in lm.read_jsonl(path)]


def measure(rows):
    """Figures of rows of scores: of each first output, beside the second, the seed's."""
    outputs = [row["outputs"][0] for row in rows]
    scores = ([row["outputs"][i]["score"] for row in rows] for i in (0, 1))
    rate, *interval = judging.win_rate(*scores)
    right = [is_right(row) for row in rows if "answer" in row]
    cut = [output for output in outputs if output["response"] is not None]
    return {
        "count": len(outputs),
        "score": mean([output["score"] for output in cut]),
        "win_rate": rate,
        "win_rate_interval": interval,
        "exact_match": mean(right),
        "exact_match_interval": judging.wilson_interval(mean(right), len(right)) if right else None,
        "unparsed": mean([o["response"] is None or o["tries"] > 1 for o in outputs]),  # first try
        "unparsed_left": 1 - len(cut) / len(outputs),  # after the last try
        "thought_tokens": mean([output["thought_tokens"] for output in cut]),
        "response_tokens": mean([output["response_tokens"] for output in cut]),
    }


def mean(values):
    return sum(values) / len(values) if values else None


def is_right(row):
    return "answer" in row and exact_match(row["outputs"][0]["response"], row["answer"])


def exact_match(response, answer):
    """Whether a response gives the known answer; of a number, whether it is the last number.

    >>> exact_match("The answer is Paris. Enjoy!", "paris"), exact_match("$1,200", "#### 1200")
    (True, True)
    """
    if response is None:
        return False
    given, wanted = final_answer(response), final_answer(str(answer))
    number = r"-?\d[\d,]*(?:\.\d+)?"
    numbers = re.findall(number, given)
    if numbers and re.fullmatch(number, wanted):
        given, wanted = (float(text.replace(",", "")) for text in (numbers[-1], wanted))
    return given == wanted


def final_answer(text):
    """The sentence behind the last mark, or the whole text without one; case and spaces folded."""
    for mark in ("####", "answer is"):  # GSM8K's mark, and plain words
        _, found, after = text.rpartition(mark)
        if found:
            text = re.split(r"[.!?](?:\s|$)|\n", after.strip(" :\n"), maxsplit=1)[0]
    return " ".join(text.casefold().split()).strip(" :.")


def figures(row):
    """As in "exact match 70.2%, win rate 50.0%"; without answers the win rate alone."""
    names = [key for key in ("exact_match", "win_rate") if row[key] is not None]
    return ", ".join(f"{key.replace('_', ' ')} {percent(row, key)}" for key in names)


def percent(row, key):
    """As in 70.2%, or 70.2% (66 to 74) where the row has a 95% interval too."""
    text = "-" if row[key] is None else f"{row[key]:.1%}"
    interval = row.get(f"{key}_interval")
    return f"{text} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})" if interval else text


def report(rows, by_category=False):
    """The paper's table for the validation rows of a log; lengths are in tokens."""
    rows = [row for row in rows if row["stage"] == "validation"]
    table = [["", "exact match", "win rate", "not cut", "thought", "response"]]
    for row in rows:
        seed = "seed, directly" if row["thought"] == "none" else "seed, to think"
        name = f"iteration {row['iteration']}" if row["iteration"] else seed
        shares = [percent(row, key) for key in ("exact_match", "win_rate", "unparsed")]
        lengths = (row["thought_tokens"], row["response_tokens"])
        lengths = ["-" if length is None else f"{length:.1f}" for length in lengths]
        table.append([name, *shares, *lengths])
    text, categories = aligned(table), sorted({name for row in rows for name in row["by_category"]})
    if by_category and categories:
        table = [["exact match", *(line[0] for line in table[1:])]]
        for category in categories:
            parts = [row["by_category"][category] for row in rows]
            table.append([category, *(percent(part, "exact_match") for part in parts)])
        text += "\n\n" + aligned(table)
    return text


def aligned(table):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def example(run, t):
    """How M_t answers the first held-out instruction that the seed got wrong; thought dimmed."""
    seed = read(run.file(0, f"validation-{run.sampling.thought}-scores.jsonl"))
    i = next((i for i, row in enumerate(seed) if not is_right(row)), 0)
    row = read(run.file(t, "validation-scores.jsonl"))[i] if t else seed[i]
    asked = "" if t else f"    {one_line(row['instruction'])}\n"
    name = f"iteration {t}" if t else "seed"
    name += (", right" if is_right(row) else ", wrong") if "answer" in row else ""
    output = row["outputs"][0]
    thought = output["text"] if output["response"] is None else output["thought"]
    thought, response = (one_line(text or "") for text in (thought, output["response"]))
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    texts = filter(None, (thought and f"{dim}{thought}{plain}", response))
    return asked + (f"    {name:20}" + f"\n{'':24}".join(texts)).rstrip()


def one_line(text):
    """A text as a line of the terminal, without the control characters that a model may write."""
    width = shutil.get_terminal_size().columns - 24
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 4].rstrip() + " ..."


class Run:
    """A run's folder, its options, and its log; what every stage is handed."""

    def __init__(self, args):
        self.args = args
        parts = (lm.options_of(part, args) for part in ALL_OPTIONS)
        self.options, self.sampling, self.dpo, self.device = parts
        for name in PATHS:
            lm.expect(getattr(args, name) is not None, f"--{name}", "none", "a path")
        self.folder = Path(self.options.output or f"runs/{self.sampling.thought}")
        self.seed = lm.checkpoint_folder(self.options.model)
        self.judge = lm.checkpoint_folder(self.options.judge)

    def file(self, t, name):
        """A file of iteration t; its folder is made."""
        folder = self.folder / f"iteration-{t}"
        folder.mkdir(exist_ok=True)
        return folder / name

    def policy_folder(self, t):
        """The folder of M_t: the seed, or what iteration t trained."""
        return self.file(t, "checkpoint") if t else self.seed

    def load(self, policy=None):
        """The policy in a checkpoint folder, or without one the judge."""
        gc.collect()  # the memory of the model before goes back to the device
        torch.cuda.empty_cache()
        where = (self.device.device, lm.DTYPES[self.device.dtype])
        if policy is None:
            return judging.load_judge(self.judge, *where)
        return lm.load_model(policy, *where)

    def log(self, row, *keys):
        """Adds a row to log.jsonl, in place of one of the same stage, iteration and keys."""
        keys = ("stage", "iteration", *keys)
        kept = [old for old in self.log_rows if any(old.get(k) != row.get(k) for k in keys)]
        self.log_rows = [*kept, row]
        lm.write_jsonl(self.folder / "log.jsonl", self.log_rows)

    def finish(self, row, name, text):
        """Logs the end of a stage and says it."""
        self.log(row)
        print(f"  {name:12}{text}")

    def logged(self, stage, t):
        """The log's rows of a stage of iteration t."""
        return [r for r in self.log_rows if (r["stage"], r["iteration"]) == (stage, t)]


def begin(run):
    """Locks the run's folder, checks all inputs, and returns training and validation rows."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock = open(run.folder / "lock", "w")  # noqa: SIM115  # held as long as the process lives
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise lm.InputError(f"{run.folder}: another process is at work on this run") from None
    options, file = run.options, run.options.instructions
    rows = {row["instruction"]: row for row in sample.read_instructions(file)}
    rows = list(rows.values())  # no instruction is used twice (3.1)
    held_out = sample.read_instructions(options.validation)
    wanted = options.iterations * options.prompts_per_iteration
    lm.expect(len(rows) >= wanted, file, f"{len(rows)} different instructions", f"{wanted} in all")
    both = {row["instruction"] for row in rows} & {row["instruction"] for row in held_out}
    lm.expect(not both, file, f"{len(both)} of --validation: {sorted(both)}"[:80], "other ones")
    files = (run.seed, run.judge, Path(file), Path(options.validation))
    hashes = {f"{name}_sha256": lm.hash_of(path) for name, path in zip(PATHS, files, strict=True)}
    values = vars(run.args) | hashes
    for name in ("output", "recipe", "report"):  # the folder may be moved
        del values[name]
    begun, log = run.folder / "options.json", run.folder / "log.jsonl"
    if not begun.exists():
        lm.write_json(begun, values)
    found = lm.read_json(begun)
    for name in {**found, **values}:
        what, now = f"{begun}: {name}", f"{values.get(name)!r} of the command, or another --output"
        lm.expect(found.get(name) == values.get(name), what, repr(found.get(name)), now)
    run.log_rows = read(log) if log.exists() else []
    tokenizer, config = lm.load_tokenizer(run.seed), lm.read_config(run.seed)
    prompts = []
    for path, part in ((file, rows), (options.validation, held_out)):
        prompts += sample.make_prompts(part, tokenizer, run.sampling.thought, config, path)
    longest = max((row["prompt_ids"] for row in prompts), key=len)
    output = [0] * min(run.sampling.max_new_tokens, config.max_position_embeddings - len(longest))
    run.longest_pair = dpo.Pair("the longest possible pair", longest, output, output)
    order = lm.stream(run.sampling.seed, "instructions").permutation(len(rows))
    return [rows[i] for i in order], held_out


@dataclass
class Options:
    """The loop's own options; sample.py, judge.py and dpo.py add theirs."""

    model: str = lm.option(None, "the seed M_0: checkpoint folder or hub id")
    judge: str = lm.option(None, "the judge: checkpoint folder or hub id")
    instructions: str = lm.option(None, "file of training instructions")
    validation: str = lm.option(None, "file of held-out instructions")
    output: str = lm.option(None, "the run's folder; ours: runs/ and the thought's style")
    iterations: int = lm.option(4, "rounds of sampling and DPO; paper: up to 4", low=1)
    prompts_per_iteration: int = lm.option(5000, "fresh instructions; paper 3.1", low=1)
    rho: judging.number_or_auto = lm.option("auto", judging.RHO_HELP)
    reject_failed: bool = lm.option(True, judging.FAILED_HELP)
    select: str = lm.option("best", "kept epoch; paper 3.1: the best", choices=("best", "last"))
    keep: str = lm.option("all", "checkpoints to keep; ours", choices=("all", "last"))


PATHS = ("model", "judge", "instructions", "validation")
ALL_OPTIONS = (Options, sample.Options, dpo.Options, lm.Device)


def read_recipe(path, names):
    """The flags of a recipe, a JSON object; a path in it may be relative to its own folder."""
    flags = []
    for name, value in lm.read_json(path).items():
        lm.expect(name in names, path, f"{name!r}, which is not an option", "options of train.py")
        flag = name.replace("_", "-")
        if name in PATHS and (Path(path).parent / str(value)).exists():
            value = Path(path).parent / value
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else []
        flags += [f"--{flag}={value}"] if not isinstance(value, bool | None) else []
    return flags


def main():
    parser = lm.make_parser("Thought Preference Optimization.", *ALL_OPTIONS)
    parser.add_argument("--recipe", help="JSON object of options (default: the toy world's)")
    parser.add_argument("--report", nargs="+", metavar="RUN", help="show finished runs and stop")
    parser.set_defaults(resample=sample.EVALUATION["resample"])
    args = parser.parse_args()
    if args.report:
        for folder in args.report:
            print(f"{folder}\n\n{report(read(Path(folder) / 'log.jsonl'), by_category=True)}\n")
        return
    if not (args.recipe or args.model):
        args.recipe = Path(__file__).parent / "tests" / "toy" / "recipe.json"
    if args.recipe:  # flags come last, and so win
        args = parser.parse_args([*read_recipe(args.recipe, vars(args)), *sys.argv[1:]])
    run = Run(args)
    rows, held_out = begin(run)
    options, n = run.options, run.options.prompts_per_iteration
    what = f"{options.iterations} iterations on {run.device.device}: K = {run.sampling.num_samples}"
    print(f"{what} outputs to {n:,} instructions, a judge, then DPO")
    print(f"seed {options.model}\njudge {options.judge}\nrun {run.folder}")
    tpo(run, rows, held_out)
    print("\n" + report(run.log_rows))
    print(f"python sample.py --model {run.policy_folder(options.iterations)} --show-thought")


if __name__ == "__main__":
    lm.run_main(main)
