"""Sampling (sections 2.1 and 3.1): thought prompts in, K outputs an instruction out.

`generate` draws K completions for each prompt; `split_output` cuts each into its thought and its
response. In: a checkpoint and a file of instructions. Out: a file of samples, one line an
instruction: its fields, `prompt_ids`, and `outputs` with `ids`, `thought`, `response`, `finished`.

    python sample.py --model DIR --instructions FILE --output FILE    # K samples an instruction
    python sample.py --model DIR "an instruction"                     # one answer to the terminal
    python sample.py --model DIR                                      # instructions, one a line
"""

import sys
import time
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

import model as lm

import numpy as np
import torch

# Thought prompts (section 2.1, Figure 2), verbatim. The marker before the response cuts an output.
GENERIC = (
    "Respond to the following user query in a comprehensive and detailed way. You can write down "
    'your thought process before responding. Write your thoughts after "Here is my thought '
    'process:" and write your response after "Here is my response:".'
)
SPECIFIC = (
    "Respond to the following user query in a comprehensive and detailed way. But first write down "
    "your internal thoughts. This must include your draft response and its evaluation. After this, "
    'write your final response after "<R>".'
)
THOUGHT_PROMPTS = {  # of the user's turn
    "specific": SPECIFIC + "\nUser query: {instruction}",
    "generic": GENERIC + "\nUser query: {instruction}",
    "system": "{instruction}",  # the prompt stands in a system turn
    "none": "{instruction}",  # the direct baseline: same loop, same judge, no thought
}
SYSTEM_PROMPT = "You are a helpful assistant. " + GENERIC  # draft, appendix A
THOUGHT_MARKER, MARKER = "Here is my thought process:", "Here is my response:"
RESPONSE_MARKERS = {"specific": "<R>", "generic": MARKER, "system": MARKER}


def thought_prompt(instruction, style):
    """The user's turn that asks for a thought before the response; style names the prompt."""
    return THOUGHT_PROMPTS[style].replace("{instruction}", instruction)


def split_output(text, style):
    """(thought, response) of an output, stripped, cut at the first marker; None without one.

    >>> split_output("Draft: 4. Looks right. <R> It is 4.", "specific")
    ('Draft: 4. Looks right.', 'It is 4.')
    """
    if style == "none":
        return "", text.strip()
    thought, marker, response = text.partition(RESPONSE_MARKERS[style])
    if not marker:
        return None
    if style != "specific":
        thought = thought.strip().removeprefix(THOUGHT_MARKER)
    return thought.strip(), response.strip()


def draw(logits, uniforms, temperature, top_p):
    """One token a row from softmax(logits / temperature) cut at top-p.

    logits (N, V); uniforms (N, 2) float64 in [0, 1). Returns a list of N ids. The nucleus is the
    fewest most likely tokens whose probabilities reach top_p, of equally likely ones the first.

    A token drawn from the whole V is kept if the likelier ones have less than top_p; if not, the
    nucleus is drawn from. So few rows are sorted, and the README's benchmark is 1.6 times as fast.
    """
    finite = logits.amax(-1).isfinite()
    outside = torch.zeros_like(finite)
    if temperature < 1e-6:  # greedy: the division could overflow
        ids = logits.argmax(-1)
    else:
        probs = (logits / temperature).softmax(-1)  # (N, V)
        ids = invert_cdf(probs, uniforms[:, 0])
        if top_p < 1:
            p = probs.gather(-1, ids[:, None])  # (N, 1)
            before = torch.arange(probs.shape[-1], device=p.device) < ids[:, None]
            likelier = (probs > p) | (probs == p) & before
            outside = (probs * likelier).sum(-1, dtype=torch.float64) >= top_p
    outside, finite = torch.stack([outside, finite]).tolist()  # waits for the device
    lm.expect(all(finite), "the model's logits", "NaN or infinity", "finite: another --dtype")
    if any(outside):
        ranked, order = probs[outside].sort(descending=True, stable=True)  # (n, V)
        mass = ranked.cumsum(-1, dtype=torch.float64) - ranked  # of the likelier ones
        places = invert_cdf(ranked * (mass < top_p), uniforms[outside, 1])
        ids[outside] = order.gather(-1, places[:, None])[:, 0]
    return ids.tolist()


