"""Sampling (sections 2.1 and 3.1): instructions in, K outputs of each out.

`thought_prompt` asks for a thought, `complete` draws K completions of each prompt, and
`split_output` finds the response in them, all that a judge sees.

    python sample.py --model DIR --instructions FILE --output FILE
    python sample.py --model DIR "an instruction"    # answered to the terminal
    python sample.py --model DIR                     # so is each line of its input

A row of samples, from another program too, must have

    instruction     what the judge reads before a response
    prompt_ids      the chat up to the model's turn
    outputs         a list, each with
        ids         the tokens drawn next, with the stop token: dpo.py trains on them
        finished    whether a stop token ended it; if not, it failed
        thought     "" where none was asked for; null where not parsed
        response    what the judge reads; null or empty: it failed
"""

import math
import re
import sys
from collections import deque, namedtuple
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from model import DTYPES, GIB, Device, InputError, KVCache
from model import check_output, checkpoint_folder, hash_of, load_model, load_tokenizer
from model import logits_of, make_parser, option, options_of, pack, progress_bar
from model import random_stream, read_jsonl, run_main, write_json, write_jsonl, write_rows

import numpy as np
import torch

# The paper's thought prompts, word for word (section 2.1, Figure 2).
GENERIC = (
    "Respond to the following user query in a comprehensive and detailed way. You can "
    "write down your thought process before responding. Write your thoughts after "
    '"Here is my thought process:" and write your response after "Here is my response:".'
)
SPECIFIC = (
    "Respond to the following user query in a comprehensive and detailed way. But first "
    "write down your internal thoughts. This must include your draft response and its "
    'evaluation. After this, write your final response after "<R>".'
)
QUERY = "\nUser query: {instruction}"
THOUGHT = "Here is my thought process:"
RESPONSE = "Here is my response:"
SYSTEM = "You are a helpful assistant. "  # before GENERIC as a system turn

# A chat's turns, with the instruction in them, and what separates an output into its parts.
Style = namedtuple("Style", "system user thought_marker response_marker")

STYLES = {  # a new style is one entry; --thought then takes its name
    "specific": Style(None, SPECIFIC + QUERY, None, "<R>"),  # the paper's default
    "generic": Style(None, GENERIC + QUERY, THOUGHT, RESPONSE),
    "system": Style(SYSTEM + GENERIC, "{instruction}", THOUGHT, RESPONSE),  # draft A
    "none": Style(None, "{instruction}", None, None),  # direct baseline: no thought
}


def thought_prompt(instruction, style):
    """The user's turn that asks for a thought; style is a key of STYLES."""
    return STYLES[style].user.replace("{instruction}", instruction)  # it may have braces


def split_output(text, style):
    """(thought, response) of an output; None where the response marker is missing.

    >>> split_output("2 + 2, easy. **<R>** It is 4.", "specific")
    ('2 + 2, easy.', 'It is 4.')
    """
    _, _, thought_marker, response_marker = STYLES[style]
    if response_marker is None:
        return "", text.strip()
    first = marker_pattern(response_marker).search(text)
    if first is None:
        return None  # in training it becomes a rejected output (draft 2.2)
    thought = drop_markers(text[: first.start()], thought_marker)
    # Real models repeat a marker: copies right behind it are dropped, later ones stay.
    return thought, drop_markers(text[first.end() :], response_marker, thought_marker)


def marker_pattern(marker):
    """Finds a marker with the Markdown that models put around it (ours)."""
    colon = ":" if marker.endswith(":") else ""
    words = re.escape(marker.removesuffix(":"))
    heading = r"(?:(?m:^)[ \t]*\#{1,6}[ \t]*)?"
    opening = r"([*_]{0,3})[ \t]{0,8}"  # without a limit a long run of blanks takes minutes
    # Behind the colon: any * or _ before a blank, what had opened, or nothing. Or what had
    # opened, then the colon.
    closing = rf"(?:{colon}(?:[*_]{{1,3}}(?=\s|$)|[ \t]*\1|)|\1{colon})"
    # A heading may also end in #, or have a line of = or - below it.
    underline = r"(?m:[ \t]+\#{1,6}[ \t]*$)?(?:\n(?:={3,}|-{3,})[ \t]*(?=\n|$))?"
    return re.compile(heading + opening + words + closing + underline)


