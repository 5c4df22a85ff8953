"""Sampling (sections 2.1 and 3.1): thought prompts in, K outputs an instruction out.

`thought_prompt` asks for a thought, `generate` draws K completions of each prompt, `split_output`
separates an output's thought from its response, the only part that a judge will see.

    python sample.py --model DIR --instructions FILE --output FILE    # K samples an instruction
    python sample.py --model DIR "an instruction"                     # one answer to the terminal
    python sample.py --model DIR                                      # instructions, one a line

In: a checkpoint and a file of instructions. Out: a file of samples, a JSON object an instruction.
judge.py takes such a file from another program too. It must have

    instruction         what the judge reads before a response
    prompt_ids          ids of the chat up to the model's turn, after which outputs were drawn
    outputs             one or more, each with
        ids             the tokens drawn; where finished, the last is the stop token that was drawn
        finished        true where a stop token ended it; false where the limit did: it has failed
        thought         its text, "" where none was asked for; null where there is no marker
        response        what the judge reads; null or empty: the output has failed

and may have `prompt_text`, and in an output `text` and `response_tokens`. Judges read texts alone;
dpo.py trains on the ids as they stand: without stop tokens the model would unlearn to stop.
"""

import re
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from model import (
    DTYPES,
    GIB,
    Device,
    InputError,
    KVCache,
    check_output,
    checkpoint_folder,
    hash_of,
    load_model,
    load_tokenizer,
    logits_of,
    make_parser,
    option,
    options_of,
    pack,
    progress_bar,
    random_stream,
    read_json_rows,
    read_jsonl,
    run_main,
    set_deterministic,
    write_json,
    write_jsonl,
    write_rows,
)

import numpy as np
import torch

# The paper's thought prompts, word for word (section 2.1, Figure 2).
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
QUERY = "\nUser query: {instruction}"
THOUGHT, RESPONSE = "Here is my thought process:", "Here is my response:"


class Style(NamedTuple):
    """One way to ask for a thought, and how its outputs are parsed."""

    system: str | None  # the system turn; None: there is none
    user: str  # the user's turn, the instruction in it
    thought_marker: str | None  # may stand before the thought
    response_marker: str | None  # separates the thought from the response; None: no thought


# A new style is one entry here; --thought then takes its name.
STYLES = {
    "specific": Style(None, SPECIFIC + QUERY, None, "<R>"),  # the paper's default
    "generic": Style(None, GENERIC + QUERY, THOUGHT, RESPONSE),
    # Draft, appendix A: the generic prompt as the system turn, the bare instruction as the user's.
    "system": Style("You are a helpful assistant. " + GENERIC, "{instruction}", THOUGHT, RESPONSE),
    # The direct baseline: the same loop and judge, without a thought.
    "none": Style(None, "{instruction}", None, None),
}


def thought_prompt(instruction, style):
    """The user's turn that asks for a thought before the response; style is a key of STYLES."""
    return STYLES[style].user.replace("{instruction}", instruction)


def split_output(text, style):
    """(thought, response) of an output, parsed at the first marker; None where there is none.

    >>> split_output("Draft: 4. Looks right. <R> It is 4.", "specific")
    ('Draft: 4. Looks right.', 'It is 4.')
    >>> split_output("Easy.\\n**Here is my response:**\\nHere is my response:\\nParis", "generic")
    ('Easy.', 'Paris')
    """
    style = STYLES[style]
    if style.response_marker is None:
        return "", text.strip()
    first = marker_pattern(style.response_marker).search(text)
    if first is None:
        return None
    thought = drop_markers(text[: first.start()], [style.thought_marker])
    # Real models repeat a marker: what follows at once belongs to it, a later one stays.
    response = drop_markers(text[first.end() :], [style.response_marker, style.thought_marker])
    return thought, response


