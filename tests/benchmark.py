"""Every speed and memory figure of the README, measured again, each against a named peer.

    python tests/benchmark.py                    # all of them (transformers and trl for the peers)
    python tests/benchmark.py sampling --shape llama-3-8b --device cuda --dtype bfloat16
    python tests/benchmark.py --short            # tiny sizes, to see that it still runs

A peer that is not installed is left out and said to be. All runs of one table alternate in one
process, are repeated, and are given as median (lowest to highest); compare ratios, not seconds.
At the end stands which of the README's ratios still hold; exit status 1 where one does not.
"""

import argparse
import contextlib
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
from model import DTYPES, Config, KVCache, LanguageModel

# The README's ratios: its row, which is also the variant's name here, its figure, and what upholds
# it, "at least" or "at most" a bound. tests/test_readme.py holds both to the same rows.
CLAIMS = {
    "rows wait for the slowest, as in a plain loop": (2.43, "at least", 2.0),
    "each prompt prefilled K times": (1.21, "at least", 1.1),
    "transformers' `generate`, 24 rows": (5.19, "at least", 4.0),
    "transformers' `generate`, 96 rows": (5.4, "at least", 4.0),
    "transformers, best of 4, 8 and 16 a batch": (1.41, "at least", 1.3),
    "TRL, seconds an epoch": (2.15, "at least", 2.0),
    "TRL, our share of its peak memory": (0.35, "at most", 0.4),
}

# Public sizes: vocabulary, width, MLP width, layers, heads, KV heads, tied embeddings.
SHAPES = {
    "cpu-19m": (8000, 384, 1024, 8, 6, 2, False),
    "tiny": (500, 64, 128, 2, 4, 2, False),
    "toy": (400, 128, 384, 3, 4, 2, False),
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, False),
}