def drop_markers(text, *markers):
    """The stripped text without the markers that it begins with."""
    patterns = [marker_pattern(marker) for marker in markers if marker]
    text = text.strip()
    while matches := list(filter(None, (each.match(text) for each in patterns))):
        text = text[matches[0].end() :].strip()
    return text


def draw(logits, uniforms, temperature, top_p):
    """A token for each row, from softmax(logits / temperature) cut to its nucleus (3.1).

    logits (N, V) float; uniforms (N, 2) float64 in [0, 1). Returns N ids. The nucleus: the
    fewest likeliest tokens whose probabilities sum to top_p, lower ids first among equals.
    `nucleus` in tests/test_sample.py is the plain form, which sorts every row.
    """
    is_greedy = temperature < 1e-6  # a division by it could overflow
    # So that few rows are sorted, the first uniform draws from all V tokens. If that token is
    # in the nucleus, it is taken; if not, the second uniform draws from the nucleus. Exact: of
    # a token inside, P = p + P(outside) p / P(nucleus) = p / P(nucleus).
    probs = logits if is_greedy else (logits / temperature).softmax(-1)  # (N, V)
    ids = logits.argmax(-1) if is_greedy else draw_from(probs, uniforms[:, 0])  # (N,)
    p = probs.gather(-1, ids[:, None])[:, 0].tolist()  # waits for the device
    if not all(map(math.isfinite, p)):  # one NaN logit makes all probabilities NaN
        raise InputError("the model's logits are NaN or infinite: take another --dtype")
    if is_greedy or top_p >= 1:
        return ids.tolist()
    # Where p > 1 - top_p, all others sum to less than top_p: inside. The rest is weighed
    # (1e-4: what rounding may do).
    rows = [i for i in range(len(p)) if p[i] <= 1 - top_p + 1e-4]
    masses = likelier_mass(probs[rows], ids[rows]).tolist()
    rows = [i for i, mass in zip(rows, masses, strict=True) if mass >= top_p]  # outside
    if rows:
        ranked, order = probs[rows].sort(descending=True, stable=True)  # (n, V) each
        mass_before = ranked.cumsum(-1, dtype=torch.float64) - ranked
        places = draw_from(ranked * (mass_before < top_p), uniforms[rows, 1])  # (n,)
        ids[rows] = order.gather(-1, places[:, None])[:, 0]
    return ids.tolist()


def likelier_mass(probs, ids):
    """The mass in probs (N, V) of the tokens ranked before ids (N,): (N,)."""
    p = probs.gather(-1, ids[:, None])  # (N, 1)
    has_lower_id = torch.arange(probs.shape[-1], device=probs.device) < ids[:, None]
    ranks_before = (probs > p) | ((probs == p) & has_lower_id)  # (N, V)
    return (probs * ranks_before).sum(-1, dtype=torch.float64)


def draw_from(probs, uniforms):
    """Draws an index from each row of probs (N, V), of any sum, by its uniform (N,)."""
    # First a block, then a place in it: faster than one float64 sum over the row.
    size = math.gcd(probs.shape[-1], 128)
    blocks = probs.unflatten(-1, (-1, size))  # (N, V / size, size)
    block, rest = invert_cdf(blocks.sum(-1), uniforms)  # (N,) each
    rows = torch.arange(len(probs), device=probs.device)
    place, _ = invert_cdf(blocks[rows, block], rest)  # of (N, size)
    return block * size + place