def marker_pattern(marker):
    """A regular expression of a marker with the Markdown that models put around it (ours).

    `**<R>**`, `## Here is my response:`, `__Here is my response__:` are markers too.
    """
    colon = ":" if marker.endswith(":") else ""
    words = re.escape(marker.removesuffix(":"))
    heading = r"(?:(?m:^)[ \t]*\#{1,6}[ \t]*)?"
    opening = r"([*_]{0,3})[ \t]*"
    # Emphasis closes as it was opened, or where only blanks follow: there none can be opened.
    closing = rf"(?:{colon}(?:[*_]{{1,3}}(?=\s|$)|[ \t]*\1|)|\1{colon})"
    heading_end = r"(?m:[ \t]+\#{1,6}[ \t]*$)?"
    underline = r"(?:\n(?:={3,}|-{3,})[ \t]*(?=\n|$))?"
    return re.compile(heading + opening + words + closing + heading_end + underline)


def drop_markers(text, markers):
    """The stripped text without the markers, however many, that it begins with."""
    patterns = [marker_pattern(marker) for marker in markers if marker is not None]
    text = text.strip()
    while True:
        matches = [pattern.match(text) for pattern in patterns]
        found = next(filter(None, matches), None)
        if found is None:
            return text
        text = text[found.end() :].strip()


def draw(logits, uniforms, temperature, top_p):
    """One token a row from softmax(logits / temperature) truncated to its nucleus (section 3.1).

    logits (N, V) float; uniforms (N, 2) float64 in [0, 1). Returns a list of N ids. The nucleus is
    the fewest most likely tokens whose probabilities sum to top_p; of equally likely tokens those
    with lower ids come first. The plain form sorts every row: `nucleus` in tests/test_sample.py.

    Here only few rows are sorted. The first uniform draws a token from the whole V. If it lies in
    the nucleus it is taken; only if not, the second uniform draws from the nucleus. That is exact:
    for a token of probability p in the nucleus, P(token) = p + P(outside) p / P(nucleus)
    = p (P(nucleus) + P(outside)) / P(nucleus) = p / P(nucleus).
    """
    is_finite = logits.amax(-1).isfinite()  # (N,)
    if temperature < 1e-6:  # greedy: the division could overflow
        ids = logits.argmax(-1)
        is_outside = torch.zeros_like(is_finite)
    else:
        probs = (logits / temperature).softmax(-1)  # (N, V)
        ids = invert_cdf(probs, uniforms[:, 0])
        is_outside = (likelier_mass(probs, ids) >= top_p) & (top_p < 1)
    is_outside, is_finite = torch.stack([is_outside, is_finite]).tolist()  # waits for the device
    if not all(is_finite):
        raise InputError("the model's logits are NaN or infinite: take another --dtype")
    if any(is_outside):
        ranked, order = probs[is_outside].sort(descending=True, stable=True)  # (n, V)
        mass_before = ranked.cumsum(-1, dtype=torch.float64) - ranked
        in_nucleus = mass_before < top_p
        places = invert_cdf(ranked * in_nucleus, uniforms[is_outside, 1])
        ids[is_outside] = order.gather(-1, places[:, None])[:, 0]
    return ids.tolist()


def likelier_mass(probs, ids):
    """(N,): the probability of the tokens that rank before ids (N,) in probs (N, V)."""
    p = probs.gather(-1, ids[:, None])  # (N, 1)
    has_lower_id = torch.arange(probs.shape[-1], device=probs.device) < ids[:, None]
    ranks_before = (probs > p) | ((probs == p) & has_lower_id)
    return (probs * ranks_before).sum(-1, dtype=torch.float64)


def invert_cdf(probs, uniforms):
    """Where the CDF of each row of probs (N, V) passes uniforms (N,): indices (N,)."""
    cdf = probs.cumsum(-1, dtype=torch.float64)  # in float32 small terms would be lost
    # Scaled so that the last token with any probability reaches 1, which no uniform does.
    cdf /= cdf[:, -1:].clone()
    places = torch.searchsorted(cdf, uniforms[:, None].contiguous(), right=True)[:, 0]
    return places.clamp(max=probs.shape[-1] - 1)  # searchsorted gives V where the CDF is NaN


@dataclass
class Completion:
    """ids: the tokens drawn, the stop token included. finished: whether one was drawn."""

    ids: list[int]
    finished: bool