def invert_cdf(probs, uniforms):
    """Where the CDF of each row of probs (N, V) passes uniforms (N,): indices (N,)."""
    cdf = probs.cumsum(-1, dtype=torch.float64)  # in float64 V small terms lose nothing
    cdf /= cdf[:, -1:].clone()  # the last token with probability reaches 1, which no uniform does
    places = torch.searchsorted(cdf, uniforms[:, None].contiguous(), right=True)[:, 0]
    return places.clamp(max=probs.shape[-1] - 1)  # beyond V where it is NaN


@dataclass
class Completion:
    """ids: the tokens drawn, the stop token included. finished: whether one was drawn."""

    ids: list[int]
    finished: bool
    uniforms: np.ndarray | None = None  # two for each token it may have; None when it has ended
    position: int = 0  # where its last token goes in the cache


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
    names=None,
    decoder=None,
    on_end=None,
):
    """Draws num_samples completions for each prompt (section 3.1: K = 8, 0.8, 0.95).

    prompts: lists of token ids. Returns one list a prompt of num_samples Completions. Each draws
    from a stream of its own, named by the seed, its prompt's name (by default the index) and its
    own index; the rest of the batch does not matter. It ends at a stop id, after max_new_tokens, or
    where the context is full; on_end(completion) is called then.
    """
    if not prompts:
        return []
    names, stop_ids = names or range(len(prompts)), frozenset(stop_ids)
    completions = []
    for i, (name, ids) in enumerate(zip(names, prompts, strict=True)):
        limit = min(max_new_tokens, room_after(ids, model.config, f"prompt {i}"))
        rngs = [lm.stream(seed, "completion", name, j) for j in range(num_samples)]
        completions += [[Completion([], False, s.random((limit, 2)), len(ids) - 1) for s in rngs]]
    decoder = decoder or decoder_for(model, prompts, len(prompts) * num_samples, max_new_tokens)

    def uniforms_of(rows):  # uploaded before the step, for which a later copy would wait
        numbers = [row.uniforms[len(row.ids)] for row in rows]
        return torch.tensor(np.stack(numbers), device=decoder.device)  # (n, 2)

    def ended(row, token):
        """Gives a row its next token; True when that ends it."""
        row.ids.append(token)
        row.position += 1
        row.finished = token in stop_ids
        if row.finished or len(row.ids) == len(row.uniforms):
            row.uniforms = None
            if on_end:
                on_end(row)
        return row.uniforms is None

    def arrivals():
        """Rows with their first token; a prompt is prefilled once for its K completions."""
        parts = lm.fill(prompts, map(len, prompts), decoder.prefill_tokens)
        prefilled = (one for part in parts for one in zip(*decoder.prefill(part), strict=True))
        for own, (held, logits) in zip(completions, prefilled, strict=True):
            tokens = draw(logits.expand(len(own), -1), uniforms_of(own), temperature, top_p)
            for row, token in zip(own, tokens, strict=True):
                if not ended(row, token):
                    yield row, held

    queue, active = arrivals(), []  # active: rows by their slot
    while True:
        # 1. Admit: new rows take the free slots at once (continuous batching).
        for row, held in islice(queue, decoder.slots - len(active)):
            decoder.cache.write(len(active), *held)
            active.append(row)
        if not active:
            return completions
        # 2. Step: one token a row.
        uniforms = uniforms_of(active)
        logits = decoder.step([row.ids[-1] for row in active], [row.position for row in active])
        tokens = draw(logits, uniforms, temperature, top_p)
        # 3. Retire: rows that ended leave, the last slot first, and the last row fills the gap.
        for slot in reversed(range(len(tokens))):
            if ended(active[slot], tokens[slot]):
                moved = active.pop()
                if slot < len(active):
                    active[slot] = moved
                    decoder.cache.move(len(active), slot, moved.position)