def invert_cdf(weights, uniforms):
    """Where each row's CDF of weights (N, M) passes its uniform (N,): index and rest."""
    # rest: how far into the index's step the uniform lies, which is uniform again.
    cdf = weights.cumsum(-1, dtype=torch.float64)  # in float32 small terms would be lost
    cdf = cdf / cdf[:, -1:]  # it ends at 1, above any uniform; right=True passes weights of 0
    uniforms = uniforms[:, None].contiguous()  # (N, 1)
    indices = torch.searchsorted(cdf, uniforms, right=True)  # (N, 1)
    indices = indices.clamp(max=cdf.shape[-1] - 1)  # it is M where the CDF is NaN
    high = cdf.gather(-1, indices)  # (N, 1)
    low = torch.where(indices > 0, cdf.gather(-1, (indices - 1).clamp(min=0)), 0)
    rest = (uniforms - low) / (high - low)  # (N, 1)
    return indices[:, 0], rest.clamp(max=1 - 2**-53)[:, 0]  # rounding may reach 1


@dataclass
class Completion:
    ids: list = field(default_factory=list)  # with the stop token
    finished: bool = False  # whether a stop token ended it
    prompt: list | None = None  # of ids
    stream: tuple = ()  # what names its random stream
    name: object = None  # the caller's own
    uniforms: np.ndarray | None = None  # (limit, 2): two for each token

    @property
    def position(self):  # of its last token, which is not cached yet
        return len(self.prompt) + len(self.ids) - 1

    def ends(self, stop_ids):
        self.finished = self.ids[-1] in stop_ids
        return self.finished or len(self.ids) == len(self.uniforms)  # its limit


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
):
    """Draws num_samples completions of each prompt (section 3.1: K = 8, 0.8, 0.95).

    prompts: lists of ids. Returns a list of Completions for each, which end at a stop id,
    after max_new_tokens, or where the context is full. names: one a prompt, seeds its random
    streams; by default its index. InputError for a prompt that fills the context.
    """
    if not prompts:
        return []
    names = list(names or range(len(prompts)))
    if len(set(names)) < len(names):  # they would draw the same
        raise ValueError("two prompts have one name")
    completions = []
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        check_prompt(prompt, model.config, f"prompt {i}")
        # One stream each, so other rows change a draw only through rounding.
        streams = [(seed, "completion", name, j) for j in range(num_samples)]
        completions.append([Completion(prompt=prompt, stream=each) for each in streams])
    options = Options("none", num_samples, temperature, top_p, max_new_tokens)
    decoder = decoder or decoder_for(model, prompts, options)
    for row in complete(decoder, deque(completions), options, stop_ids):
        row.uniforms = None  # to free its memory
    return completions


@torch.inference_mode()
def complete(decoder, groups, options, stop_ids):
    """Continuous batching: yields each Completion as soon as it ends.

    groups: a deque of lists of Completions, each list of one prompt. The caller may add
    groups meanwhile.
    """
    waiting = deque()  # (row, its prompt's keys and values), without a slot
    active = []  # rows by slot: always slots 0 to len(active) - 1, for Decoder.replay
    while True:
        # 1. Admit: rows take the free slots.
        while len(active) < decoder.slots and (waiting or groups):
            if not waiting:
                waiting += start_rows(decoder, groups, options)
            row, keys_values = waiting.popleft()
            if row.ends(stop_ids):  # at its first token
                yield row
            else:
                decoder.cache.write(len(active), *keys_values)
                active.append(row)
        if not active:
            return
        # 2. Step: one token a row.
        tokens = [row.ids[-1] for row in active]
        logits = decoder.step(tokens, [row.position for row in active])  # (n, V)
        extend(active, logits, options)
        # 3. Retire, the last slot first: a row that fills a gap has been checked already.
        for slot in reversed(range(len(active))):
            row = active[slot]
            if row.ends(stop_ids):
                last = active.pop()
                if last is not row:
                    active[slot] = last
                    decoder.cache.move(len(active), slot, last.position)
                yield row