@dataclass
class Request:
    """A prompt to complete, once for each random stream. `name` is the caller's, to know it by."""

    name: object
    prompt: list[int]
    streams: list[tuple]  # the names of each completion's stream


@dataclass
class Row:
    """A completion in the making."""

    request: Request
    index: int  # of its stream in the request
    uniforms: np.ndarray  # (limit, 2): two for each token that it may have
    position: int  # where its last token goes in the cache
    ids: list[int] = field(default_factory=list)
    finished: bool = False
    keys_values: torch.Tensor | None = None  # its prompt's, while it waits for a slot

    @property
    def is_done(self):
        return self.finished or len(self.ids) == len(self.uniforms)

    def append(self, token, stop_ids):
        self.ids.append(token)
        self.position += 1
        self.finished = token in stop_ids


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

    prompts: lists of token ids. Returns one list a prompt of num_samples Completions. Each draws
    from a stream of its own, named by the seed, its prompt's name (by default its index) and its
    own index, so it does not depend on what else is in the batch, up to the rounding of products
    of other sizes. It ends at a stop id, after max_new_tokens, or where the context is full.
    """
    if not prompts:
        return []
    names = names or range(len(prompts))
    completions = [[None] * num_samples for _ in prompts]
    requests = deque()
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        room_after(prompt, model.config, f"prompt {i}")
        streams = [(seed, "completion", name, j) for j in range(num_samples)]
        requests.append(Request(i, prompt, streams))
    decoder = decoder or decoder_for(model, prompts, len(prompts) * num_samples, max_new_tokens)
    for request, index, completion in complete(
        decoder, requests, max_new_tokens, temperature, top_p, stop_ids
    ):
        completions[request.name][index] = completion
    return completions


@torch.inference_mode()
def complete(decoder, requests, max_new_tokens, temperature, top_p, stop_ids):
    """Yields (request, index, Completion) of a deque of requests, each as soon as it ends.

    Requests that the caller adds meanwhile are taken too. Rows join and leave the batch at every
    step (continuous batching), so that none waits for the longest.
    """
    waiting = deque()  # rows that have their first token and no slot yet
    active = []  # rows by their slot in the cache: always slots 0 to len(active) - 1
    while requests or waiting or active:
        # 1. Admit: new rows take the free slots at once.
        while len(active) < decoder.slots and (waiting or requests):
            if waiting:
                row = waiting.popleft()
                decoder.cache.write(len(active), *row.keys_values)
                row.keys_values = None  # or the prompts of all rows would stay in memory
                active.append(row)
                continue
            for row in start_rows(decoder, requests, max_new_tokens, temperature, top_p, stop_ids):
                if row.is_done:
                    yield row.request, row.index, Completion(row.ids, row.finished)
                else:
                    waiting.append(row)
        if not active:
            continue
        # 2. Step: one token a row.
        uniforms = next_uniforms(
            active, decoder.device
        )  # before the step: a copy would wait for it
        logits = decoder.step([row.ids[-1] for row in active], [row.position for row in active])
        tokens = draw(logits, uniforms, temperature, top_p)
        for row, token in zip(active, tokens, strict=True):
            row.append(token, stop_ids)
        # 3. Retire: rows that are done leave, the last slot first; the last row fills each gap.
        for slot in reversed(range(len(active))):
            row = active[slot]
            if row.is_done:
                last = active.pop()
                if last is not row:
                    active[slot] = last
                    decoder.cache.move(len(active), slot, last.position)
                yield row.request, row.index, Completion(row.ids, row.finished)


def start_rows(decoder, requests, max_new_tokens, temperature, top_p, stop_ids):
    """Takes the next requests, prefills each prompt once, and gives its K rows a first token."""
    part = [requests.popleft()]
    num_tokens = len(part[0].prompt)
    while requests and num_tokens + len(requests[0].prompt) <= decoder.prefill_tokens:
        part.append(requests.popleft())
        num_tokens += len(part[-1].prompt)
    keys_values, logits = decoder.prefill([request.prompt for request in part])
    started = []
    for i, request in enumerate(part):
        room = decoder.model.config.max_position_embeddings - len(request.prompt)
        limit = min(max_new_tokens, room)
        rows = []
        for index, names in enumerate(request.streams):
            uniforms = random_stream(*names).random((limit, 2))
            row = Row(request, index, uniforms, len(request.prompt) - 1, keys_values=keys_values[i])
            rows.append(row)
        uniforms = next_uniforms(rows, decoder.device)
        tokens = draw(logits[i].expand(len(rows), -1), uniforms, temperature, top_p)
        for row, token in zip(rows, tokens, strict=True):
            row.append(token, stop_ids)
        started += rows
    return started


def next_uniforms(rows, device):
    """The two uniforms of each row's next token: (n, 2) float64."""
    numbers = [row.uniforms[len(row.ids)] for row in rows]
    return torch.tensor(np.stack(numbers), device=device)


