"""On a GPU: first that it computes what the CPU does, then how fast: four minutes on an H100.

    python tests/benchmarks/gpu.py             # a CUDA device of 80 GB, 128 GB of host memory
    python tests/benchmarks/gpu.py --short     # the same lines on tiny shapes, on the CPU

Nothing is downloaded. Parity is with tests/fixtures, what transformers and TRL computed on a CPU.
Speed is on random weights of the shape of Llama-3-8B in bfloat16, each figure beside its share of
what this very card does in a plain copy or one large matrix product, then transformers where it is
installed. Last comes a Markdown table.
"""

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench  # puts the project on sys.path
from bench import timed

# isort: split
import dpo
import judge
import model as lm
import sample

import make_judge_fixtures
import make_trl_fixture
import numpy as np
import torch
from bench_dpo import draw_pairs
from bench_sampling import their_rate, transformers_model
from conftest import FIXTURES, write_checkpoint
from safetensors.torch import load_file


def relative(found, expected):
    """The largest difference, as a share of the largest number."""
    found, expected = (torch.as_tensor(x).double().cpu() for x in (found, expected))
    return ((found - expected).abs().max() / expected.abs().max()).item()


# Parity


def logits(device, scratch):
    """Every checkpoint of the fixtures, float32; then bf16, whose rounding the CPU's own shows."""
    cases = json.loads((FIXTURES / "checkpoints.json").read_text())
    stored = np.load(FIXTURES / "logits.npz")
    tokens, kept = torch.from_numpy(stored["tokens"]), stored["kept"].tolist()
    for name, case in cases.items():
        dtype = getattr(torch, case.get("dtype", "float32"))
        folder = scratch / name
        write_checkpoint(folder, case["config"], case["seed"], dtype, case.get("shards", 1))
        wide = logits_of(folder, device, torch.float32, tokens)[:, kept]
        yield f"logits, {name}", relative(wide, stored[name]), 5e-5
        narrow, own = (
            logits_of(folder, d, torch.bfloat16, tokens)[:, kept] for d in (device, "cpu")
        )
        away = relative(own, stored[name])  # the CPU's bf16 rounds the logits too
        yield f"logits, {name}, bfloat16", relative(narrow, stored[name]), 2 * away


def logits_of(folder, device, dtype, tokens):
    with torch.inference_mode():
        return lm.load_model(folder, device, dtype)(tokens.to(device))


def greedy(device, scratch):
    """90 prompts of other lengths in slots that change hands: transformers' ids, each alone."""
    case = json.loads((FIXTURES / "greedy.json").read_text())
    folder = write_checkpoint(scratch / "greedy", case["config"], case["seed"])
    model = lm.load_model(folder, device)
    decoder = sample.Decoder(model, 13, 90 + case["max_new_tokens"])
    settings = (1, case["max_new_tokens"], 0, 1.0, case["stop_ids"])
    found = sample.generate(model, case["prompts"], *settings, decoder=decoder)
    wrong = sum(c.ids != ids for (c,), ids in zip(found, case["outputs"], strict=True))
    yield "greedy ids, outputs that differ", wrong, 0


def scores(device, scratch):
    """ArmoRM and a one-label reward model against the rows of the fixtures."""
    theirs = json.loads((FIXTURES / "judge" / "scores.json").read_text())
    kinds = {"ArmoRM": make_judge_fixtures.ARMORM, "one label": make_judge_fixtures.ONE_LABEL}
    for name, config in kinds.items():
        folder = make_judge_fixtures.write_judge(scratch / name, config)
        expected = [row[0] for case in theirs[name] for row in case]
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, None)):
            cases = make_judge_fixtures.cases()
            own = device if bound else "cpu"
            found, rounded = (
                [s for case in cases for s in judge.load_judge(folder, at, dtype).score(*case)]
                for at in (device, own)
            )
            bound = bound or 2 * relative(rounded, expected)
            yield f"scores, {name}, {dtype}".replace("torch.", ""), relative(found, expected), bound