def start_rows(decoder, groups, options):
    """Takes groups, prefills each prompt once, and draws the first tokens."""
    batch = []
    num_tokens = 0
    while groups:
        num_tokens += len(groups[0][0].prompt)
        if batch and num_tokens > decoder.prefill_tokens:
            break
        batch.append(groups.popleft())
    prefilled = decoder.prefill([group[0].prompt for group in batch])
    started = []
    for group, keys_values, logits in zip(batch, *prefilled, strict=True):
        limit = min(options.max_new_tokens, decoder.context - len(group[0].prompt))
        for row in group:
            row.uniforms = random_stream(*row.stream).random((limit, 2))
            started.append((row, keys_values))
        extend(group, logits.expand(len(group), -1), options)  # (K, V)
    return started


def extend(rows, logits, options):
    """Draws the next token of n rows from their logits (n, V)."""
    uniforms = np.stack([row.uniforms[len(row.ids)] for row in rows])  # (n, 2)
    # non_blocking: the step may still be computing the logits.
    uniforms = torch.from_numpy(uniforms).to(logits.device, non_blocking=True)
    tokens = draw(logits, uniforms, options.temperature, options.top_p)
    for row, token in zip(rows, tokens, strict=True):
        row.ids.append(token)


class Decoder:
    """A model and its KV cache of `slots` rows of `length` positions each."""

    def __init__(self, model, slots, length):
        self.model = model
        self.slots = slots
        self.length = length
        self.context = model.config.max_position_embeddings
        self.cache = KVCache(model.config, slots, length, model.device, model.dtype)
        self.prefill_tokens = 2048  # ours: most tokens of prompts prefilled together
        self.graphs = {}  # CUDA graphs by their number of rows

    def prefill(self, prompts):
        """Keys and values, (2, layers, KV, T, head_dim) a prompt, and logits (n, V)."""
        # All prompts in one row of N tokens; each sees itself alone.
        tokens, positions, attend = pack([(ids, None) for ids in prompts], self.model.device)
        layers = []

        def record(layer, q, k, v):
            layers.append(torch.cat([k, v]))  # (2, KV, N, head_dim)
            return attend(layer, q, k, v)

        lengths = [len(ids) for ids in prompts]
        last = (np.cumsum(lengths) - 1).tolist()  # of each prompt
        (hidden,) = self.model.model(tokens, positions, record, keep=last)  # (n, hidden)
        keys_values = torch.stack(layers, dim=1).split(lengths, dim=3)
        return keys_values, logits_of(hidden, self.model.head)

    def step(self, tokens, positions):
        """Logits (n, V). tokens, positions: lists, the last token of slots 0 to n - 1."""
        inputs = torch.tensor([tokens, positions], device=self.model.device)  # (2, n)
        if inputs.is_cuda:
            return self.replay(inputs)  # a view: the next step overwrites it
        return self.forward(inputs, max(positions) + 1)

    def forward(self, inputs, length):
        """The step as it is, reading `length` keys: (2, n) -> (n, V)."""
        tokens, positions = inputs
        attend = self.cache.step(positions, length)
        hidden = self.model.model(tokens[:, None], positions[:, None], attend)
        return logits_of(hidden[:, 0], self.model.head)  # of (n, hidden)

    def replay(self, inputs):
        """`forward` as a CUDA graph: one launch a step instead of hundreds."""
        n = inputs.shape[1]
        # A graph has a fixed shape: rows are rounded up to a power of two. Those beyond n
        # write to position 0 of free slots, so active rows must have the slots 0 to n - 1.
        rows = min(1 << (n - 1).bit_length(), self.slots)
        if not self.graphs:  # graphs have fixed addresses too: all share these buffers
            self.inputs = inputs.new_zeros(2, self.slots)
            self.logits = torch.empty(self.slots, len(self.model.head), device=inputs.device)
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
        self.inputs.zero_()
        self.inputs[:, :n] = inputs
        if rows not in self.graphs:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # libraries allocate on their first call
                self.forward(self.inputs[:, :rows], self.length)
            self.graphs[rows] = torch.cuda.CUDAGraph()
            # With all self.length keys: later replays of this graph stand further on.
            with torch.cuda.graph(self.graphs[rows], pool=self.pool, stream=self.stream):
                self.logits[:rows] = self.forward(self.inputs[:, :rows], self.length)
        self.graphs[rows].replay()
        return self.logits[:n]


