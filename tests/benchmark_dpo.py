"""Seconds an epoch and peak memory of DPO, against TRL's DPOTrainer on the same ids.

On the CPU (width 256, 6 layers, 16 pairs, 8 a step) each side runs in a process
of its own, in turn: float32, references computed before, every block but our last recomputed. TRL
is left out where it is not installed. With --shape or on a GPU, ours alone, in this process.

    python tests/benchmark_dpo.py --texts FILE       # JSON lines: an instruction, and responses
    python tests/benchmark_dpo.py --shape llama-3-8b --device cuda --dtype bfloat16
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from conftest import LLAMA, write_checkpoint, write_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

import dpo
import model

CONFIG = LLAMA | {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
}
CHARACTERS = 700  # most of a response
BATCH, EPOCHS = 8, 4  # the first epoch warms up and is not counted
LENGTHS = (200, 2048)  # of a prompt and of an output, at a public size
SPECIAL = ["</s>", "<unk>", "<s>"]


def draw_pairs(count, vocab, prompt, output, seed=0):
    """Random ids with lengths like those of real texts, the special ones left out."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, vocab, rng.integers(low, high)).tolist()

    low = (output * 3) // 4
    return [
        dpo.Pair(str(i), ids(prompt // 4 + 1, prompt + 1), ids(low, output), ids(low, output))
        for i in range(count)
    ]


def read_texts(path, count, vocab):
    """Pairs of an instruction and its first two responses, by a BPE trained on all of them."""
    rows = [row for _, row in model.read_jsonl(path)]
    texts = [[text for text in row.values() if isinstance(text, str)] for row in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([text for row in texts for text in row], trainer)
    pairs = []
    for i, row in enumerate(texts[:count]):
        ids = [tokenizer.encode(text[:CHARACTERS]).ids for text in row[:3]]
        pairs.append(dpo.Pair(str(i), *ids))
    return pairs


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
        for side, ids in zip(dpo.SIDES, sides, strict=True):
            text = " ".join(words[i] for i in ids)
            row |= {f"{side}_ids": ids, side: text if side == "prompt" else f" {text}"}
        rows.append(row)
    model.write_jsonl(folder / "pairs.jsonl", rows)


def train_ours(folder, log, end_of_epoch):
    llm = model.load_model(folder)
    tokenizer = model.load_tokenizer(folder)
    pairs = dpo.read_pairs(folder / "pairs.jsonl", tokenizer, llm.config)
    options = dpo.Options(epochs=EPOCHS, batch_size=BATCH)
    dpo.train(llm, pairs, options, log=log, end_of_epoch=end_of_epoch)


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

    rows = [row for _, row in model.read_jsonl(folder / "pairs.jsonl")]
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
        train_dataset=Dataset.from_list([{side: row[side] for side in dpo.SIDES} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(folder, pad_token="<unk>"),
        callbacks=[Watch()],
    )
    for row, ours in zip(trainer.train_dataset, rows, strict=True):
        assert all(row[f"{side}_ids"] == ours[f"{side}_ids"] for side in dpo.SIDES)
    trainer.train()


SIDES = {"ours": train_ours, "TRL": train_trl}


def child(side, folder):
    """One side in this process; the last line printed is what it took."""
    torch.set_num_threads(os.cpu_count())  # conftest, for the tests' sake, sets one
    marks, losses = [], []

    def end_of_epoch(*_):
        marks.append((time.perf_counter(), time.process_time()))

    SIDES[side](Path(folder), lambda record: losses.append(float(record["loss"])), end_of_epoch)
    wall, cpu = (np.diff(column).tolist() for column in zip(*marks, strict=True))
    peak = dpo.peak_memory(torch.device("cpu"))
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "losses": losses}))


def compare(args):
    config, count, output = CONFIG, 16, 250
    if args.short:
        config, count, output = LLAMA | {"vocab_size": 500}, 8, 40
    if args.texts:
        pairs = read_texts(args.texts, count, config["vocab_size"])
    else:
        pairs = draw_pairs(count, config["vocab_size"], 20, output)
    sides = ["ours"]
    if importlib.util.find_spec("trl"):
        sides.append("TRL")
    else:
        print("trl is not installed: no peer")
    tokens = sum(map(len, pairs))
    print(f"dpo: {count} pairs, {BATCH} a step, {tokens:,} tokens an epoch, prompts counted once")
    measured = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_case(Path(folder), pairs, config)
        for _ in range(1 if args.short else args.repeats):
            for side in sides:
                words = [sys.executable, __file__, "--child", side, "--folder", folder]
                run = subprocess.run(words, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise SystemExit(run.stderr)
                measured[side].append(json.loads(run.stdout.splitlines()[-1]))
    rows = {}
    for side, runs in measured.items():
        wall, cpu = (sorted(x for run in runs for x in run[kind]) for kind in ("wall", "cpu"))
        rows[side] = statistics.median(wall), wall[0], statistics.median(cpu), runs[0]["peak"]
        middle, least, work, peak = rows[side]
        print(
            f"  {side:5} {middle:6.2f} s an epoch ({least:.2f} to {wall[-1]:.2f}), "
            f"{work:.2f} s of processor time, {tokens / middle:,.0f} tokens/s, "
            f"peak {peak / model.GIB:.2f} GiB, last loss {runs[0]['losses'][-1]:.5f}"
        )
    if len(rows) < 2:
        return {}
    time_ratio, least_ratio, work_ratio = (rows["TRL"][i] / rows["ours"][i] for i in range(3))
    memory_ratio = rows["ours"][3] / rows["TRL"][3]
    print(
        f"  TRL takes {time_ratio:.2f} times as long (fastest epochs {least_ratio:.2f}, "
        f"processor time {work_ratio:.2f}); our peak is {memory_ratio:.2f} of its"
    )
    return {"TRL, seconds an epoch": time_ratio, "TRL, our share of its peak memory": memory_ratio}


def at_a_public_size(args):
    """Ours alone: seconds, tokens a second, FLOP utilization and memory beside the estimate."""
    from benchmark import random_model

    device, dtype = torch.device(args.device), model.DTYPES[args.dtype]
    shape = args.shape or "llama-3-8b"
    prompt, output = (8, 30) if args.short else LENGTHS
    place = getattr(args, "optimizer_device", "same")
    options = dpo.Options(epochs=2, batch_size=4, optimizer_device=place)
    config = random_model(shape, "meta").config
    pairs = draw_pairs(8, config.vocab_size, prompt, output)
    estimate = dpo.check_memory(config, pairs, options, device, dtype)
    llm = random_model(shape, device, dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    phases = []
    watch_phases(phases, device)
    dpo.train(llm, pairs, options)
    count = sum(p.numel() for p in llm.parameters()) - llm.model.embed_tokens.weight.numel()
    tokens = sum(map(len, pairs[:4]))
    seconds = statistics.median(phases[1:])
    rate = matrix_rate(device, dtype)
    flops = 6 * count * tokens / seconds  # what is recomputed does not count as work done
    print(
        f"dpo, {shape}: {tokens / seconds:,.0f} tokens/s forward and backward, "
        f"{flops / 1e12:,.2f} TFLOP/s, {flops / rate:.0%} of the measured {rate / 1e12:,.2f}; "
        f"peak {dpo.peak_memory(device) / model.GIB:.2f} GiB, estimated {estimate / model.GIB:.2f}"
    )


def watch_phases(phases, device):
    """Notes the seconds of every batch's forward and backward passes."""
    add_gradient = dpo.add_gradient

    def watched(*args):
        began = time.perf_counter()
        record = add_gradient(*args)
        if device.type == "cuda":
            torch.cuda.synchronize()
        phases.append(time.perf_counter() - began)
        return record

    dpo.add_gradient = watched


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    x, best = torch.randn(size, size, device=device, dtype=dtype), 0.0
    for _ in range(10):
        began = time.perf_counter()
        (x @ x).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def run(args):
    """The table of tests/benchmark.py, whose args these are; returns the ratios to TRL."""
    if args.shape or args.device != "cpu":
        at_a_public_size(args)
        return {}
    return compare(args)


def main():
    parser = argparse.ArgumentParser(description="DPO beside TRL's DPOTrainer.")
    add = parser.add_argument
    add("--short", action="store_true", help="tiny sizes and one repeat, to see that it runs")
    add("--texts", help="JSON lines of an instruction and responses (default: random ids)")
    add("--repeats", type=int, default=3, help="processes of each side (default 3)")
    add("--shape", help="a public size of tests/benchmark.py, with random weights")
    add("--device", default="cpu", help="default cpu")
    add("--dtype", choices=model.DTYPES, default="float32", help="default float32")
    add("--optimizer-device", choices=("same", "cpu"), default="same", help="default same")
    add("--child", choices=SIDES, help="internal: one side, in this process")
    add("--folder", help="internal: the checkpoint and pairs of --child")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder)
    else:
        run(args)


if __name__ == "__main__":
    main()
