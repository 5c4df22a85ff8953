"""Tokens a second of generate, beside transformers', and what each of its ideas brings.

On random weights of 18.7M parameters: 12 prompts of 40 to 200 tokens, K = 8, at most 300 new
tokens, lengths of about 110 on average. On real weights (--model): 16 prompts, K = 4, at most 160
new tokens, in float32 and bfloat16. Run by `python tests/benchmarks sampling`.
"""

import statistics
from functools import partial

import bench  # puts the project on sys.path
from bench import timed

# isort: split
import model as lm
import sample

import numpy as np
import torch

SETTINGS = {"temperature": 0.8, "top_p": 0.95}


def run(args):
    return on_real_weights(args) if args.model else on_random_weights(args)


def on_random_weights(args):
    """Prints the table; returns {name: how many times as fast ours is}."""
    model = bench.random_model("tiny" if args.short else "cpu-19m")
    vocab, slots, draws = model.config.vocab_size, 96, np.random.default_rng(0)
    count, longest, average = (3, 12, 6) if args.short else (12, 300, 110)
    prompts = [draws.integers(0, vocab, n).tolist() for n in draws.integers(40, 200, count)]
    stops = list(range(max(1, round(vocab / average))))  # flat logits: geometric lengths
    length = max(map(len, prompts)) + longest

    def decode(prompts, num_samples, longest, stop_ids, names=None):
        decoder = sample.Decoder(model, slots, length)
        more = {"stop_ids": stop_ids, "names": names, "decoder": decoder, **SETTINGS}
        return lengths_of(sample.generate(model, prompts, num_samples, longest, **more))

    def ours(prompts=prompts, num_samples=8):
        seconds, lengths = timed(lambda: decode(prompts, num_samples, longest, stops))
        return sum(lengths) / seconds

    def waiting_for_the_slowest():
        """The plain loop's work: a batch of rows runs on until its slowest row has ended."""
        tokens, seconds = 0, 0.0
        for first in range(0, count, slots // 8):
            names = range(first, min(first + slots // 8, count))
            part = [prompts[i] for i in names]
            ends = decode(part, 8, longest, stops, names)
            took, _ = timed(partial(decode, part, 8, max(ends), (), names))
            tokens, seconds = tokens + sum(ends), seconds + took
        return tokens / seconds

    variants = {
        "generate": ours,
        "rows wait for the slowest, as in a plain loop": waiting_for_the_slowest,
        "each prompt prefilled K times": lambda: ours([p for p in prompts for _ in range(8)], 1),
    }
    if bench.installed("transformers"):
        peer = transformers_model(model)
        for rows in (24, 96):
            theirs = partial(their_rate, peer, prompts, 8, rows, longest, stops)
            variants[f"transformers' `generate`, {rows} rows"] = theirs
    print(f"sampling: {count} prompts x 8, at most {longest} new tokens, {slots} slots")
    return table(variants, 1 if args.short else args.repeats)


def on_real_weights(args):
    """Thought prompts over instructions of the toy world, ended by the model's own stop tokens."""
    count, longest = (2, 8) if args.short else (16, 160)
    tokenizer = lm.load_tokenizer(args.model)
    file = bench.TESTS / "toy" / "train.jsonl"
    rows = sample.read_instructions(file)[:count]
    config = lm.read_config(lm.checkpoint_folder(args.model))
    made = sample.make_prompts(rows, tokenizer, "specific", config, file)
    prompts = [row["prompt_ids"] for row in made]
    peers = bench.installed("transformers")
    for name in ("float32", "bfloat16"):
        model = lm.load_model(args.model, dtype=lm.DTYPES[name])

        def ours(model=model):
            call = (4, longest, *SETTINGS.values(), tokenizer.stop_ids)
            seconds, lists = timed(lambda: sample.generate(model, prompts, *call))
            return sum(lengths_of(lists)) / seconds

        variants = {"generate": ours}
        if peers:
            from transformers import AutoModelForCausalLM

            folder = lm.checkpoint_folder(args.model)
            peer = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.DTYPES[name]).eval()
            call = (peer, prompts, 4, 4 * count, longest, list(tokenizer.stop_ids))
            variants["transformers' `generate`"] = partial(their_rate, *call)
        print(f"sampling, {args.model}, {name}: {count} prompts x 4, at most {longest} new tokens")
        table(variants, 1 if args.short else args.repeats)
    return {}


def table(variants, repeats):
    results = bench.alternate(variants, repeats)
    base = statistics.median(results["generate"])
    ratios = {name: base / statistics.median(rates) for name, rates in results.items()}
    for name, rates in results.items():
        print(f"  {name:46} {bench.spread(rates)} tokens/s   ratio {ratios[name]:.2f}")
    return ratios


def lengths_of(lists):
    return [len(c.ids) for own in lists for c in own]


def transformers_model(model):
    """transformers' Llama with the same weights, not a copy of them."""
    import transformers

    settings = {k: v for k, v in vars(model.config).items() if not k.endswith("_bias")}
    settings["rope_parameters"] = settings.pop("rope")
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.LlamaConfig(**settings, **none)
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(config)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(model.head.device)
    peer.load_state_dict(model.state_dict(), assign=True)
    tokens = torch.arange(5, 20, device=model.head.device)[None]
    with torch.no_grad():
        theirs, ours = peer.eval()(tokens).logits.float(), model(tokens)
    bound = 1e-4 if model.head.dtype == torch.float32 else 0.1
    assert (theirs - ours).abs().max() <= bound * ours.abs().max()
    return peer


def their_rate(peer, prompts, num_samples, rows, longest, stops, **settings):
    """Tokens a second of transformers' generate: batches of `rows`, padded on the left."""
    tokens, seconds = 0, 0.0
    for first in range(0, len(prompts), rows // num_samples):
        part = prompts[first : first + rows // num_samples]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=peer.device)
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in part]
        call = dict(
            attention_mask=torch.tensor(mask, device=peer.device),
            do_sample=True,
            top_k=0,
            num_return_sequences=num_samples,
            max_new_tokens=longest,
            eos_token_id=stops or None,
            pad_token_id=0,
            **(settings or SETTINGS),
        )
        with torch.inference_mode():
            took, out = timed(partial(peer.generate, ids, **call))
        seconds += took
        for row in out[:, width:].tolist():
            ends = [i for i, token in enumerate(row) if token in stops]
            tokens += ends[0] + 1 if ends else len(row)
    return tokens / seconds