def check_prompt(prompt, config, where):
    """Refuses a prompt that leaves no room in the context."""
    most = config.max_position_embeddings - 1
    if not 0 < len(prompt) <= most:
        raise InputError(f"{where} has {len(prompt)} tokens: 1 to {most} leave room for more")


def decoder_for(model, prompts, options):
    """A Decoder whose slots hold the longest prompt with its completion."""
    longest = max(map(len, prompts)) + options.max_new_tokens
    length = min(longest, model.config.max_position_embeddings)
    completions = len(prompts) * options.num_samples
    slots = plan_slots(model, length, completions, options.cache_memory)
    return Decoder(model, slots, length)


def plan_slots(model, length, completions, memory=None):
    """How many slots of `length` positions fit into `memory` GiB (default 4, or a GPU's)."""
    config = model.config
    most = 256  # ours: beyond it a step costs nearly in proportion to its rows
    heads = config.num_hidden_layers * config.num_key_value_heads
    slot_bytes = 2 * length * heads * config.head_dim * model.dtype.itemsize
    room = (4 if memory is None else memory) * GIB
    if memory is None and model.device.type == "cuda":
        # Of total, not free, memory: equal commands get equal batches.
        room = 0.9 * torch.cuda.get_device_properties(model.device).total_memory
        room -= sum(p.nbytes for p in model.parameters())
        room -= most * 40 * config.vocab_size  # `draw` takes 40 bytes a logit
    slots = min(most, completions, int(room // slot_bytes))
    if slots < 1:
        sizes = f"{slot_bytes / GIB:.2f} GiB, and there are {room / GIB:.2f}"
        raise InputError(f"--cache-memory: one sequence of {length} tokens takes {sizes}")
    return slots


@dataclass
class Options:
    # What samples depend on, beside the checkpoint and the instructions.
    thought: str = option("specific", "thought prompt; paper's default", choices=tuple(STYLES))
    num_samples: int = option(8, "K, outputs of each prompt, paper 3.1; 1 for an answer", low=1)
    temperature: float = option(0.8, "0 is greedy; paper 3.1", low=0, high=100)
    top_p: float = option(0.95, "probability of the nucleus; paper 3.1", low=1e-6, high=1)
    max_new_tokens: int = option(2048, "most tokens of an output; ours", low=1)
    resample: int = option(0, "more tries without a response; ours: 3 for an answer", low=0)
    cache_memory: float = option(None, "GiB of the KV cache (default 4, or all of a GPU)", low=0)
    seed: int = option(0, "names every random stream", low=0)


def read_instructions(path):
    """Rows of JSON lines or one JSON list, each with its text as `instruction`."""
    rows = []
    for place, row in read_jsonl(path):
        name = next((n for n in ("instruction", "prompt", "question") if n in row), None)
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place}: no text under instruction, prompt or question")
        if name == "instruction" and row.get("input"):  # of Alpaca
            if not isinstance(row["input"], str):
                raise InputError(f"{place}: input is not a text")
            # popped: the samples, read again, must not add it twice.
            text += "\n\n" + row.pop("input")
        rows.append({**row, "instruction": text})
    if not rows:
        raise InputError(f"{path}: there is no instruction in it")
    return rows


def make_prompts(rows, tokenizer, style, config, path):
    """The rows with `prompt_text` and `prompt_ids`, the chat up to the model's turn."""
    system = STYLES[style].system
    turns = []
    if system is not None:
        check_system_turn(tokenizer, system, f"--thought {style} needs it")
        turns.append({"role": "system", "content": system})
    prompts = []
    for number, row in enumerate(rows, 1):
        user = {"role": "user", "content": thought_prompt(row["instruction"], style)}
        text = tokenizer.render_chat([*turns, user])
        ids = tokenizer.encode(text, add_special_tokens=False)  # BOS is in the template
        check_prompt(ids, config, f"{path}: the prompt of instruction {number}")
        prompts.append({**row, "prompt_text": text, "prompt_ids": ids})
    return prompts


def check_system_turn(tokenizer, system, reason):
    """Refuses a chat template that drops the system turn, as some do without a word."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    if system not in tokenizer.render_chat(messages):
        raise InputError(f"{tokenizer.folder}: chat_template drops the system turn; {reason}")


def sample_file(model, tokenizer, rows, options, path, key, source, label="sampling"):
    """Samples rows into the file `path`; the same call resumes.

    source: names the rows in errors. key: what else the samples depend on.
    """
    rows = make_prompts(rows, tokenizer, options.thought, model.config, source)
    decoder = decoder_for(model, [row["prompt_ids"] for row in rows], options)
    make_rows = partial(sample_rows, decoder, tokenizer, options, label, rows)
    write_rows(path, rows, {**vars(options), **key}, make_rows)


def sample_rows(decoder, tokenizer, options, label, rows, rest):
    """Yields `rest`, the rows not yet written (the end of `rows`), with `outputs`."""
    K = options.num_samples
    start = len(rows) - len(rest)
    unwritten = deque()
    groups = deque()
    for i, row in enumerate(rest, start):
        row = {**row, "outputs": [None] * K}
        unwritten.append(row)
        groups.append([])
        for j in range(K):
            named = {"stream": (options.seed, "completion", i, j), "name": (i, row, j, 1)}
            groups[-1].append(Completion(prompt=row["prompt_ids"], **named))
    with progress_bar(label, len(rows) * K, start * K, "outputs") as bar:
        for completion in complete(decoder, groups, options, tokenizer.stop_ids):
            i, row, j, attempt = completion.name
            output = read_output(completion, tokenizer, options.thought)
            if not output["response"] and attempt <= options.resample:
                # Again (draft 3.5), next in line; the seed's part names the try, and j.
                attempt += 1
                stream = (f"{options.seed}/try-{attempt}/{j}", "completion", i, 0)
                again = replace(completion, ids=[], stream=stream, name=(i, row, j, attempt))
                groups.appendleft([again])
                continue
            row["outputs"][j] = {**output, "tries": attempt}
            bar.update()
            while unwritten and None not in unwritten[0]["outputs"]:
                yield unwritten.popleft()  # the file's rows are in order


def read_output(completion, tokenizer, style):
    """A completion as text, parsed into thought and response: an output of a file."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    text = tokenizer.decode(ids, skip_special_tokens=True)  # none drawn reaches a judge
    output = {"ids": completion.ids, "text": text, "finished": completion.finished, "tries": 1}
    thought, response = split_output(text, style) or (None, None)
    for name, part in (("thought", thought), ("response", response)):
        ids = None if part is None else tokenizer.encode(part, add_special_tokens=False)
        output |= {name: part, f"{name}_tokens": None if ids is None else len(ids)}
    return output


def answer(args, options, model, tokenizer):
    """Prints the answer to an instruction, or to each line of standard input."""
    # Lines that are not blank, if no instruction was given.
    lines = [args.instruction] if args.instruction else filter(str.strip, sys.stdin)
    for text in lines:
        data = text.rstrip("\n").encode(errors="surrogateescape")
        rows = [{"instruction": data.decode(errors="replace")}]  # its bytes may not be UTF-8
        rows = make_prompts(rows, tokenizer, options.thought, model.config, "terminal")
        decoder = decoder_for(model, [rows[0]["prompt_ids"]], options)
        (row,) = sample_rows(decoder, tokenizer, options, "answering", rows, rows)
        for output in row["outputs"]:
            if args.show_thought:  # where nothing was parsed, all of the output
                print(output["text"] if output["thought"] is None else output["thought"])
            print(output["response"] or "no response in the output")


def answer_row(row, output, form, generator):
    """An output as `alpaca_eval --model_outputs` or Arena-Hard's model_answer has it."""
    response = output["response"] or ""
    if form == "alpaca_eval":
        given = {key: row[key] for key in ("dataset", "instruction") if key in row}
        return {**given, "output": response, "generator": generator}
    user = {"role": "user", "content": row["instruction"]}
    messages = [user, {"role": "assistant", "content": {"answer": response}}]
    length = {"token_len": output["response_tokens"] or 0}
    return {"uid": row["uid"], "model": generator, "messages": messages, "metadata": length}


def answer_file(args, options, model, tokenizer):
    """Samples a file of instructions into --output, in one of the three formats."""
    rows = read_instructions(args.instructions)
    for number, row in enumerate(rows, 1):
        if args.format == "arena_hard" and "uid" not in row:
            raise InputError(f"{args.instructions}: instruction {number} has no uid")
    weights = hash_of(checkpoint_folder(args.model))
    inputs = [weights, args.dtype, hash_of(Path(args.instructions))]  # a Path: its contents
    samples = Path(args.output)
    if args.format != "jsonl":  # named by its options: only the same ones resume it
        name = hash_of([inputs, vars(options)])[:8]
        samples = Path(f"{args.output}.{name}.samples")
    if not samples.exists():
        key = {"model, dtype, instructions": inputs}
        sample_file(model, tokenizer, rows, options, samples, key, args.instructions)
    drawn = []
    for _, row in read_jsonl(samples):
        drawn += [(row, output) for output in row["outputs"]]
    parsed = sum(bool(output["response"]) for _, output in drawn) / len(drawn)
    print(f"{len(drawn):,} outputs, {parsed:.1%} with a response")
    if args.format == "jsonl":
        return
    is_alpaca = args.format == "alpaca_eval"
    # Arena-Hard's loader knows a model by its file's name.
    generator = args.model if is_alpaca else Path(args.output).stem
    answers = [answer_row(*pair, args.format, generator) for pair in drawn]
    (write_json if is_alpaca else write_jsonl)(args.output, answers)
    samples.unlink()


def main():
    parser = make_parser("Instructions in, K outputs of each out.", Options, Device)
    add = parser.add_argument
    add("instruction", nargs="?", help="one instruction, answered to the terminal")
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--instructions", help="file of instructions, JSON lines or a JSON list")
    add("--output", help="file to write")
    formats = ("jsonl", "alpaca_eval", "arena_hard")
    add("--format", choices=formats, default="jsonl", help="samples, or those tools' answer files")
    add("--show-thought", action="store_true", help="show the thought of an answer too")
    args = parser.parse_args()
    if args.output is None or args.format != "jsonl":
        # An answer is read, not compared: one, and drawn again without a response (draft 3.5).
        parser.set_defaults(num_samples=1, resample=3)
        args = parser.parse_args()
    if (args.instructions is None) != (args.output is None):
        raise InputError("--instructions and --output go together: one of them is missing")
    if args.output is None and args.format != "jsonl":
        raise InputError("--format is a file's: give --instructions and --output too")
    if args.output is not None and args.show_thought:
        raise InputError("--show-thought shows it on the terminal: leave it out with --output")
    if args.instruction is not None:
        if args.output is not None:
            raise InputError("an instruction and --output were given: give one of them")
        if not args.instruction.strip():
            raise InputError("the instruction is empty")
    options = options_of(Options, args)
    device = options_of(Device, args)
    if args.output is not None:
        check_output(args.output)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, device.device, DTYPES[device.dtype])
    work = answer if args.output is None else answer_file
    work(args, options, model, tokenizer)


if __name__ == "__main__":
    run_main(main, resumes=any(word.startswith("--output") for word in sys.argv))