class Decoder:
    """A model and its KV cache of `slots` rows of `length` positions each."""

    def __init__(self, model, slots, length):
        weight = model.head
        self.model, self.slots, self.length, self.device = model, slots, length, weight.device
        self.cache = lm.KVCache(model.config, slots, length, weight.device, weight.dtype)
        self.prefill_tokens = 2048  # ours: of prompts in one packed row; or one prompt
        self.graphs = {}  # by their number of rows

    def prefill(self, prompts):
        """Keys and values of n prompts, (2, layers, KV, T, head_dim) each, and logits (n, V)."""
        tokens, positions, attend = lm.pack([(ids, None) for ids in prompts], self.device)
        kept, lengths = [], [len(ids) for ids in prompts]

        def keep(layer, q, k, v):
            kept.append(torch.cat([k, v]))  # (2, KV, N, head_dim)
            return attend(layer, q, k, v)

        ends = [end - 1 for end in accumulate(lengths)]
        hidden = self.model.model(tokens, positions, keep, wanted=ends)[0]  # (n, hidden)
        held = torch.stack(kept, dim=1).split(lengths, dim=3)
        return held, lm.logits_of(hidden, self.model.head)

    def step(self, tokens, positions):
        """Logits (n, V) after the last tokens of the first n slots. tokens, positions: n int."""
        both = torch.tensor([tokens, positions], device=self.device)  # (2, n)
        if self.device.type == "cuda":
            return self.replay(both)
        return self.forward(both, max(positions) + 1)

    def forward(self, both, length):
        tokens, positions = both
        attend = self.cache.step(positions, length)
        hidden = self.model.model(tokens[:, None], positions[:, None], attend)[:, 0]  # (n, hidden)
        return lm.logits_of(hidden, self.model.head)

    def replay(self, both):
        """`forward` as a CUDA graph: one launch a step instead of hundreds."""
        # A graph's shape is fixed: rows are rounded up to a power of two, and any key may be read.
        # The rows beyond n write to free slots and are dropped.
        n = both.shape[1]
        rows = min(1 << (n - 1).bit_length(), self.slots)
        if not self.graphs:  # all graphs read, write and allocate in the same places
            self.inputs = torch.zeros(2, self.slots, dtype=torch.int64, device=self.device)
            self.logits = torch.empty(self.slots, len(self.model.head), device=self.device)
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.inputs.zero_()[:, :n] = both
        if rows not in self.graphs:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # libraries allocate on their first call
                self.forward(self.inputs[:, :rows], self.length)
            self.graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[rows], pool=self.pool, stream=self.stream):
                self.logits[:rows] = self.forward(self.inputs[:, :rows], self.length)
        self.graphs[rows].replay()
        return self.logits[:n]


def room_after(ids, config, where):
    """How many tokens may follow a prompt; refuses one that leaves no room in the context."""
    room = config.max_position_embeddings - len(ids)
    lm.expect(ids and room > 0, where, f"{len(ids)} tokens", f"1 to {len(ids) + room - 1}")
    return room


