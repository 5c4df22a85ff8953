"""Tokens a second of a pointwise judge, beside transformers on padded, length-sorted batches.

Both score 8 responses an instruction with the same 19M-parameter judge (random weights), in turn,
tokenization included. Medians in processor time on one thread, which a busy machine disturbs less
than the clock. Run by `python tests/benchmarks judge`; --texts FILE gives it real responses.
"""

import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import bench  # puts the project on sys.path

# isort: split
import judge
import model as lm

import numpy as np
import torch
from conftest import LLAMA, random_tensors, tensor_shapes, write_tokenizer
from make_judge_fixtures import LLAMA3_SPLIT
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
BATCHES = (4, 8, 16)  # of transformers: sequences


def read_items(path, count, responses):
    """(instruction, responses): an instruction's own texts, and its neighbours' to make enough."""
    rows = [row for _, row in lm.read_jsonl(path)]
    texts = [[v for k, v in row.items() if k != "instruction" and len(v) > 1] for row in rows]
    items = []
    for i, row in enumerate(rows[:count]):
        pool = [text for other in [*texts[i:], *texts[:i]] for text in other]
        items.append((row["instruction"], pool[:responses]))
    return items


def draw_items(count, responses, longest):
    """Random words, of unequal lengths as real responses are."""
    rng = np.random.default_rng(0)
    letters = "etaoinshrdlucmfwypvbgk"
    known = ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(3000)]

    def text(most):
        return " ".join(rng.choice(known, rng.integers(most // 10 + 1, most)))

    return [(text(longest // 8), [text(longest) for _ in range(responses)]) for _ in range(count)]


def write_judge(folder, items, config):
    """The judge and a tokenizer trained on the texts themselves."""
    tokenizer = Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"],
        special_tokens=[*SPECIAL, "<|eot_id|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for x, ys in items for text in (x, *ys)], trainer)
    write_tokenizer(folder, tokenizer)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(tensor_shapes(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"judge of {sum(t.numel() for t in tensors.values()) / 1e6:.1f}M parameters")
    return folder


def their_scores(model, tokenizer, items, batch_size):
    """Scores by transformers: all chats sorted by length, padded to the longest of a batch."""
    chats = []
    for instruction, responses in items:
        for response in responses:
            turns = (("user", instruction), ("assistant", response))
            messages = [{"role": role, "content": content} for role, content in turns]
            chats.append(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
    scores = [0.0] * len(chats)
    for batch, inputs in bench.padded_batches(chats, batch_size, tokenizer.pad_token_id):
        with torch.inference_mode():
            found = model(**inputs, use_cache=False).logits[:, 0].tolist()
        for i, score in zip(batch, found, strict=True):
            scores[i] = score
    return scores


def run(args):
    """Prints the table; returns how many times as long transformers' best takes as ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count, responses = (2, 3) if args.short else (16, 8)
    if args.texts:
        items = read_items(args.texts, count, responses)
    else:
        items = draw_items(count, responses, 60 if args.short else 400)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_judge(Path(scratch), items, CONFIG | (SMALL if args.short else {}))
        ours = judge.load_judge(folder)
        found = {}  # the scores of each variant

        def measure(name, score):
            began = time.process_time()
            found[name] = score()
            return time.process_time() - began

        def our_scores():
            return [s for item in items for s in ours.score(*item)]

        variants = {"Pointwise": our_scores}
        if bench.installed("transformers"):
            from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<|pad|>")
            theirs = LlamaForSequenceClassification.from_pretrained(folder).eval()
            theirs.config.pad_token_id = tokenizer.pad_token_id
            for size in BATCHES:
                call = partial(their_scores, theirs, tokenizer, items, size)
                variants[f"transformers, {size} a batch"] = call
        variants = {name: partial(measure, name, score) for name, score in variants.items()}
        times = bench.alternate(variants, 1 if args.short else args.repeats)
    torch.set_num_threads(threads)
    tokens = sum(len(ours.response_chat("here", x, y)) for x, ys in items for y in ys)
    print(f"judge: {count} instructions x {responses} responses, {tokens:,} tokens")
    ours, *theirs = medians = [statistics.median(seconds) for seconds in times.values()]
    for name, seconds in zip(times, medians, strict=True):
        print(f"  {name:26} {tokens / seconds:8,.0f} tokens/s   ratio {seconds / ours:.2f}")
    for name, scores in found.items():
        away = max(abs(a - b) for a, b in zip(scores, found["Pointwise"], strict=True))
        assert away < 1e-3 * max(map(abs, scores)), f"{name}: other scores, {away} away"
    return {"transformers, best of 4, 8 and 16 a batch": min(theirs) / ours} if theirs else {}
