"""Seconds an epoch and peak memory of DPO, beside TRL's DPOTrainer on the same ids.

9.6M parameters, 16 pairs, 8 a step, float32; references computed before, checkpointing on. Each
side runs in a process of its own, in turn. On real weights (--model): ours alone, 8 pairs. Run by
`python tests/benchmarks dpo`; --texts FILE gives it real texts.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench  # puts the project on sys.path

# isort: split
import dpo
import model as lm

import numpy as np
import torch
from conftest import LLAMA, write_checkpoint, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

CONFIG = LLAMA | {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
}
SMALL = LLAMA | {"vocab_size": 500}
CHARACTERS = 700  # most of a response
BATCH, EPOCHS = 8, 4  # the first epoch warms up and is not counted
SPECIAL = ["</s>", "<unk>", "<s>"]
PARTS = ("prompt", "chosen", "rejected")


def draw_pairs(count, vocab, prompt, output, seed=0):
    """Random ids with lengths like those of real texts, the special ones left out."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, vocab, rng.integers(low, high + 1)).tolist()

    low = (output * 3) // 4
    return [
        dpo.Pair(str(i), ids(prompt // 4 + 1, prompt), ids(low, output), ids(low, output))
        for i in range(count)
    ]


def read_texts(path, count, vocab):
    """Pairs of an instruction and its first two responses, by a BPE trained on all of them."""
    rows = [row for _, row in lm.read_jsonl(path)]
    texts = [[text for text in row.values() if isinstance(text, str)] for row in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for row in texts for text in row], trainer)
    return [
        dpo.Pair(str(i), *(tokenizer.encode(text[:CHARACTERS]).ids for text in row[:3]))
        for i, row in enumerate(texts[:count])
    ]


def write_case(folder, pairs, config):
    """A checkpoint whose every token is a word, so that TRL's tokenizer gives back these ids."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), config["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(w, special=True) for w in SPECIAL])
    write_tokenizer(folder, tokenizer, bos="<s>", eos="</s>", stops=("</s>",))
    write_checkpoint(folder, config | {"eos_token_id": 0, "bos_token_id": 2, "pad_token_id": 1})
    rows = []
    for pair in pairs:
        sides = (pair.prompt_ids, [*pair.chosen_ids, 0], [*pair.rejected_ids, 0])
        row = {}
        for part, ids in zip(PARTS, sides, strict=True):
            text = " ".join(words[i] for i in ids)
            row |= {f"{part}_ids": ids, part: text if part == "prompt" else f" {text}"}
        rows.append(row)
    lm.write_jsonl(folder / "pairs.jsonl", rows)


def train_ours(folder, log, end_of_epoch):
    model = lm.load_model(folder)
    pairs = dpo.read_pairs(folder / "pairs.jsonl", model.config)
    options = dpo.Options(epochs=EPOCHS, batch_size=BATCH)
    options = dpo.fit_options(model, max(pairs, key=lambda pair: pair.num_tokens), options)
    dpo.train(model, pairs, options, log=log, end_of_epoch=end_of_epoch)


def train_trl(folder, log, end_of_epoch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                log(logs)

        def on_epoch_end(self, *args, **kwargs):
            end_of_epoch()

    rows = [row for _, row in lm.read_jsonl(folder / "pairs.jsonl")]
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=dpo.Options.lr,
        adam_beta2=dpo.Options.adam_beta2,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=True,
        gradient_checkpointing=True,
        max_length=None,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([{part: row[part] for part in PARTS} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<unk>"),
        callbacks=[Watch()],
    )
    for row, ours in zip(trainer.train_dataset, rows, strict=True):
        assert all(row[f"{part}_ids"] == ours[f"{part}_ids"] for part in PARTS)
    trainer.train()


SIDES = {"ours": train_ours, "TRL": train_trl}


def child(side, folder, threads):
    """One side in this process; the last line printed is what it took."""
    torch.set_num_threads(int(threads))  # conftest, for the tests' sake, sets one
    marks, losses = [], []

    def end_of_epoch(*_):
        marks.append((time.perf_counter(), time.process_time()))

    SIDES[side](Path(folder), lambda record: losses.append(float(record["loss"])), end_of_epoch)
    wall, cpu = (np.diff(column).tolist() for column in zip(*marks, strict=True))
    peak = bench.peak_memory()
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "losses": losses}))


def run(args):
    return on_real_weights(args) if args.model else beside_trl(args)


def beside_trl(args):
    """Prints the table; returns the ratios to TRL."""
    config, count, output = (SMALL, 8, 40) if args.short else (CONFIG, 16, 250)
    if args.texts:
        pairs = read_texts(args.texts, count, config["vocab_size"])
    else:
        pairs = draw_pairs(count, config["vocab_size"], output // 4, output)
    sides = ["ours", *(["TRL"] if bench.installed("trl") else [])]
    tokens = sum(pair.num_tokens for pair in pairs)
    print(f"dpo: {count} pairs, {BATCH} a step, {tokens:,} tokens an epoch, prompts counted once")
    measured = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_case(Path(folder), pairs, config)
        for _ in range(1 if args.short else args.repeats):
            for side in sides:
                command = [sys.executable, __file__, side, folder, str(torch.get_num_threads())]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                measured[side].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {}
    for side, runs in measured.items():
        wall, cpu = ([x for one in runs for x in one[kind]] for kind in ("wall", "cpu"))
        rows[side] = statistics.median(wall), statistics.median(cpu), runs[0]["peak"]
        print(
            f"  {side:5} {bench.spread(wall, '.2f')} s an epoch, {rows[side][1]:.2f} s of "
            f"processor time, {tokens / rows[side][0]:,.0f} tokens/s, "
            f"peak {rows[side][2] / lm.GIB:.2f} GiB, last loss {runs[0]['losses'][-1]:.5f}"
        )
    if len(rows) < 2:
        return {}
    seconds, work, memory = (theirs / ours for ours, theirs in zip(*rows.values(), strict=True))
    print(f"  TRL takes {seconds:.2f} times as long, {work:.2f} times the processor time")
    names = ("TRL, seconds an epoch", "TRL, our share of its peak memory")
    return dict(zip(names, (seconds, 1 / memory), strict=True))


def on_real_weights(args):
    """Seconds and GiB of an epoch over 8 pairs of random ids, one step, in float32."""
    model = lm.load_model(args.model)
    sizes = (2, 8, 16) if args.short else (8, 64, 160)
    pairs = draw_pairs(sizes[0], model.config.vocab_size, *sizes[1:])
    options = dpo.Options(epochs=2, batch_size=sizes[0])
    options = dpo.fit_options(model, max(pairs, key=lambda pair: pair.num_tokens), options)
    marks = []
    dpo.train(model, pairs, options, end_of_epoch=lambda *_: marks.append(time.perf_counter()))
    seconds, tokens = marks[1] - marks[0], sum(pair.num_tokens for pair in pairs)
    print(
        f"dpo, {args.model}: an epoch of {len(pairs)} pairs, {tokens:,} tokens: {seconds:.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s, peak {bench.peak_memory() / lm.GIB:.2f} GiB"
    )
    return {}


if __name__ == "__main__":
    child(*sys.argv[1:])