def plan_slots(model, length, completions, memory=None):
    """How many slots of `length` positions the memory budget holds.

    memory: in GiB; by default 4 on the CPU, and on a GPU 90% of it less the weights and what
    drawing takes. What is free at the moment is not asked: the same command forms equal batches.
    """
    weight, most = model.head, 256  # ours: beyond it a step costs nearly in proportion to its rows
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    slot_bytes = 2 * length * heads * model.config.head_dim * weight.itemsize
    room = (4 if memory is None else memory) * lm.GIB
    if memory is None and weight.is_cuda:
        room = 0.9 * torch.cuda.get_device_properties(weight.device).total_memory
        room -= sum(p.nbytes for p in model.parameters())
        room -= most * 40 * weight.shape[0]  # a logit, its probability, sorted with order and sums
    slots = min(most, completions, int(room // slot_bytes))
    least = f"{slot_bytes / lm.GIB:.2f} GiB or more for one sequence of {length} tokens"
    lm.expect(slots >= 1, "--cache-memory", f"{room / lm.GIB:.2f} GiB", least)
    return slots


def decoder_for(model, prompts, completions, max_new_tokens, memory=None):
    length = min(max(map(len, prompts)) + max_new_tokens, model.config.max_position_embeddings)
    return Decoder(model, plan_slots(model, length, completions, memory), length)


@dataclass
class Options:
    """What a file of samples depends on, beside the checkpoint and the instructions."""

    thought: str = lm.option("specific", "thought prompt; paper's default", choices=THOUGHT_PROMPTS)
    num_samples: int = lm.option(8, "K, outputs an instruction; paper 3.1", low=1)
    temperature: float = lm.option(0.8, "0 is greedy; paper 3.1", low=0, high=100)
    top_p: float = lm.option(0.95, "mass of the nucleus; paper 3.1", low=1e-6, high=1)
    max_new_tokens: int = lm.option(2048, "most tokens of an output; ours", low=1)
    resample: int = lm.option(0, "more tries for what cannot be cut; draft 3.5; ours: 3", low=0)
    cache_memory: float = lm.option(None, "GiB for the KV cache; ours: 4, or what a GPU has", low=0)
    group: int = lm.option(2048, "outputs between two saves; ours", low=1)
    seed: int = lm.option(0, "names every random stream", low=0)


EVALUATION = {"num_samples": 1, "resample": 3}  # where an answer is read (draft 3.5); the 3 is ours


def read_instructions(path):
    """Rows of a file, JSON lines or .json holding a list, each with its text as `instruction`."""
    listed, rows = Path(path).suffix == ".json", []
    for place, row in enumerate(lm.read_json(path, list), 1) if listed else lm.read_jsonl(path):
        lm.expect(isinstance(row, dict), f"{path}:{place}", repr(row)[:40], "a JSON object")
        text = row.get("instruction", row.get("prompt", row.get("question")))
        good = isinstance(text, str) and text.strip()
        expected = "a text under instruction, prompt or question"
        lm.expect(good, f"{path}:{place}", repr(text)[:40], expected)
        rows.append({**row, "instruction": text})
    lm.expect(rows, path, "no instruction", "at least one")
    return rows


def make_prompts(rows, tokenizer, style, config, path):
    """The rows with `prompt_text` and `prompt_ids`, the chat up to the model's turn."""
    made = []
    for place, row in enumerate(rows, 1):
        messages = [{"role": "user", "content": thought_prompt(row["instruction"], style)}]
        if style == "system":
            messages.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
        text, where = tokenizer.render_chat(messages), f"{tokenizer.folder}: chat_template"
        there = style != "system" or SYSTEM_PROMPT in text  # some templates drop the turn silently
        lm.expect(there, where, "no system role", "one: --thought system")
        ids = tokenizer.encode(text, add_special_tokens=False)
        room_after(ids, config, f"{path}: the prompt of instruction {place}")
        made.append({**row, "prompt_text": text, "prompt_ids": ids})
    return made


def sample_file(model, tokenizer, rows, options, path, key, source, label="sampling"):
    """Samples instructions into the file `path`; the same call resumes, with the same batches.

    rows: read_instructions' dicts, of the file `source`. key: what else the samples depend on.
    """
    rows = make_prompts(rows, tokenizer, options.thought, model.config, source)
    K, group = options.num_samples, max(1, options.group // options.num_samples)
    limits = (min(group, len(rows)) * K, options.max_new_tokens, options.cache_memory)
    decoder = decoder_for(model, [row["prompt_ids"] for row in rows], *limits)
    tokens, began = 0, time.monotonic()

    def sample_part(part, bar):
        def on_end(completion):
            nonlocal tokens
            tokens += len(completion.ids)
            speed = tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update()

        return sample_group(decoder, tokenizer, part, options, on_end)

    items, key = list(enumerate(rows)), {**vars(options), **key}
    lm.write_groups(path, items, group, key, sample_part, label, "outputs", K)


def sample_group(decoder, tokenizer, group, options, on_end=None):
    """Rows of samples for some (index, row of make_prompts), whose streams the index names."""
    law = (options.max_new_tokens, options.temperature, options.top_p, tokenizer.stop_ids)

    def draw_outputs(picked, num_samples, seed, on_end=None):
        prompts = [row["prompt_ids"] for _, row in picked]
        more = {"names": [i for i, _ in picked], "decoder": decoder, "on_end": on_end}
        found = generate(decoder.model, prompts, num_samples, *law, seed, **more)
        return [[read_output(c, tokenizer, options.thought) for c in own] for own in found]

    outputs = draw_outputs(group, options.num_samples, options.seed, on_end)
    # What cannot be cut is sampled again (draft 3.5); each try has a stream of its own too.
    for attempt in range(2, options.resample + 2):
        for j in range(options.num_samples):
            failed = [i for i, own in enumerate(outputs) if own[j]["response"] is None]
            seed = f"{options.seed}/try-{attempt}/{j}"
            again = draw_outputs([group[i] for i in failed], 1, seed)
            for i, (output,) in zip(failed, again, strict=True):
                outputs[i][j] = {**output, "tries": attempt}
    return [{**row, "outputs": own} for (_, row), own in zip(group, outputs, strict=True)]


def read_output(completion, tokenizer, style):
    """One output of a samples file: the completion as text, cut into thought and response."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    # Special tokens drawn inside an output are left out, so that none reaches the judge's prompt.
    text = tokenizer.decode(ids, skip_special_tokens=True)
    output = {"ids": completion.ids, "text": text, "finished": completion.finished, "tries": 1}
    parts = split_output(text, style) or (None, None)
    for name, part in zip(("thought", "response"), parts, strict=True):
        tokens = None if part is None else len(tokenizer.encode(part, add_special_tokens=False))
        output |= {name: part, f"{name}_tokens": tokens}
    return output


def main():
    parser = lm.make_parser("Thought prompts in, K outputs each out.", Options, lm.Device)
    add = parser.add_argument
    add("instruction", nargs="?", help="one instruction, answered to the terminal")
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--instructions", help="file of instructions (.jsonl, or .json holding a list)")
    add("--output", help="file to write")
    formats = ("jsonl", "alpaca_eval", "arena_hard")
    add("--format", choices=formats, default="jsonl", help="samples, or those tools' answer files")
    add("--show-thought", action="store_true", help="show the thought of an answer too")
    args = parser.parse_args()
    if args.output is None or args.format != "jsonl":  # one answer is read, not K compared
        parser.set_defaults(**EVALUATION)
        args = parser.parse_args()
    together = (args.instructions is None) == (args.output is None)
    lm.expect(together, "--instructions and --output", "one of them", "both or neither")
    lm.expect(None in (args.instruction, args.output), "an instruction", "--output too", "only one")
    if args.output is not None:
        lm.check_output(args.output)
    options, tokenizer = lm.options_of(Options, args), lm.load_tokenizer(args.model)
    where = lm.options_of(lm.Device, args)
    model = lm.load_model(args.model, where.device, lm.DTYPES[where.dtype])
    if args.output is None:
        return answer(args, options, model, tokenizer)
    rows, samples = read_instructions(args.instructions), args.output
    for place, row in enumerate(rows if args.format == "arena_hard" else (), 1):
        lm.expect("uid" in row, f"{args.instructions}: instruction {place}", "no uid", "one")
    key = {"model": lm.hash_of(lm.checkpoint_folder(args.model)), "dtype": args.dtype}
    key["instructions"] = lm.hash_of(Path(args.instructions))
    if args.format != "jsonl":  # aside, and named after the options, so that no others take it
        samples += f".{lm.hash_of([key, vars(options)])[:8]}.samples"
    sample_file(model, tokenizer, rows, options, samples, key, args.instructions)
    outputs = [(row, output) for _, row in lm.read_jsonl(samples) for output in row["outputs"]]
    cut = sum(output["response"] is not None for _, output in outputs)
    print(f"{len(outputs):,} outputs, {cut / len(outputs):.1%} cut into thought and response")
    if args.format != "jsonl":
        write = lm.write_json if args.format == "alpaca_eval" else lm.write_jsonl
        write(args.output, [answer_row(*pair, args.format, args.model) for pair in outputs])
        Path(samples).unlink()


def answer_row(row, output, form, model):
    """What `alpaca_eval --model_outputs` reads, or a line of Arena-Hard's model_answer file."""
    response = output["response"] or ""  # an output that cannot be cut answers nothing
    if form == "alpaca_eval":
        kept = {key: row[key] for key in ("dataset", "instruction") if key in row}
        return {**kept, "output": response, "generator": model}
    user = {"role": "user", "content": row["instruction"]}
    return {
        "uid": row["uid"],
        "model": model,
        "messages": [user, {"role": "assistant", "content": {"answer": response}}],
        "metadata": {"token_len": output["response_tokens"] or 0},
    }


def answer(args, options, model, tokenizer):
    """Answers to the terminal: each response, and on request its thought before it, dimmed."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    if args.instruction is None and sys.stdin.isatty():
        print("instructions, one a line; Ctrl-D ends")
    typed = (line.rstrip("\n") for line in sys.stdin if line.strip())
    for text in typed if args.instruction is None else [args.instruction]:
        lm.expect(text.strip(), "instruction", repr(text), "a text")
        row = {"instruction": text}
        (row,) = make_prompts([row], tokenizer, options.thought, model.config, "terminal")
        limits = (options.num_samples, options.max_new_tokens, options.cache_memory)
        decoder = decoder_for(model, [row["prompt_ids"]], *limits)
        (row,) = sample_group(decoder, tokenizer, [(0, row)], options)
        for output in row["outputs"]:
            cut = output["response"] is not None
            if args.show_thought:
                print(f"{dim}{output['thought'] if cut else output['text']}{plain}")
            print(output["response"] if cut else "no response could be cut; see --show-thought")


if __name__ == "__main__":
    lm.run_main(main)