class Decoder:
    """A model and its KV cache of `slots` rows of `length` positions each."""

    def __init__(self, model, slots, length):
        self.model = model
        self.slots = slots
        self.length = length
        self.device = model.device
        self.cache = KVCache(model.config, slots, length, model.device, model.dtype)
        self.prefill_tokens = 2048  # ours: most tokens of the prompts that are prefilled together
        self.graphs = {}  # CUDA graphs by their number of rows

    def prefill(self, prompts):
        """Keys and values of n prompts, (2, layers, KV, T, head_dim) each, and logits (n, V)."""
        tokens, positions, attend = pack([(prompt, None) for prompt in prompts], self.device)
        layers = []

        def record(layer, q, k, v):
            layers.append(torch.cat([k, v]))  # (2, KV, N, head_dim)
            return attend(layer, q, k, v)

        lengths = [len(prompt) for prompt in prompts]
        last_places = [end - 1 for end in accumulate(lengths)]
        hidden = self.model.model(tokens, positions, record, keep=last_places)[0]  # (n, hidden)
        keys_values = torch.stack(layers, dim=1).split(lengths, dim=3)
        return keys_values, logits_of(hidden, self.model.head)

    def step(self, tokens, positions):
        """Logits (n, V) after the last tokens of the first n slots. tokens, positions: n int.

        On a GPU they are a view that the next step overwrites.
        """
        inputs = torch.tensor([tokens, positions], device=self.device)  # (2, n)
        if self.device.type == "cuda":
            return self.replay(inputs)
        return self.forward(inputs, max(positions) + 1)

    def forward(self, inputs, length):
        """The model's step as it is, reading `length` keys: (2, n) -> (n, V)."""
        tokens, positions = inputs
        attend = self.cache.step(positions, length)
        hidden = self.model.model(tokens[:, None], positions[:, None], attend)[:, 0]  # (n, hidden)
        return logits_of(hidden, self.model.head)

    def replay(self, inputs):
        """`forward` as a CUDA graph: one launch a step instead of hundreds.

        A graph has fixed shapes and addresses. So inputs and logits are copied to and from buffers,
        every key is readable, and rows are rounded up to a power of two. The rows beyond n write to
        position 0 of free slots, which no active row has: active rows must be slots 0 to n - 1.
        """
        n = inputs.shape[1]
        rows = min(1 << (n - 1).bit_length(), self.slots)
        if not self.graphs:  # all graphs share their buffers and their memory
            self.inputs = torch.zeros(2, self.slots, dtype=torch.int64, device=self.device)
            self.logits = torch.empty(self.slots, len(self.model.head), device=self.device)
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()
        self.inputs.zero_()
        self.inputs[:, :n] = inputs
        if rows not in self.graphs:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # libraries allocate on their first call
                self.forward(self.inputs[:, :rows], self.length)
            self.graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[rows], pool=self.pool, stream=self.stream):
                self.logits[:rows] = self.forward(self.inputs[:, :rows], self.length)
        self.graphs[rows].replay()
        return self.logits[:n]


def room_after(prompt, config, where):
    """How many tokens may follow a prompt; refuses an empty one, and one that leaves no room."""
    context = config.max_position_embeddings
    if not prompt:
        raise InputError(f"{where} is empty")
    if len(prompt) >= context:
        raise InputError(
            f"{where} has {len(prompt)} tokens, which leaves no room in a context of {context}"
        )
    return context - len(prompt)