def five_steps(device, scratch):
    """Five steps of DPO end where TRL's do; distances are shares of the way that TRL went."""
    policy = make_trl_fixture.write_policy(scratch / "policy")
    folder = make_trl_fixture.FOLDER
    theirs = json.loads((folder / "log.json").read_text())
    trained, start = (
        load_file(folder / "trained.safetensors"),
        load_file(policy / "model.safetensors"),
    )
    far = torch.cat([(trained[name] - start[name]).flatten() for name in start]).norm()
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        model, records = lm.load_model(policy, device, dtype), []
        pairs = dpo.read_pairs(folder / "pairs.jsonl", model.config)
        options = dpo.Options(
            **make_trl_fixture.OPTIONS, micro_batch_tokens=150, keep_activations=1
        )
        options = replace(options, optimizer_device="same")
        dpo.train(model, pairs, options, log=records.append)
        losses = relative([r["loss"] for r in records], [row["loss"] for row in theirs])
        name = f"five DPO steps, {dtype}".replace("torch.", "")
        yield f"{name}, losses", losses, bound
        if dtype == torch.float32:
            weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
            away = torch.cat([(weights[name] - trained[name]).flatten() for name in start]).norm()
            yield f"{name}, weights", (away / far).item(), bound


def graphs(device, scratch):
    """Steps, on a GPU replayed from a CUDA graph, against the prefill of the same tokens."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        model = bench.random_model("tiny", device, dtype)
        with torch.inference_mode():
            decoder, away = sample.Decoder(model, 7, 1200), 0
            rows = [[i % 499 for i in range(n)] for n in (10, 500, 90, 900, 3, 600, 40)]
            for slot, held in enumerate(decoder.prefill(rows)[0]):
                decoder.cache.write(slot, *held)
            for token, n in enumerate((5, 3, 7, 5)):  # free slots behind them, all and some
                logits = decoder.step([token] * n, [len(row) for row in rows[:n]])
                for row, own in zip(rows, logits.clone(), strict=False):
                    row.append(token)
                    away = max(away, relative(own, decoder.prefill([row])[1][0]))
        yield f"steps against prefill, {dtype}".replace("torch.", ""), away, bound


def optimizers(device, scratch):
    """State on the device and in host memory, the same gradients: the same bytes, five steps on."""
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for place in ("same", "cpu"):
            model = bench.random_model("tiny", device, dtype)
            options = dpo.Options(optimizer_device=place, weight_decay=0.1, lr=1e-4)
            optimizer, dice = dpo.AdamW(model, options), torch.Generator(device).manual_seed(1)
            for _ in range(5):
                for p in model.parameters():
                    p.grad_dtype = torch.float32
                    p.grad = torch.randn(p.shape, generator=dice, device=device)
                optimizer.step(1e-4, 0.5)
            bench.synchronize()
            kept = {**optimizer.state, **dict(model.named_parameters())}
            ends.append({name: x.detach().cpu().clone() for name, x in kept.items()})
        wrong = sum(not torch.equal(x, ends[1][name]) for name, x in ends[0].items())
        yield f"host and device optimizer, {dtype}, other tensors".replace("torch.", ""), wrong, 0


def parity(device):
    """Prints every comparison; returns how many are out of their bounds."""
    lost = 0
    for part in (logits, greedy, scores, five_steps, graphs, optimizers):
        with tempfile.TemporaryDirectory() as scratch:
            for name, away, bound in part(device, Path(scratch)):
                good = away <= bound
                lost += not good
                print(f"{'ok   ' if good else 'WRONG'} {name}: {away:.2g}, at most {bound:.2g}")
    return lost


# Speed


class Card:
    """What the device does at best here: bytes a second of a copy, of the bus; FLOP a second."""

    def __init__(self, device, short):
        many, size = (2**22, 256) if short else (2**32, 8192)
        source = torch.ones(many, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * many / fastest(lambda: target.copy_(source))  # read and written
        host = torch.ones(many // 4, dtype=torch.uint8, pin_memory=source.is_cuda)
        self.bus = many // 4 / fastest(lambda: target[: many // 4].copy_(host))
        x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        self.rate = 2 * size**3 / fastest(lambda: x @ x)


def fastest(function):
    return min(timed(function)[0] for _ in range(5))


def give_back():
    """Frees what the last part held, so that the next one's memory is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def decoding(model, short):
    """Tokens a second of 1,000-token outputs, 8 a prompt, as many rows as the memory holds."""
    vocab, longest = model.config.vocab_size, 10 if short else 1000
    prompt = 20 if short else 200
    slots = sample.plan_slots(model, prompt + longest, 4 if short else 10**6)
    K = min(8, slots)
    prompts = [pair.prompt_ids for pair in draw_pairs(slots // K, vocab, prompt, 4)]
    decoder = sample.Decoder(model, slots // K * K, prompt + longest)
    # Random weights give flat logits; so cold, a nucleus is as narrow as a trained model's.
    settings = {"temperature": 0.05, "decoder": decoder}
    for _ in range(2):  # the first captures the CUDA graphs
        seconds, lists = timed(lambda: sample.generate(model, prompts, K, longest, **settings))
    rate = sum(len(c.ids) for own in lists for c in own) / seconds
    # A step reads the weights, the embedding's few rows aside, and the keys and values so far.
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    held = np.mean([len(ids) for ids in prompts]) + longest / 2
    cache = 2 * decoder.cache.k.nbytes * held // (decoder.slots * decoder.length)
    size = weights / decoder.slots + cache  # bytes a token
    return f"decoding, {decoder.slots} rows of {longest:,} tokens", rate, rate * size


def judging(model, short):
    """Tokens a second of a reward model on 8 responses of unequal lengths to each instruction.

    Returns them, FLOP a second, and the chats that were read: lists of ids.
    """
    config, count, most = model.config, 2 if short else 32, 20 if short else 600
    with torch.device("meta"):
        rewards = judge.RewardModel(config)
    rewards.model, rewards.score = model.model, torch.nn.Linear(config.hidden_size, 1, bias=False)
    rewards.score.to(model.head.device)  # float32, as every reward head
    dice = np.random.default_rng(0)
    texts = {}  # a text is the name of its ids here

    def apply_chat_template(messages, add_generation_prompt):
        return [i for message in messages for i in texts[message["content"]]]

    def text(name, least, most):
        texts[name] = dice.integers(0, config.vocab_size, dice.integers(least, most)).tolist()
        return name

    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: [1], apply_chat_template=apply_chat_template
    )
    ours = judge.Pointwise(rewards, tokenizer)
    items = [
        (text(f"{i}", most // 6, most // 3), [text(f"{i}/{j}", most // 3, most) for j in range(8)])
        for i in range(count)
    ]
    ours.score(*items[0])
    seconds, _ = timed(lambda: [ours.score(*item) for item in items])
    rate = sum(map(len, texts.values())) / seconds  # an instruction is computed once
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    chats = [ours.response_chat("here", x, y) for x, responses in items for y in responses]
    return seconds, rate, rate * 2 * blocks, chats


def beside_transformers(model, chats, seconds, short):
    """How much faster ours is than transformers on the same weights; yields rows of the table.

    generate: 256 rows of 200 tokens, all at once on both sides. A judge: the trunk on the chats
    that ours read in `seconds`, sorted by length, 16 a batch, padded to the longest.
    """
    peer, (rows, longest) = transformers_model(model), (8, 10) if short else (256, 200)
    prompts = [pair.prompt_ids for pair in draw_pairs(rows // 8, model.config.vocab_size, 200, 4)]
    decoder, law = sample.Decoder(model, rows, 200 + longest), {"temperature": 0.05, "top_p": 0.95}

    def ours():
        call = (prompts, 8, longest, *law.values())
        return rows * longest / timed(lambda: sample.generate(model, *call, decoder=decoder))[0]

    def theirs():
        return their_rate(peer, prompts, 8, rows, longest, [], **law)

    rates = bench.alternate({"ours": ours, "theirs": theirs}, 1)
    (own,), (other,) = rates.values()
    what = f"transformers' generate, {rows} rows of {longest} tokens (ours {own:,.0f} tokens/s)"
    yield what, f"{other:,.0f} tokens/s", f"ours is faster by {own / other:.1f}"

    @torch.inference_mode()
    def read():
        for _, inputs in bench.padded_batches(chats, 16, 0, peer.device):
            peer.model(**inputs, use_cache=False).last_hidden_state[:, -1].tolist()

    read()
    other, _ = timed(read)
    what = f"transformers' Llama as a judge, {len(chats)} chats of {sum(map(len, chats)):,} tokens"
    yield what, f"{other:.2f} s", f"ours, {seconds:.2f} s, is faster by {other / seconds:.1f}"


def training(model, short):
    """A DPO step of 64 pairs of 2 x 2,048 tokens, AdamW's state in host memory."""
    count, prompt, output = (4, 8, 20) if short else (64, 200, 2048)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (count, 3, output))
    pairs = [dpo.Pair("pair", x[:prompt], y, z) for x, y, z in ids.tolist()]
    options = dpo.Options(batch_size=count, optimizer_device="cpu")
    fitting, options = timed(
        lambda: dpo.fit_options(model, max(pairs, key=lambda pair: pair.num_tokens), options)
    )
    print(
        f"fit_options took {fitting:.1f} s: {options.micro_batch_tokens:,} tokens at once, "
        f"{options.keep_activations} blocks kept"
    )
    making, optimizer = timed(lambda: dpo.AdamW(model, options))
    for pair in pairs:  # the reference is the forward pass of what follows
        pair.reference = (-1.0, -1.0)
    give_back()
    passes, _ = timed(lambda: dpo.add_gradient(model, pairs, options))
    stepping, norm = timed(optimizer.gradient_norm)
    took, _ = timed(lambda: optimizer.step(1e-7, min(1.0, 1 / norm)))
    peak, tokens = bench.peak_memory(), sum(pair.num_tokens for pair in pairs)
    print(f"its state took {making:.1f} s to make in host memory")
    weights = sum(p.numel() for p in model.parameters())
    blocks = weights - model.model.embed_tokens.weight.numel()
    flops = 6 * blocks * tokens  # what is recomputed does not count as work done
    moved = 2 * sum(x.nbytes for x in optimizer.state.values())  # to the device and back
    return passes, stepping + took, peak, tokens, flops, moved


def speed(device, short):
    """Prints the figures as they come, then the table."""
    rows = []

    def add(*row):
        rows.append(row)
        print(*row, sep=" | ", flush=True)

    card = Card(device, short)
    give_back()
    shape = "tiny" if short else "llama-3-8b"
    making, model = timed(lambda: bench.random_model(shape, device, torch.bfloat16))
    print(f"{shape}, made in {making:.1f} s")
    what, rate, read = decoding(model, short)
    add(what, f"{rate:,.0f} tokens/s", f"{read / card.bandwidth:.0%} of the bandwidth")
    give_back()
    seconds, rate, work, chats = judging(model, short)
    what = f"judging, {len(chats) // 8} x 8 responses"
    add(what, f"{rate:,.0f} tokens/s", f"{work / card.rate:.0%} of the matrix rate")
    give_back()
    passes, stepping, peak, tokens, flops, moved = training(model, short)
    share = f"{flops / passes / card.rate:.0%} of the matrix rate"
    add("a DPO step, forward and backward", f"{passes:.1f} s", share)
    add("that, by tokens", f"{tokens / passes:,.0f} tokens/s", share)
    share = f"{moved / stepping / card.bus:.0%} of the bus, one way"
    add("AdamW, state on the host", f"{stepping:.1f} s", share)
    memory = f"{peak / lm.GIB:.1f} GiB"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        add("peak memory of that step", memory, f"{peak / total:.0%} of the card's")
    else:
        add("peak memory of the process", memory, "")
    give_back()
    if bench.installed("transformers"):
        for row in beside_transformers(model, chats, seconds, short):
            add(*row)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"\n{name}, torch {torch.__version__}: a copy moves {card.bandwidth / 1e9:,.0f} GB/s,")
    print(f"the bus {card.bus / 1e9:,.0f} GB/s, a bf16 product {card.rate / 1e12:,.1f} TFLOP/s.")
    print(f"Random weights of the shape {shape}, bfloat16:\n")
    print("| | measured | share of this card's own |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main():
    parser = argparse.ArgumentParser(description="Parity and speed on a GPU.")
    parser.add_argument("--short", action="store_true", help="tiny shapes, on the CPU")
    short = parser.parse_args().short
    device = lm.check_device("cpu" if short else "cuda")
    seconds, lost = timed(lambda: parity(device))
    print(f"parity: {lost} out of their bounds, {seconds:.0f} s\n", flush=True)
    seconds, _ = timed(lambda: speed(device, short))
    print(f"\nspeed took {seconds:.0f} s")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    lm.run_main(main)
