"""Sampling (sections 2.1 and 3.1): thought prompts in, K outputs an instruction out.

A model is asked to write a thought and then a response. `generate` draws K completions for each
prompt; `split_output` cuts each into the thought and the response.

In: a checkpoint and a file of instructions. Out: a file of samples, one line an instruction:
its fields, `prompt_ids`, and `outputs`, each with `ids`, `thought`, `response`, `finished`.

    python sample.py --model DIR --instructions FILE --output FILE    # K samples an instruction
    python sample.py --model DIR "an instruction"                     # one answer to the terminal
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (
    DTYPES,
    GIB,
    KVCache,
    add_options,
    check_output,
    checkpoint_folder,
    existing,
    expect,
    file_hash,
    folder_hash,
    load_model,
    load_tokenizer,
    option,
    pack,
    parse_json,
    read_jsonl,
    read_options,
    run_main,
    shared_length,
    stream,
    write_groups,
    write_json,
    write_jsonl,
)

# Thought prompts (section 2.1, Figure 2), verbatim. The marker before the response cuts an output.
THOUGHT_PROMPTS = {
    "generic": (
        "Respond to the following user query in a comprehensive and detailed way. You can write "
        "down your thought process before responding. Write your thoughts after "
        '"Here is my thought process:" and write your response after "Here is my response:".\n'
        "User query: {instruction}"
    ),
    "specific": (
        "Respond to the following user query in a comprehensive and detailed way. But first write "
        "down your internal thoughts. This must include your draft response and its evaluation. "
        'After this, write your final response after "<R>".\n'
        "User query: {instruction}"
    ),
    "none": "{instruction}",  # the direct baseline: same loop, same judge, no thought
}
RESPONSE_MARKERS = {"generic": "Here is my response:", "specific": "<R>"}
GENERIC_THOUGHT_MARKER = "Here is my thought process:"


def thought_prompt(instruction, style):
    """The user's turn that asks for a thought before the response; style names the prompt.

    >>> thought_prompt("Why is the sky blue?", "specific")[-39:]
    '"<R>".\\nUser query: Why is the sky blue?'
    """
    return THOUGHT_PROMPTS[style].replace("{instruction}", instruction)


def split_output(text, style):
    """(thought, response) of an output, both stripped; None where the marker is missing.

    The first marker cuts: what follows it is the response, whatever it quotes.

    >>> split_output("Draft: 4. Looks right. <R> It is 4.", "specific")
    ('Draft: 4. Looks right.', 'It is 4.')
    >>> split_output("It is 4.", "specific") is None
    True
    """
    if style == "none":
        return "", text.strip()
    thought, marker, response = text.partition(RESPONSE_MARKERS[style])
    if not marker:
        return None
    if style == "generic":
        thought = thought.strip().removeprefix(GENERIC_THOUGHT_MARKER)
    return thought.strip(), response.strip()


# The sampling law

CANDIDATES = 64  # top-p looks at this many logits first; measured: tests/benchmark.py sampling
SHORT, BROKEN = -1, -2  # in place of an id: these did not reach top_p, the logits are not finite


def draw(logits, uniforms, temperature, top_p):
    """One token a row from softmax(logits / temperature) cut at top-p, by inverting its CDF.

    logits (N, V); uniforms (N,) float64 in [0, 1). Returns a list of N ids. The nucleus is the
    fewest most likely tokens whose probabilities reach top_p. Temperature 0 is greedy.
    """
    finite = logits.amax(-1).isfinite()
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        logits = logits.float() / temperature
        logprobs = logits - logits.logsumexp(-1, keepdim=True)  # (N, V)
        ids = draw_from_top(logprobs, uniforms, top_p)
    # The one wait for the device in a step: what cannot be drawn comes with what was.
    ids = torch.where(finite, ids, BROKEN).tolist()
    expect(BROKEN not in ids, "the model's logits", "NaN or infinity", "finite: another --dtype")
    short = [row for row, token in enumerate(ids) if token == SHORT]
    if short:
        found = draw_from_all(logprobs[short], uniforms[short], top_p).tolist()
        for row, token in zip(short, found, strict=True):
            ids[row] = token
    return ids


def draw_from_top(logprobs, uniforms, top_p):
    """Ids (N,) int64, found without sorting all V; SHORT where the nucleus is too wide for that."""
    if top_p == 1:
        return invert_cdf(logprobs, uniforms, math.inf)[0]
    top, candidates = logprobs.topk(min(CANDIDATES, logprobs.shape[-1]))  # (N, C), descending
    choice, mass = invert_cdf(top, uniforms, top_p)
    ids = candidates.gather(-1, choice[:, None])[:, 0]
    return torch.where(mass < top_p, SHORT, ids) if top.shape != logprobs.shape else ids


def draw_from_all(logprobs, uniforms, top_p):
    """Ids (N,) int64, found by sorting all V values; equal ones rank by their ids."""
    if logprobs.device.type == "cpu":  # torch sorts places too there, at several times the cost
        ranked = torch.from_numpy(np.sort(logprobs.numpy())).flip(-1)  # (N, V)
    else:
        ranked = logprobs.sort(descending=True).values  # (N, V)
    choice, _ = invert_cdf(ranked, uniforms, top_p)
    value = ranked.gather(-1, choice[:, None])  # (N, 1)
    passed = choice[:, None] - (ranked > value).sum(-1, keepdim=True)  # equal ones before it
    return ((logprobs == value).cumsum(-1) > passed).byte().argmax(-1)


def invert_cdf(logprobs, uniforms, top_p):
    """(N, C) log-probabilities -> chosen index (N,), and the mass of all C (N,).

    They are in descending order, so that the first ones are the nucleus; any order does where
    top_p is infinite and keeps all.
    """
    cdf = logprobs.exp().double().cumsum(-1)
    kept = 1 + (cdf[:, :-1] < top_p).sum(-1, keepdim=True)  # a token, while those before it lack
    target = uniforms[:, None] * cdf.gather(-1, kept - 1)
    choice = (cdf <= target).sum(-1, keepdim=True).minimum(kept - 1)
    return choice[:, 0], cdf[:, -1]


# Generation


@dataclass
class Completion:
    """ids: the tokens drawn, the stop token included. finished: whether one was drawn."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False