def plan_slots(model, length, completions, memory=None):
    """How many slots of `length` positions the memory budget holds.

    memory: in GiB; by default 4 on the CPU, and on a GPU 90% of it less the weights and what
    drawing takes. What is free at the moment is not asked: the same command forms equal batches.
    """
    most = 256  # ours: beyond it a step costs nearly in proportion to its rows
    config = model.config
    values = length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    slot_bytes = 2 * values * model.dtype.itemsize  # keys and values
    if memory is not None:
        room = memory * GIB
    elif model.device.type == "cuda":
        room = 0.9 * torch.cuda.get_device_properties(model.device).total_memory
        room -= sum(p.nbytes for p in model.parameters())
        room -= most * 40 * config.vocab_size  # a logit, its probability, sorted, order and sums
    else:
        room = 4 * GIB
    slots = min(most, completions, int(room // slot_bytes))
    if slots < 1:
        raise InputError(
            f"--cache-memory: one sequence of {length} tokens takes {slot_bytes / GIB:.2f} GiB, "
            f"and there are {room / GIB:.2f}; take more, or a smaller --max-new-tokens"
        )
    return slots


def decoder_for(model, prompts, completions, max_new_tokens, memory=None):
    """A Decoder whose slots hold the longest prompt with its completion."""
    longest = max(map(len, prompts)) + max_new_tokens
    length = min(longest, model.config.max_position_embeddings)
    return Decoder(model, plan_slots(model, length, completions, memory), length)


def read_output(completion, tokenizer, style):
    """One output of a samples file: the completion as text, parsed into thought and response."""
    ids = completion.ids[:-1] if completion.finished else completion.ids
    # Special tokens drawn inside an output are left out, so that none reaches the judge's prompt.
    text = tokenizer.decode(ids, skip_special_tokens=True)
    thought, response = split_output(text, style) or (None, None)
    return {
        "ids": completion.ids,
        "text": text,
        "finished": completion.finished,
        "tries": 1,
        "thought": thought,
        "thought_tokens": count_tokens(thought, tokenizer),
        "response": response,
        "response_tokens": count_tokens(response, tokenizer),
    }


def count_tokens(text, tokenizer):
    return None if text is None else len(tokenizer.encode(text, add_special_tokens=False))


@dataclass
class Options:
    """What a file of samples depends on, beside the checkpoint and the instructions."""

    thought: str = option("specific", "thought prompt; paper's default", choices=tuple(STYLES))
    num_samples: int = option(8, "K, outputs an instruction, paper 3.1; one for an answer", low=1)
    temperature: float = option(0.8, "0 is greedy; paper 3.1", low=0, high=100)
    top_p: float = option(0.95, "probability of the nucleus; paper 3.1", low=1e-6, high=1)
    max_new_tokens: int = option(2048, "most tokens of an output; ours", low=1)
    resample: int = option(0, "more tries for what has no response; 3 for an answer; ours", low=0)
    cache_memory: float = option(None, "GiB of the KV cache (default 4, or all of a GPU)", low=0)
    seed: int = option(0, "names every random stream", low=0)


# Where an answer is read, an output without a response is sampled again (draft 3.5; the 3 is ours).
EVALUATION = {"num_samples": 1, "resample": 3}


def read_instructions(path):
    """Rows of a file of instructions, each with its text as `instruction`.

    JSON lines or one JSON list. The text is under instruction, prompt or question; an Alpaca row's
    `input` follows its instruction after a blank line.
    """
    rows = []
    for place, row in read_json_rows(path):
        name = next((n for n in ("instruction", "prompt", "question") if n in row), None)
        text = row.get(name)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place}: no text under instruction, prompt or question")
        if name == "instruction" and row.get("input"):
            if not isinstance(row["input"], str):
                raise InputError(f"{place}: input is not a text")
            text += "\n\n" + row["input"]
            del row["input"]  # or a second reading would add it again
        rows.append({**row, "instruction": text})
    if not rows:
        raise InputError(f"{path}: there is no instruction in it")
    return rows


def make_prompts(rows, tokenizer, style, config, path):
    """The rows with `prompt_text` and `prompt_ids`, the chat up to the model's turn."""
    system = STYLES[style].system
    if system is not None:
        check_system_turn(tokenizer, system, "--thought system needs it")
    prompts = []
    for number, row in enumerate(rows, 1):
        messages = [{"role": "user", "content": thought_prompt(row["instruction"], style)}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = tokenizer.render_chat(messages)
        ids = tokenizer.encode(text, add_special_tokens=False)
        room_after(ids, config, f"{path}: the prompt of instruction {number}")
        prompts.append({**row, "prompt_text": text, "prompt_ids": ids})
    return prompts


def check_system_turn(tokenizer, system, reason):
    """Refuses a chat template that drops the system turn, as some do without a word."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    if system not in tokenizer.render_chat(messages):
        raise InputError(f"{tokenizer.folder}: chat_template drops the system turn; {reason}")


def sample_file(model, tokenizer, rows, options, path, key, source, label="sampling"):
    """Samples instructions into the file `path`; the same call resumes.

    rows: read_instructions' dicts, of the file `source`. key: what else the samples depend on.
    """
    K = options.num_samples
    rows = make_prompts(rows, tokenizer, options.thought, model.config, source)
    prompts = [row["prompt_ids"] for row in rows]
    decoder = decoder_for(
        model, prompts, len(rows) * K, options.max_new_tokens, options.cache_memory
    )

    def make_rows(items):
        done = len(rows) - len(items)
        with progress_bar(label, len(rows) * K, done * K, "outputs") as bar:
            yield from sample_rows(decoder, tokenizer, items, options, bar)

    write_rows(path, list(enumerate(rows)), {**vars(options), **key}, make_rows)


def sample_rows(decoder, tokenizer, items, options, bar=None):
    """Yields rows of samples, in order, of (index, row of make_prompts); the index names streams.

    An output without a response is sampled again, up to options.resample times (draft 3.5).
    """
    began = time.monotonic()
    num_tokens = 0
    outputs = {}  # by the row's index: its K outputs, None for one that is not there yet
    requests = deque()
    for i, row in items:
        outputs[i] = [None] * options.num_samples
        streams = [(options.seed, "completion", i, j) for j in range(options.num_samples)]
        requests.append(Request((i, 0, 1), row["prompt_ids"], streams))
    unwritten = deque(items)
    limits = (options.max_new_tokens, options.temperature, options.top_p, tokenizer.stop_ids)
    for request, index, completion in complete(decoder, requests, *limits):
        i, first, attempt = request.name
        j = first + index
        num_tokens += len(completion.ids)
        output = read_output(completion, tokenizer, options.thought)
        if not output["response"] and attempt <= options.resample:
            # The next try, of this output alone, has a stream of its own.
            stream = (f"{options.seed}/try-{attempt + 1}/{j}", "completion", i, 0)
            requests.appendleft(Request((i, j, attempt + 1), request.prompt, [stream]))
            continue
        outputs[i][j] = {**output, "tries": attempt}
        if bar is not None:
            speed = num_tokens / (time.monotonic() - began)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update()
        while unwritten and None not in outputs[unwritten[0][0]]:
            i, row = unwritten.popleft()
            yield {**row, "outputs": outputs.pop(i)}


def answer_row(row, output, form, generator):
    """What `alpaca_eval --model_outputs` reads, or a line of Arena-Hard's model_answer file."""
    response = output["response"] or ""  # an output that was not parsed answers nothing
    if form == "alpaca_eval":
        given = {key: row[key] for key in ("dataset", "instruction") if key in row}
        return {**given, "output": response, "generator": generator}
    messages = [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": {"answer": response}},
    ]
    metadata = {"token_len": output["response_tokens"] or 0}
    return {"uid": row["uid"], "model": generator, "messages": messages, "metadata": metadata}


def answer(args, options, model, tokenizer):
    """Answers to the terminal: each response, and on request its thought before it, dimmed."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    if args.instruction is not None:
        # Bytes of the command line that are no text arrive as half surrogates.
        texts = [args.instruction.encode(errors="surrogateescape").decode(errors="replace")]
    else:
        if sys.stdin.isatty():
            print("instructions, one a line; Ctrl-D ends")
        texts = (line.rstrip("\n") for line in sys.stdin if line.strip())
    for text in texts:
        if not text.strip():
            raise InputError("the instruction is empty")
        row = {"instruction": text}
        (row,) = make_prompts([row], tokenizer, options.thought, model.config, "terminal")
        decoder = decoder_for(
            model,
            [row["prompt_ids"]],
            options.num_samples,
            options.max_new_tokens,
            options.cache_memory,
        )
        (row,) = sample_rows(decoder, tokenizer, [(0, row)], options)
        for output in row["outputs"]:
            is_parsed = output["response"] is not None
            if args.show_thought:
                print(f"{dim}{output['thought'] if is_parsed else output['text']}{plain}")
            print(output["response"] or "no response in the output; see --show-thought")


def main():
    parser = make_parser("Thought prompts in, K outputs each out.", Options, Device)
    add = parser.add_argument
    add("instruction", nargs="?", help="one instruction, answered to the terminal")
    add("--model", required=True, help="checkpoint folder or hub id")
    add("--instructions", help="file of instructions, JSON lines or a JSON list")
    add("--output", help="file to write")
    formats = ("jsonl", "alpaca_eval", "arena_hard")
    add("--format", choices=formats, default="jsonl", help="samples, or those tools' answer files")
    add("--show-thought", action="store_true", help="show the thought of an answer too")
    args = parser.parse_args()
    if args.output is None or args.format != "jsonl":  # one answer is read, not K compared
        parser.set_defaults(**EVALUATION)
        args = parser.parse_args()
    if (args.instructions is None) != (args.output is None):
        raise InputError("--instructions and --output go together: one of them is missing")
    if args.instruction is not None and args.output is not None:
        raise InputError("an instruction and --output were given: give one of them")
    if args.output is not None:
        check_output(args.output)
    options = options_of(Options, args)
    device = options_of(Device, args)
    set_deterministic(device)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, device.device, DTYPES[device.dtype])
    if args.output is None:
        answer(args, options, model, tokenizer)
    else:
        answer_file(args, options, model, tokenizer)


def answer_file(args, options, model, tokenizer):
    """Samples a file of instructions into --output, in one of the three formats."""
    rows = read_instructions(args.instructions)
    if args.format == "arena_hard":
        for number, row in enumerate(rows, 1):
            if "uid" not in row:
                raise InputError(f"{args.instructions}: instruction {number} has no uid")
    key = {
        "model": hash_of(checkpoint_folder(args.model)),
        "dtype": args.dtype,
        "instructions": hash_of(Path(args.instructions)),
    }
    samples = Path(args.output)
    if args.format != "jsonl":  # beside it, and named after the options, so that no others take it
        name = hash_of([key, vars(options)])[:8]
        samples = samples.with_name(f"{samples.name}.{name}.samples")
    if not samples.exists():
        sample_file(model, tokenizer, rows, options, samples, key, args.instructions)
    pairs = [(row, output) for _, row in read_jsonl(samples) for output in row["outputs"]]
    num_parsed = sum(bool(output["response"]) for _, output in pairs)
    print(f"{len(pairs):,} outputs, {num_parsed / len(pairs):.1%} with a response")
    if args.format == "alpaca_eval":
        answers = [answer_row(row, output, args.format, args.model) for row, output in pairs]
        write_json(args.output, answers)
    if args.format == "arena_hard":
        generator = Path(args.output).stem  # Arena-Hard's loader knows a model by its file's name
        answers = [answer_row(row, output, args.format, generator) for row, output in pairs]
        write_jsonl(args.output, answers)
    if args.format != "jsonl":
        samples.unlink()


if __name__ == "__main__":
    run_main(main, resumes=any(word.startswith("--output") for word in sys.argv))
