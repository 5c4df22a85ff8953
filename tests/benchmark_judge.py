"""Throughput of a pointwise judge against transformers on padded, length-sorted batches.

Both score 8 responses an instruction with the same 19M-parameter judge (random weights) on the
CPU, in turn, tokenization included. Medians of the rounds, in CPU time, which a busy machine
disturbs less than the clock. Needs transformers.

    python tests/benchmark_judge.py --responses FILE    # JSON lines: instruction, and texts beside
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from conftest import LLAMA, random_tensors, tensor_shapes, write_tokenizer
from make_judge_fixtures import LLAMA3_SPLIT
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import judge

CONFIG = LLAMA | {
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")


def read_items(path, instructions, responses):
    """(instruction, responses): an instruction's own texts, and its neighbours' to make enough."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    texts = [[v for k, v in row.items() if k != "instruction" and len(v) > 1] for row in rows]
    items = []
    for i, row in enumerate(rows[:instructions]):
        pool = [text for other in [*texts[i:], *texts[:i]] for text in other]
        items.append((row["instruction"], pool[:responses]))
    return items


def write_judge(folder, items):
    """The judge and a tokenizer trained on the texts themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[*SPECIAL, "<|eot_id|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for x, ys in items for text in (x, *ys)], trainer)
    write_tokenizer(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = random_tensors(tensor_shapes(CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"judge of {sum(t.numel() for t in tensors.values()) / 1e6:.1f}M parameters")
    return folder


def their_scores(model, tokenizer, items, batch_size):
    """Scores by transformers: all chats sorted by length, padded to the longest of a batch."""
    chats = []
    for instruction, responses in items:
        for response in responses:
            messages = [
                {"role": "user", "content": instruction},
                {"role": "assistant", "content": response},
            ]
            chats.append(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
    order = sorted(range(len(chats)), key=lambda i: len(chats[i]))
    scores = [0.0] * len(chats)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        inputs = tokenizer.pad({"input_ids": [chats[i] for i in batch]}, return_tensors="pt")
        with torch.inference_mode():
            found = model(**inputs, use_cache=False).logits[:, 0].tolist()
        for i, score in zip(batch, found, strict=True):
            scores[i] = score
    return scores, sum(map(len, chats))


def run(args):
    """Prints the table; returns how many times as long transformers' best takes as our best."""
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

    torch.set_num_threads(args.threads)
    items = read_items(args.responses, args.instructions, args.num_responses)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_judge(Path(scratch), items)
        ours = judge.load_judge(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<|pad|>")
        theirs = LlamaForSequenceClassification.from_pretrained(folder).eval()
    theirs.config.pad_token_id = tokenizer.pad_token_id
    times = {}
    for turn in range(args.rounds):
        runs = {f"transformers, {size} a batch": size for size in args.batch_sizes}
        runs |= {f"ours, {size} tokens a batch": -size for size in args.batch_tokens}
        for name, size in runs.items():
            start = time.process_time()
            if size > 0:
                expected, tokens = their_scores(theirs, tokenizer, items, size)
            else:
                ours.batch_tokens = -size
                batch = [("benchmark", *item) for item in items]
                found = [s for r in judge.score_batch(ours, batch) for s in r["scores"]]
            times.setdefault(name, []).append(time.process_time() - start)
            print(f"round {turn + 1}: {name}: {times[name][-1]:.2f} s", flush=True)
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True)) / max(map(abs, expected))
    print(f"{tokens} tokens, {len(expected)} scores, largest difference {worst:.1e} of the largest")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min(seconds for name, seconds in medians.items() if name.startswith("transformers"))
    for name, seconds in medians.items():
        print(f"{name:28} {tokens / seconds:8,.0f} tokens/s, {best / seconds:.2f} times theirs")
    ours = min(seconds for name, seconds in medians.items() if name.startswith("ours"))
    return {"transformers, best of 4, 8 and 16 a batch": best / ours}


def main():
    parser = argparse.ArgumentParser(description="A pointwise judge against transformers.")
    add = parser.add_argument
    add("--responses", required=True, help="JSON lines: `instruction`, every other field a text")
    add("--instructions", type=int, default=16)
    add("--num-responses", type=int, default=8)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--batch-sizes", type=int, nargs="+", default=[4, 8, 16], help="of transformers: sequences")
    add("--batch-tokens", type=int, nargs="+", default=[2048], help="of ours")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