@dataclass
class Row:
    """A completion in the making: what it needs to go on alone, whoever its neighbours are."""

    completion: Completion
    uniforms: list[float]  # its own random stream, one number a token
    prompt_length: int
    limit: int  # most new tokens
    held: tuple  # the prompt's keys and values as Decoder.prefill gives them, shared by its K

    @property
    def position(self):
        """Where the last token goes in the cache: it holds this many positions before it."""
        return self.prompt_length + len(self.completion.ids) - 1


class Decoder:
    """A model and its cache: prompts are prefilled together, then slots decode together.

    slots: rows that decode together. length: positions of each. steps, rows: how many were run.
    """

    PREFILL_TOKENS = 2048  # prompts are packed up to this many tokens: enough to fill a GPU

    def __init__(self, model, slots, length):
        weight = model.head
        self.model, self.slots, self.length, self.device = model, slots, length, weight.device
        self.cache = KVCache(model.config, slots, length, weight.device, weight.dtype)
        self.graphs, self.steps, self.rows = {}, 0, 0

    def prefill(self, prompts):
        """Runs prompts packed in one row: each prompt's keys and values, and logits (n, V).

        What all begin with (a thought prompt, a judge's system text) is run once and held once:
        keys and values come in two parts, the shared ones and the prompt's own, each a tensor
        (2, layers, KV, tokens, head_dim).
        """
        shared, held = shared_length(prompts), []
        tree = (prompts[0][:shared], [p[shared:] for p in prompts])
        tokens, positions, attend, [(_, starts)] = pack([tree], self.device)

        def keep(layer, q, k, v, kept):
            held.append(torch.cat([k, v]))  # (2, KV, N, head_dim)
            return attend(layer, q, k, v, kept)

        spans = [(s, s + len(p) - shared) for s, p in zip(starts, prompts, strict=True)]
        ends = [end - 1 for _, end in spans]
        hidden = self.model.model(tokens, positions, keep, kept=ends)[0]  # (n, hidden)
        both = torch.stack(held, dim=1)  # (2, layers, KV, N, head_dim)
        parts = [(both[..., :shared, :], both[..., s:e, :]) for s, e in spans]
        return parts, F.linear(hidden, self.model.head)

    def fits(self, prompts, num_samples):
        """Whether prompts are prefilled together: PREFILL_TOKENS, what they share counted once.

        They have no more completions than there are slots: drawing is planned for as many rows.
        """
        repeated = (len(prompts) - 1) * shared_length(prompts)
        few = len(prompts) * num_samples <= self.slots
        return few and sum(map(len, prompts)) - repeated <= self.PREFILL_TOKENS

    def step(self, tokens, positions):
        """The next token's logits (n, V) of the first n slots, given their last tokens.

        tokens, positions: lists of n int.
        """
        self.steps, self.rows = self.steps + 1, self.rows + len(tokens)
        longest = max(positions) + 1
        tokens = torch.tensor(tokens, device=self.device)
        positions = torch.tensor(positions, device=self.device)
        if self.device.type == "cuda":
            return self.replay(tokens, positions, longest)
        return self.forward(tokens, positions, longest)

    def forward(self, tokens, positions, longest):
        attend = self.cache.step(positions, longest)
        hidden = self.model.model(tokens[:, None], positions[:, None], attend)[:, 0]  # (n, hidden)
        return F.linear(hidden, self.model.head)

    def replay(self, tokens, positions, longest):
        """`forward` as a CUDA graph: one launch a step instead of hundreds.

        A graph has static shapes, so rows are rounded up to a power of two and the keys read to a
        multiple of 256. The rows beyond n write to free slots and are dropped.
        """
        n = len(tokens)
        rows = min(1 << (n - 1).bit_length(), self.slots)
        longest = min(-(-longest // 256) * 256, self.length)
        if (rows, longest) not in self.graphs:
            self.graphs[rows, longest] = self.capture(tokens, positions, rows, longest)
        graph, static_tokens, static_positions, logits = self.graphs[rows, longest]
        static_tokens.zero_()[:n] = tokens
        static_positions.zero_()[:n] = positions
        graph.replay()
        return logits[:n]

    def capture(self, tokens, positions, rows, longest):
        static = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
        static[0, : len(tokens)], static[1, : len(tokens)] = tokens, positions
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries allocate on their first call, a graph may not
            self.forward(static[0], static[1], longest)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self.forward(static[0], static[1], longest)
        return graph, static[0], static[1], logits


@torch.inference_mode()
def generate(
    model,
    prompts,
    num_samples=8,
    max_new_tokens=2048,
    temperature=0.8,
    top_p=0.95,
    stop_ids=(),
    seed=0,
    *,
    first_prompt=0,
    decoder=None,
    on_end=None,
):
    """Draws num_samples completions for each prompt (section 3.1: K = 8, 0.8, 0.95).

    prompts: lists of token ids, of any lengths. Returns one list a prompt of num_samples
    Completions. Each draws from a stream of its own, named by the seed, the index of its prompt
    (counted from first_prompt) and its own index; slots, neighbours and order do not touch it.
    A completion ends at a stop id, after max_new_tokens, or where the context is full.
    on_end(completion) is called as each ends. decoder: slots to decode in; by default as many as
    plan_slots allows.

    Continuous batching: a row that ends leaves at once, and its slot takes the next completion.
    Each prompt is prefilled once for its K completions.
    """
    rooms = [room_after(ids, model.config, f"prompt {i}") for i, ids in enumerate(prompts)]
    limits = [min(max_new_tokens, room) for room in rooms]
    completions = [[Completion() for _ in range(num_samples)] for _ in prompts]
    if not prompts:
        return completions
    if decoder is None:
        length = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
        slots, _ = plan_slots(model, length, len(prompts) * num_samples)
        decoder = Decoder(model, slots, length)
    stop_ids = frozenset(stop_ids)
    queue, waiting, active = deque(range(len(prompts))), deque(), []

    def choose(logits, rows):
        uniforms = [row.uniforms[len(row.completion.ids)] for row in rows]
        uniforms = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        return draw(logits, uniforms, temperature, top_p)

    def append(row, token):
        """Gives a row its next token; True when that ends it."""
        completion = row.completion
        completion.ids.append(token)
        completion.finished = token in stop_ids
        if not completion.finished and len(completion.ids) < row.limit:
            return False
        if on_end:
            on_end(completion)
        return True

    def prefill():
        """Prefills the next prompts and draws the first token of each of their completions."""
        batch = [queue.popleft()]
        while queue and decoder.fits([prompts[i] for i in (*batch, queue[0])], num_samples):
            batch.append(queue.popleft())
        parts, logits = decoder.prefill([prompts[i] for i in batch])
        rows = []
        for i, held in zip(batch, parts, strict=True):
            for j, completion in enumerate(completions[i]):
                uniforms = stream(seed, "completion", first_prompt + i, j).random(limits[i])
                row = Row(completion, uniforms.tolist(), len(prompts[i]), limits[i], held)
                rows.append(row)
        tokens = choose(logits.repeat_interleave(num_samples, dim=0), rows)
        waiting.extend(r for r, token in zip(rows, tokens, strict=True) if not append(r, token))

    def next_row():
        while queue and not waiting:
            prefill()
        return waiting.popleft() if waiting else None

    def start(row, slot):
        decoder.cache.write(slot, *torch.cat(row.held, dim=-2))
        active[slot : slot + 1] = [row]

    while True:
        while len(active) < decoder.slots and (row := next_row()):
            start(row, len(active))
        if not active:
            return completions
        last = [row.completion.ids[-1] for row in active]
        tokens = choose(decoder.step(last, [row.position for row in active]), active)
        gone = [i for i, (row, t) in enumerate(zip(active, tokens, strict=True)) if append(row, t)]
        for slot in reversed(gone):  # from the last, so that the row moved in is a live one
            row = next_row()
            if row:
                start(row, slot)
                continue
            moved = active.pop()
            if slot < len(active):
                active[slot] = moved
                decoder.cache.move(len(active), slot, moved.position)


def room_after(ids, config, where):
    """How many tokens may follow a prompt; refuses one that leaves no room in the context."""
    room = config.max_positions - len(ids)
    expect(ids and room > 0, where, f"{len(ids)} tokens", f"1 to {config.max_positions - 1}")
    return room


MOST_SLOTS = 256  # ours: beyond it a step costs nearly in proportion to its rows
DRAW_BYTES = 40  # a row's logit: itself, in float32, sorted whole with its order and float64 sums


def plan_slots(model, length, completions, memory=None):
    """(slots, bytes): how many slots of `length` positions the memory budget holds.

    memory: the cache's budget in bytes; by default 4 GiB on the CPU, and on a GPU 90% of its
    memory less what is allocated and what drawing takes. It does not ask what other programs left
    free, so that the same command forms the same batches.
    """
    weight = model.head
    slot_bytes = length * KVCache.bytes_per_token(model.config, weight.dtype)
    if memory is None:
        memory = 4 * GIB
        if weight.device.type == "cuda":
            total = torch.cuda.get_device_properties(weight.device).total_memory
            drawing = MOST_SLOTS * DRAW_BYTES * model.config.vocab_size
            memory = int(0.9 * total) - torch.cuda.memory_allocated(weight.device) - drawing
    slots = min(MOST_SLOTS, completions, memory // slot_bytes)
    least = f"at least {slot_bytes / GIB:.2f} GiB for one sequence of {length} tokens"
    expect(slots >= 1, "--cache-memory", f"{memory / GIB:.2f} GiB", least)
    return slots, slots * slot_bytes


# Files: instructions in, samples out


def read_instructions(path):
    """The rows of a file of instructions, each with its text under `instruction`.

    JSON lines, or .json holding a list; the text stands under `instruction`, `prompt` or
    `question` (AlpacaEval, Arena-Hard and GSM8K files work as they are).
    """
    path, rows = Path(path), []
    for place, row in read_json_list(path) if path.suffix == ".json" else read_jsonl(path):
        key = next((key for key in ("instruction", "prompt", "question") if key in row), None)
        expect(key, f"{path}:{place}", "no text", "one under instruction, prompt or question")
        text = row[key]
        good = isinstance(text, str) and text.strip()
        expect(good, f"{path}:{place}: {key}", repr(text)[:40], "a text")
        rows.append({**row, "instruction": text})
    expect(rows, path, "no instruction", "at least one")
    return rows


def read_json_list(path):
    """Yields (place in the list, row as a dict) of a .json file."""
    rows = parse_json(path, existing(path).read_bytes())
    expect(isinstance(rows, list), path, f"a {type(rows).__name__}", "a list of JSON objects")
    for place, row in enumerate(rows, 1):
        expect(isinstance(row, dict), f"{path}:{place}", repr(row)[:40], "a JSON object")
        yield place, row


@dataclass
class Options:
    """What a file of samples depends on, beside the checkpoint and the instructions."""

    thought: str = option(
        "specific", "thought prompt, the paper's default; none: no thought", choices=THOUGHT_PROMPTS
    )
    num_samples: int = option(8, "K, outputs an instruction; paper 3.1", low=1)
    temperature: float = option(0.8, "0 is greedy; paper 3.1", low=0, high=100)
    top_p: float = option(0.95, "mass of the nucleus; paper 3.1", low=1e-6, high=1)
    max_new_tokens: int = option(2048, "most tokens of an output; ours", low=1)
    cache_memory: float = option(
        None, "GiB for the KV cache; ours: 4 on the CPU, what is left on a GPU", low=0, kind=float
    )
    group: int = option(256, "instructions between two saves; ours", low=1)
    seed: int = option(0, "names every random stream", low=0)


def make_prompts(rows, tokenizer, options, config, path):
    """(text, ids) of each row's chat: one user turn, then the assistant's header."""
    prompts = []
    for number, row in enumerate(rows, 1):
        content = thought_prompt(row["instruction"], options.thought)
        text = tokenizer.render_chat([{"role": "user", "content": content}])
        ids = tokenizer.encode(text, add_special_tokens=False)
        room_after(ids, config, f"{path}: the prompt of instruction {number}")
        prompts.append((text, ids))
    return prompts


def sample_rows(model, tokenizer, rows, options, path, done=0, progress=True):
    """Yields, group by group from group `done` on, the samples of instructions.

    rows: read_instructions' dicts; path names their file in errors. The groups are fixed, so a
    run that goes on forms the very batches of one that was never stopped.
    """
    prompts = make_prompts(rows, tokenizer, options, model.config, path)
    length = min(
        max(len(ids) for _, ids in prompts) + options.max_new_tokens, model.config.max_positions
    )
    memory = None if options.cache_memory is None else int(options.cache_memory * GIB)
    in_a_group = min(options.group, len(rows)) * options.num_samples
    slots, cache = plan_slots(model, length, in_a_group, memory)
    decoder = Decoder(model, slots, length)
    if progress:
        budget = f"{slots} slots of {length} tokens, {cache / GIB:.2f} GiB of cache"
        print(f"sampling: {budget}", file=sys.stderr)
    start, tokens, began = done * options.group, 0, time.monotonic()
    total, before = len(rows) * options.num_samples, start * options.num_samples
    with tqdm(total=total, initial=before, unit="output", disable=not progress, smoothing=0) as bar:

        def on_end(completion):
            nonlocal tokens
            tokens += len(completion.ids)
            speed = tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update()

        for first in range(start, len(rows), options.group):
            group = slice(first, first + options.group)
            completions = generate(
                model,
                [ids for _, ids in prompts[group]],
                options.num_samples,
                options.max_new_tokens,
                options.temperature,
                options.top_p,
                tokenizer.stop_ids,
                options.seed,
                first_prompt=first,
                decoder=decoder,
                on_end=on_end,
            )
            yield [
                sample_row(row, prompt, outputs, tokenizer, options.thought)
                for row, prompt, outputs in zip(
                    rows[group], prompts[group], completions, strict=True
                )
            ]


def sample_row(row, prompt, completions, tokenizer, style):
    text, ids = prompt
    outputs = [read_output(completion, tokenizer, style) for completion in completions]
    made = {"thought_style": style, "prompt_text": text, "prompt_ids": ids, "outputs": outputs}
    return {**row, **made}


def read_output(completion, tokenizer, style):
    """One output of a samples file: the completion as text, cut into thought and response."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    # Special tokens drawn inside an output are left out, so that none reaches the judge's prompt.
    text = tokenizer.decode(ids, skip_special_tokens=True)
    thought, response = split_output(text, style) or (None, None)

    def tokens(text):
        return None if text is None else len(tokenizer.encode(text, add_special_tokens=False))

    return {
        "ids": completion.ids,
        "text": text,
        "thought": thought,
        "response": response,
        "finished": completion.finished,
        "thought_tokens": tokens(thought),
        "response_tokens": tokens(response),
    }


# Command line


def main():
    parser = argparse.ArgumentParser(description="Thought prompts in, K outputs each out.")
    add = parser.add_argument
    add("instruction", nargs="?", help="one instruction, answered to the terminal")
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--instructions", help="file of instructions (.jsonl, or .json holding a list)")
    add("--output", help="file of samples to write")
    add(
        "--format",
        choices=("jsonl", "alpaca_eval", "arena_hard"),
        default="jsonl",
        help="jsonl: samples (default); alpaca_eval, arena_hard: those tools' answer files",
    )
    add("--show-thought", action="store_true", help="show the thought of a single answer too")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and cache (default float32)")
    add_options(parser, Options)
    args = parser.parse_args()
    if (args.instruction is None) == (args.instructions is None):
        parser.error("expected either an instruction or --instructions FILE")
    if (args.instructions is None) != (args.output is None):
        parser.error("--instructions and --output go together")
    values = vars(args)
    if args.output is None or args.format != "jsonl":
        values.setdefault("num_samples", 1)  # what a terminal, or a benchmark's judge, reads
    options = read_options(Options, values)
    if args.output:
        sample_file(args, options)
    else:
        answer(args, options)


def sample_file(args, options):
    """A file of instructions to a file of samples; a second start goes on after the last group."""
    check_output(args.output)
    rows = read_instructions(args.instructions)
    for number, row in enumerate(rows if args.format == "arena_hard" else (), 1):
        where = f"{args.instructions}: instruction {number}"
        expect("uid" in row, where, "no uid", "one for --format arena_hard")
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    key = {
        **vars(options),
        "model": folder_hash(checkpoint_folder(args.model)),
        "dtype": args.dtype,
        "instructions": file_hash(args.instructions),
    }
    samples = args.output
    if args.format != "jsonl":  # aside, and named after the options, so that no others take it
        samples += f".{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}.samples"
    write_groups(
        samples,
        key,
        lambda done: sample_rows(model, tokenizer, rows, options, args.instructions, done),
    )
    if args.format == "jsonl":
        return
    sampled = (row for _, row in read_jsonl(samples))
    if args.format == "alpaca_eval":
        write_json(args.output, [alpaca_eval_row(row, args.model) for row in sampled])
    else:
        write_jsonl(args.output, (arena_hard_row(row, args.model) for row in sampled))
    os.unlink(samples)


def alpaca_eval_row(row, model):
    """What `alpaca_eval --model_outputs` reads; an output that cannot be cut answers nothing."""
    kept = {"dataset": row["dataset"]} if "dataset" in row else {}
    response = row["outputs"][0]["response"] or ""
    return {**kept, "instruction": row["instruction"], "output": response, "generator": model}


def arena_hard_row(row, model):
    """A line of Arena-Hard's data/.../model_answer/MODEL.jsonl; its judge reads `messages`."""
    output = row["outputs"][0]
    answer = {"role": "assistant", "content": {"answer": output["response"] or ""}}
    return {
        "uid": row["uid"],
        "model": model,
        "messages": [{"role": "user", "content": row["instruction"]}, answer],
        "metadata": {"token_len": output["response_tokens"] or 0},
    }


def answer(args, options):
    """One instruction to the terminal: the response, and on request the thought, dimmed."""
    rows = [{"instruction": args.instruction}]
    text = args.instruction.encode("utf-8", "ignore").decode()  # a bad byte comes as a surrogate
    expect(text == args.instruction and text.strip(), "instruction", repr(text), "a text in UTF-8")
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    (row,) = next(sample_rows(model, tokenizer, rows, options, "command line", progress=False))
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    for output in row["outputs"]:
        if output["response"] is None:
            hint = "" if args.show_thought else "; --show-thought shows the output whole"
            print(f"no response could be cut from this output{hint}", file=sys.stderr)
        if args.show_thought:
            thought = output["text"] if output["response"] is None else output["thought"]
            print(f"{dim}{thought}{plain}")
        if output["response"] is not None:
            print(output["response"])


if __name__ == "__main__":
    run_main(main)