def random_model(shape, device="cpu", dtype=torch.float32, positions=4096):
    """A model of a public size with random weights; its logits are nearly flat."""
    vocab, width, wide, layers, heads, kv_heads, tied = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    head_dim = 64 if width < 4096 else 128
    config = Config(
        vocab,
        width,
        wide,
        layers,
        heads,
        kv_heads,
        width // heads if width < 384 else head_dim,
        positions,
        1e-5,
        rope,
        tied,
        False,
        False,
        False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(config).to(dtype).eval()
    model.model.frequencies = model.model.frequencies.float().to(device)
    for name, p in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(p, std=0.02)
    return model


def timed(function):
    """(seconds, result) of one call, the device's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def alternate(functions, repeats):
    """{name: list of results} of functions called in turn, once unmeasured and then `repeats`."""
    results = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            result = function()
            if i:
                results[name].append(result)
    return results


def spread(values, form=",.0f"):
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def installed(name):
    with contextlib.suppress(ImportError):
        return __import__(name)
    print(f"{name} is not installed: no peer")
    return None


# Sampling


def sampling(args):
    """Tokens a second of generate, beside transformers', and what each idea brings."""
    shape = "tiny" if args.short else args.shape or "cpu-19m"
    model = random_model(shape, args.device, DTYPES[args.dtype])
    vocab = model.config.vocab_size
    draws = np.random.default_rng(0)
    count, longest, average = (3, 12, 6) if args.short else (12, 300, 110)
    if args.device != "cpu":  # real lengths: AlpacaEval's responses, about 440 tokens on average
        count, longest, average = 64, 1570, 440
    lengths = draws.integers(40, 200, count)
    prompts = [draws.integers(0, vocab, n).tolist() for n in lengths]
    stops = list(range(max(1, round(vocab / average))))  # flat logits: geometric lengths
    settings = {"temperature": 0.8, "top_p": 0.95, "stop_ids": stops}
    slots = args.slots or 96
    length = int(max(lengths)) + longest
    decoders = []

    def ours(prompts=prompts, num_samples=8, longest=longest, **changed):
        decoder = sample.Decoder(model, slots, length)
        decoders.append(decoder)
        call = {**settings, **changed}
        seconds, lists = timed(
            lambda: sample.generate(model, prompts, num_samples, longest, decoder=decoder, **call)
        )
        return sum(len(c.ids) for row in lists for c in row) / seconds

    def waiting_for_the_slowest():
        """The plain loop's work: a batch of rows runs on until its slowest row has ended."""
        tokens, seconds, whole = 0, 0.0, {**settings, "stop_ids": ()}
        for first in range(0, count, max(1, slots // 8)):
            part = prompts[first : first + max(1, slots // 8)]

            def decode(most, call, part=part, first=first):
                decoder = sample.Decoder(model, slots, length)
                return sample.generate(
                    model, part, 8, most, first_prompt=first, decoder=decoder, **call
                )

            ends = [len(c.ids) for row in decode(longest, settings) for c in row]
            took, _ = timed(partial(decode, max(ends), whole))
            tokens, seconds = tokens + sum(ends), seconds + took
        return tokens / seconds

    variants = {
        "generate": ours,
        "rows wait for the slowest, as in a plain loop": waiting_for_the_slowest,
        "each prompt prefilled K times": lambda: ours([p for p in prompts for _ in range(8)], 1),
    }
    if args.device != "cpu":
        variants["no CUDA graph"] = lambda: without_graphs(ours)
    if installed("transformers"):
        peer = transformers_model(model)
        for rows in (24, 96):
            variants[f"transformers' `generate`, {rows} rows"] = lambda rows=rows: their_rate(
                peer, prompts, rows, longest, stops, args.device
            )
    print(f"sampling, {shape}: {count} prompts x 8, at most {longest} new tokens, {slots} slots")
    results = alternate(variants, 1 if args.short else args.repeats)
    base = statistics.median(results["generate"])
    ratios = {name: base / statistics.median(rates) for name, rates in results.items()}
    for name, rates in results.items():
        print(f"  {name:46} {spread(rates)} tokens/s   ratio {ratios[name]:.2f}")
    steps, rows = sum(d.steps for d in decoders), sum(d.rows for d in decoders)
    print(f"  slots in use on average: {rows / steps:.1f} of {slots}")
    roofline(model, slots, base, int(np.mean(lengths)) + average // 2)
    return ratios


def without_graphs(ours):
    replay = sample.Decoder.replay
    sample.Decoder.replay = sample.Decoder.forward
    try:
        return ours()
    finally:
        sample.Decoder.replay = replay


def roofline(model, slots, rate, mean_length):
    """The share of the time that reading weights and cache at the copy bandwidth would take."""
    weight = model.head
    big = torch.empty(2**28 if weight.device.type == "cuda" else 2**26, device=weight.device)
    target = torch.empty_like(big)
    target.copy_(big)
    seconds = min(timed(lambda: target.copy_(big))[0] for _ in range(5))
    bandwidth = 2 * big.nbytes / seconds
    weights = sum(p.nbytes for p in model.parameters())
    cache = slots * mean_length * KVCache.bytes_per_token(model.config, weight.dtype)
    floor = (weights + cache) / bandwidth  # seconds a step
    print(
        f"  copy bandwidth {bandwidth / 1e9:,.0f} GB/s; a step reads {weights / 1e6:,.0f} MB of "
        f"weights and {cache / 1e6:,.0f} MB of cache; share of the roofline "
        f"{rate * floor / slots:.0%}"
    )
    hours = 5000 * 8 * 600 / rate / 3600
    print(f"  an iteration of the paper (40,000 outputs of 600 tokens): {hours:,.1f} hours")


def transformers_model(model):
    """transformers' Llama with the same weights."""
    import transformers

    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    peer = transformers.LlamaForCausalLM(config).to(model.head.device, model.head.dtype).eval()
    peer.load_state_dict(model.state_dict(), strict=False)
    return peer


def their_rate(peer, prompts, rows, longest, stops, device):
    """Tokens a second of transformers' generate: batches of `rows`, padded on the left."""
    tokens, seconds = 0, 0.0
    for first in range(0, len(prompts), rows // 8):
        part = prompts[first : first + rows // 8]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
        with torch.inference_mode():
            took, out = timed(
                lambda ids=ids, mask=mask: peer.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=0.8,
                    top_p=0.95,
                    top_k=0,
                    num_return_sequences=8,
                    max_new_tokens=longest,
                    eos_token_id=stops,
                    pad_token_id=0,
                )
            )
        seconds += took
        for row in out[:, width:].tolist():
            ends = [i for i, token in enumerate(row) if token in stops]
            tokens += ends[0] + 1 if ends else len(row)
    return tokens / seconds


def judging(args):
    """Tokens a second of a pointwise judge, beside transformers' padded batches."""
    if not installed("transformers"):
        return {}
    if args.texts is None:
        print("judge: left out; --texts FILE gives it real responses")
        return {}
    import benchmark_judge

    return benchmark_judge.run(
        argparse.Namespace(
            responses=args.texts,
            instructions=16,
            num_responses=8,
            rounds=1 if args.short else args.repeats,
            threads=torch.get_num_threads(),
            batch_sizes=[8] if args.short else [4, 8, 16],
            batch_tokens=[2048],
        )
    )


def training(args):
    """Seconds an epoch and peak memory of DPO, beside TRL's."""
    import benchmark_dpo

    return benchmark_dpo.run(args)


def check_claims(measured, timed=True):
    """Prints of every claim whether it holds; returns how many no longer do.

    measured: {name: ratio}. timed: false where the sizes are not the README's, so nothing follows.
    """
    lost = 0
    for name, (stated, side, bound) in CLAIMS.items():
        if name not in measured:
            verdict, found = "not measured", "-"
        else:
            ratio, found = measured[name], f"{measured[name]:.2f}"
            holds = ratio >= bound if side == "at least" else ratio <= bound
            lost += timed and not holds
            verdict = "other sizes" if not timed else "holds" if holds else "no longer holds"
        print(f"{verdict}: {name}: measured {found}, README {stated}, {side} {bound}")
    return lost


PARTS = {"sampling": sampling, "judge": judging, "dpo": training}


def main():
    parser = argparse.ArgumentParser(description="Measures the README's figures again.")
    add = parser.add_argument
    add("part", nargs="?", choices=PARTS, help="one table (default: all)")
    add("--short", action="store_true", help="tiny sizes and one repeat, to see that it runs")
    add("--shape", choices=SHAPES, help="a public size, with random weights")
    add("--texts", help="JSON lines of an instruction and responses: AlpacaEval's outputs")
    add("--slots", type=int, help="rows that decode together (default 96)")
    add("--repeats", type=int, default=3, help="measured calls of each variant (default 3)")
    add("--device", default="cpu", help="cpu (default), cuda, ...")
    add("--dtype", choices=DTYPES, default="float32", help="default float32")
    add("--optimizer-device", choices=("same", "cpu"), default="same", help="dpo: default same")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    measured = {}
    for part in [args.part] if args.part else PARTS:
        measured |= PARTS[part](args)
    other = (
        args.short or args.shape or args.slots or (args.device, args.dtype) != ("cpu", "float32")
    )
    sys.exit(1 if check_claims(measured, timed=not other) else 0)


if __name__ == "__main__":
    main()
