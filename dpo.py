"""Direct Preference Optimization of one round's pairs (section 2.2): all weights are trained.

The model M_t that wrote the outputs is both start and reference; the trained model is M_(t+1).
The loss covers an output whole, thought and response and stop token: a thought is trained by
what its response was worth, although no judge ever read it.

In: a checkpoint and a file of pairs, with `prompt_ids`, `chosen_ids`, `rejected_ids` as they were
sampled, or with `prompt`, `chosen`, `rejected` as text. Out: a checkpoint folder.

    python dpo.py --model DIR --pairs FILE --output DIR

Departures from the DPO authors' code: a pair's prompt is computed once for both outputs, nothing
is padded, no second model is kept as the reference, and logits are never all there at once.
"""

import argparse
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from model import (
    DTYPES,
    GIB,
    InputError,
    LanguageModel,
    add_options,
    check_device,
    check_output,
    checkpoint_folder,
    expect,
    fill,
    load_model,
    load_tokenizer,
    option,
    pack,
    read_config,
    read_json,
    read_jsonl,
    read_options,
    run_main,
    save_model,
    save_shards,
    stream,
    weight_files,
    widen,
    write_aside,
    write_json,
)


@dataclass
class Options:
    """What training depends on, beside the checkpoint and the pairs.

    The paper gives the epochs. "Field" marks what others use for DPO of Llama-3-8B, as the text of
    the paper that we have names no value.
    """

    beta: float = option(0.1, "weight of the reference in the loss; field", low=1e-9)
    lr: float = option(5e-7, "learning rate; field", low=0, high=1)
    adam_beta1: float = option(0.9, "decay of AdamW's first moment; field", low=0, high=0.9999999)
    adam_beta2: float = option(0.95, "decay of its second moment; field", low=0, high=0.9999999)
    weight_decay: float = option(0.0, "AdamW's, on matrices and embeddings only; ours", low=0)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down; field", low=1e-9)
    warmup_steps: int = option(0, "steps over which the rate rises to --lr; ours", low=0)
    lr_schedule: str = option("constant", "after the warmup; ours", choices=("constant", "cosine"))
    epochs: int = option(10, "passes over the pairs; paper 3.1", low=1)
    batch_size: int = option(64, "pairs a step; field", low=1)
    nll_weight: float = option(0.0, "IRPO's term; paper: it made little difference", low=0)
    micro_batch_tokens: int = option(2048, "computed at once, at least a pair; ours", low=1)
    keep_activations: int = option(
        1,
        "blocks that are not recomputed in the backward pass: the last costs nothing; ours",
        low=0,
    )
    optimizer_device: str = option(
        "same", "where AdamW's state is: cpu for host memory; ours", choices=("same", "cpu")
    )
    save_steps: int = option(0, "steps between saved states, beside each epoch's end; ours", low=0)
    seed: int = option(0, "names the random stream of each epoch's order", low=0)


# The loss


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """DPO's loss (Rafailov et al. 2023, equation 7), which section 2.2 trains with.

    Four (B,) sums of log-probabilities of whole outputs, in nats. Returns three (B,) tensors: the
    losses, and the implicit rewards of chosen and rejected, beta * log(policy / reference), which
    carry no gradient.

    >>> zero = torch.zeros(1)
    >>> dpo_loss(zero, zero, zero, zero, beta=0.1)[0].exp()
    tensor([2.])
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# Log-probabilities of outputs, in bounded memory


@dataclass
class Pair:
    """A prompt and its two outputs as token ids; `name` says where it stands, for errors."""

    name: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference: tuple[float, float] | None = None  # log-probabilities of both, before training

    def __len__(self):
        """Tokens to compute. An output's last one predicts nothing and is not put in."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids) - 2


LOGIT_ROWS = 512  # logits at once: enough for full speed, at 128k tokens 0.25 GiB in float32


def output_logprobs(model, pairs, keep_activations=0):
    """Log-probabilities of whole outputs: (B,) of the chosen, (B,) of the rejected, in nats.

    Each is the sum over the output's tokens, stop token included, of log p(token | all before).
    All pairs lie in one packed row, the prompt once and both outputs as its continuations; keep
    the pairs few enough with micro_batches. All but `keep_activations` blocks are recomputed.
    """
    trees = [(p.prompt_ids, [p.chosen_ids[:-1], p.rejected_ids[:-1]]) for p in pairs]
    tokens, positions, attend, offsets = pack(trees, model.head.device)  # (1, N)
    places, targets, lengths = [], [], []
    for pair, (start, continuations) in zip(pairs, offsets, strict=True):
        for ids, offset in zip((pair.chosen_ids, pair.rejected_ids), continuations, strict=True):
            # The prompt's end predicts the first token, and each token the next one.
            places += [start + len(pair.prompt_ids) - 1, *range(offset, offset + len(ids) - 1)]
            targets += ids
            lengths.append(len(ids))
    recompute = max(0, model.config.num_layers - keep_activations)
    hidden = model.model(tokens, positions, attend, recompute)[0]  # (N, hidden)
    places, targets = (torch.tensor(x, device=hidden.device) for x in (places, targets))  # (M,)
    logprobs = TokenLogprobs.apply(hidden[places], model.head, targets)  # (M,)
    sums = torch.stack([part.sum() for part in logprobs.split(lengths)]).view(-1, 2)  # (B, 2)
    return sums[:, 0], sums[:, 1]


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ head.T)[target], without ever holding all logits.

    hidden (M, hidden), head (V, hidden), targets (M,) -> (M,), in float32 at least. The logits of
    LOGIT_ROWS rows are made and used, and made again in the backward pass: with respect to its
    logits, a row's gradient is one at its target, less the softmax.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets):
        found, totals = [], []
        for rows in chunks(targets):
            logits = widen(F.linear(hidden[rows], head))  # (LOGIT_ROWS, V)
            found.append(logits.gather(-1, targets[rows, None]))
            largest = logits.amax(-1, keepdim=True)
            # log-sum-exp in the logits' own memory, which at 128k tokens is large
            totals.append(logits.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest))
        total = torch.cat(totals)  # (M, 1)
        ctx.save_for_backward(hidden, head, targets, total)
        return (torch.cat(found) - total)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, head, targets, total = ctx.saved_tensors
        hidden_grad, head_grad = torch.empty_like(hidden), torch.zeros_like(head)
        for rows in chunks(targets):
            logits = widen(F.linear(hidden[rows], head))  # (LOGIT_ROWS, V)
            logits_grad = logits.sub_(total[rows]).exp_().mul_(-grad[rows, None])
            logits_grad.scatter_add_(-1, targets[rows, None], grad[rows, None])
            logits_grad = logits_grad.to(head.dtype)
            hidden_grad[rows] = logits_grad @ head
            head_grad.addmm_(logits_grad.T, hidden[rows])
        return hidden_grad, head_grad, None


def chunks(targets):
    return [slice(i, i + LOGIT_ROWS) for i in range(0, len(targets), LOGIT_ROWS)]


def micro_batches(pairs, tokens):
    """Cuts a list of pairs, in order, into lists of at most `tokens` tokens, or of one pair."""
    return fill(pairs, map(len, pairs), tokens)


def reference_logprobs(model, pairs, options):
    """What the model before training gives both outputs of each pair: a list of two floats each."""
    reference = []
    with torch.no_grad():
        for part in micro_batches(pairs, options.micro_batch_tokens):
            reference += torch.stack(output_logprobs(model, part), dim=1).tolist()  # (B, 2)
    for pair, logprobs in zip(pairs, reference, strict=True):
        finite = all(map(math.isfinite, logprobs))
        expect(finite, f"{pair.name}: log-probabilities", logprobs, "finite numbers")
    return reference


def add_gradient(model, batch, options):
    """Adds the gradient of the batch's mean loss to the weights', one micro-batch at a time.

    However the batch is cut, the gradient is that of the whole, in the weights' dtype. Returns a
    dict of means over the pairs: loss, accuracy (the share whose chosen output has the higher
    implicit reward), margin (of the rewards), chosen_logprob and rejected_logprob.
    """
    records = []
    for part in micro_batches(batch, options.micro_batch_tokens):
        chosen, rejected = output_logprobs(model, part, options.keep_activations)  # (B,) each
        reference = torch.tensor([pair.reference for pair in part]).to(chosen)  # (B, 2)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, reference[:, 0], reference[:, 1], options.beta
        )
        if options.nll_weight:  # IRPO (Pang et al. 2024) divides by the chosen output's length
            lengths = torch.tensor([len(pair.chosen_ids) for pair in part]).to(chosen)
            losses = losses - options.nll_weight * chosen / lengths
        margins = chosen_rewards - rejected_rewards
        record = torch.stack([losses, margins > 0, margins, chosen, rejected], dim=1)  # (B, 5)
        records += record.tolist()
        for pair, loss in zip(part, losses.tolist(), strict=True):
            expect(math.isfinite(loss), f"{pair.name}: loss", loss, "a finite number")
        (losses.sum() / len(batch)).backward()
    means = [sum(column) / len(batch) for column in zip(*records, strict=True)]
    names = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob")
    return dict(zip(names, means, strict=True))


# The optimizer


class AdamW:
    """AdamW whose small steps are not lost in 16-bit weights.

    A step of 5e-7 is below the resolution of a bf16 weight, so beside 16-bit weights a float32
    master copy takes the steps, and the weights are its rounding. Moments are float32. This state
    may be kept in host memory (options.optimizer_device): a parameter's is then brought over,
    used, and sent back before the next one's.
    """

    def __init__(self, model, options):
        self.options, self.steps = options, 0
        self.parameters = dict(model.named_parameters())
        self.state = {}  # all that a resumed run needs, by name
        for name, p in self.parameters.items():
            wide = torch.promote_types(p.dtype, torch.float32)
            device = p.device if options.optimizer_device == "same" else torch.device("cpu")
            # Page-locked memory is copied to and from a GPU at the full speed of the bus.
            pinned = p.device.type == "cuda" and device.type == "cpu"
            new = {"dtype": wide, "device": device, "pin_memory": pinned}
            self.state[f"mean.{name}"] = torch.zeros(p.shape, **new)
            self.state[f"square.{name}"] = torch.zeros(p.shape, **new)
            self.state[f"weight.{name}"] = p.detach()
            if p.dtype != wide:
                self.state[f"weight.{name}"] = torch.empty(p.shape, **new).copy_(p.detach())

    def gradient_norm(self):
        """Euclidean norm over all parameters' gradients, in float32."""
        grads = [p.grad for p in self.parameters.values()]
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        return torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in grads]).norm().item()

    @torch.no_grad()
    def step(self, lr, scale):
        """One update with the gradients times `scale`; each is freed as soon as it is used."""
        self.steps += 1
        beta1, beta2 = self.options.adam_beta1, self.options.adam_beta2
        for name, p in self.parameters.items():
            state = [self.state[f"{part}.{name}"] for part in ("mean", "square", "weight")]
            mean, square, weight = (x.to(p.device, non_blocking=True) for x in state)
            grad, p.grad = p.grad.to(mean.dtype).mul_(scale), None
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            del grad
            if p.ndim > 1:  # norms and biases do not decay, as in Hugging Face's Trainer
                weight.mul_(1 - lr * self.options.weight_decay)
            spread = square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(ADAM_EPS)
            weight.addcdiv_(mean, spread, value=-lr / (1 - beta1**self.steps))
            p.copy_(weight)
            for kept, moved in zip(state, (mean, square, weight), strict=True):
                kept.copy_(moved)  # nothing where both are one tensor


ADAM_EPS = 1e-8


def learning_rate(step, total, options):
    """The rate of step 1..total: a linear rise that ends at lr, then constant or a half cosine."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.lr
    done = (step - 1 - options.warmup_steps) / max(1, total - options.warmup_steps)
    return options.lr * (1 + math.cos(math.pi * done)) / 2


# Training


def train(model, pairs, options, state=None, log=None, end_of_epoch=None):
    """Trains `model` in place on a list of Pair: one round of DPO, its start the reference.

    state: a folder to go on from and to save in, at each epoch's end and every save_steps steps.
    The same call with the same weights, pairs and options goes on from it to the same bytes; the
    caller removes it when the result is safe. log(record) is called after each step, with a dict.
    end_of_epoch(epoch, model) is called after each epoch, from 1 on; one that was cut off is
    called again. Losses or gradients that are not finite end in InputError.
    """
    # Without a scaled loss the small gradients of float16 would be rounded to nothing.
    expect(model.head.dtype != torch.float16, "--dtype", "float16", "bfloat16 or float32 to train")
    mark = {"inputs": fingerprint(model, pairs), "options": asdict(options)}
    fill_reference(model, pairs, options, state, mark["inputs"])
    optimizer = AdamW(model, options)
    ended = load_state(state, optimizer, mark) if state else 0
    in_an_epoch = math.ceil(len(pairs) / options.batch_size)
    total, saved = options.epochs * in_an_epoch, optimizer.steps
    try:
        for epoch in range(1, options.epochs + 1):
            order = stream(options.seed, "dpo", "epoch", epoch).permutation(len(pairs))
            while optimizer.steps < epoch * in_an_epoch:
                first = optimizer.steps % in_an_epoch * options.batch_size
                batch = [pairs[i] for i in order[first : first + options.batch_size]]
                record = train_step(model, batch, optimizer, total)
                if log:
                    log({"epoch": epoch, "step": optimizer.steps, **record})
                due = options.save_steps and optimizer.steps % options.save_steps == 0
                if state and (due or optimizer.steps == epoch * in_an_epoch):
                    save_state(state, optimizer, mark)
                    saved = optimizer.steps
            if end_of_epoch and epoch > ended:
                end_of_epoch(epoch, model)
                if state:
                    write_json(Path(state) / "ended.json", {"epoch": epoch})
    except KeyboardInterrupt:
        where = f"after step {optimizer.steps} of {total}, the last saved one is {saved}"
        raise KeyboardInterrupt(where) from None


def train_step(model, batch, optimizer, total):
    """One step on a batch of pairs; returns its record."""
    options, began = optimizer.options, time.monotonic()
    record = add_gradient(model, batch, options)
    norm = optimizer.gradient_norm()
    if not math.isfinite(norm):
        raise InputError(blame(model, batch, options))
    lr = learning_rate(optimizer.steps + 1, total, options)
    # The same guard against a norm of 0 as in torch's clip_grad_norm_.
    optimizer.step(lr, min(1.0, options.max_grad_norm / (norm + 1e-6)))
    speed = sum(map(len, batch)) / (time.monotonic() - began)
    return {**record, "grad_norm": norm, "lr": lr, "tokens_per_second": speed}


def blame(model, batch, options):
    """The message for a gradient that is not finite: the first pair whose own is not."""
    for pair in batch:
        model.zero_grad()
        add_gradient(model, [pair], options)
        if not all(p.grad.isfinite().all() for p in model.parameters()):
            return f"{pair.name}: gradient: found one that is not finite, expected a finite one"
    return f"{batch[0].name}: its gradient and those of its batch are too large to be added"


# Pairs from a file

SIDES = ("prompt", "chosen", "rejected")


def read_pairs(path, tokenizer, config):
    """The pairs of a file, list of Pair; refuses what cannot be trained on, by its line.

    The ids that were sampled are used where they are given; a row of text alone gets its ids from
    the tokenizer, as TRL does it.
    """
    pairs = []
    for number, row in read_jsonl(path):
        name = f"{path}:{number}"
        if any(f"{side}_ids" in row for side in SIDES):
            ids = [row.get(f"{side}_ids") for side in SIDES]
        else:
            for side in SIDES:
                text = row.get(side)
                expect(isinstance(text, str), f"{name}: {side}", kind(text), "a text")
            ids = tokenize_pair(tokenizer, *(row[side] for side in SIDES))
        for side, side_ids in zip(SIDES, ids, strict=True):
            check_ids(f"{name}: {side}_ids", side_ids, config.vocab_size)
        longest, most = len(ids[0]) + max(len(ids[1]), len(ids[2])), config.max_positions
        expect(longest <= most, f"{name}: prompt and output", longest, f"{most} tokens at most")
        pairs.append(Pair(name, *ids))
    expect(pairs, path, "no pair", "at least one")
    return pairs


def kind(value):
    return "nothing" if value is None else f"a {type(value).__name__}"


def check_ids(name, ids, vocab_size):
    found = "an empty list" if ids == [] else kind(ids)
    expect(isinstance(ids, list) and ids, name, found, "a list of token ids")
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size][:1]
    expect(not wrong, name, str(wrong)[1:-1], f"ids from 0 to {vocab_size - 1}")


def tokenize_pair(tokenizer, prompt, chosen, rejected):
    """Texts to the ids of TRL's DPOTrainer: each output ends with the eos token.

    Prompt and output are tokenized together, and the prompt is what both agree on. BOS is added
    where the tokenizer does so, but not before a prompt that already starts with it.
    """
    bos, eos = (tokenizer.special.get(f"{end}_token") for end in ("bos", "eos"))
    expect(eos is not None, "tokenizer_config.json: eos_token", "none", "the end of every output")
    add = bos is None or not prompt.startswith(bos)
    chosen, rejected = (text if text.endswith(eos) else text + eos for text in (chosen, rejected))
    ids = [tokenizer.encode(text, add) for text in (prompt, prompt + chosen, prompt + rejected)]
    parted = [len(set(column)) > 1 for column in zip(*ids, strict=False)]
    shared = [*parted, True].index(True)
    return ids[0][:shared], ids[1][shared:], ids[2][shared:]


# The state of a run: what the same command goes on from


def fingerprint(model, pairs):
    """sha256 of the weights and the pairs: a state belongs to these and no others."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype}".encode())
        digest.update(p.detach().cpu().flatten().view(torch.uint8).numpy())
    for pair in pairs:
        digest.update(json.dumps([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]).encode())
    return digest.hexdigest()


def fill_reference(model, pairs, options, state, inputs):
    """Sets each pair's reference, from the state's file where these weights and pairs made it."""
    file = Path(state, "reference.json") if state else None
    kept = read_json(file) if file and file.exists() else {}
    if kept.get("inputs") != inputs:
        kept = {"inputs": inputs, "logprobs": reference_logprobs(model, pairs, options)}
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, kept)
    for pair, logprobs in zip(pairs, kept["logprobs"], strict=True):
        pair.reference = tuple(logprobs)


def save_state(folder, optimizer, mark):
    """Moments, weights and step as folder/step-N, written aside and renamed; older ones go."""
    final = Path(folder, f"step-{optimizer.steps}")
    with write_aside(final, folder=True) as aside:
        save_shards(optimizer.state, aside)
        write_json(aside / "mark.json", mark)
    for path in set(final.parent.glob("step-*")) - {final}:
        shutil.rmtree(path)


def load_state(folder, optimizer, mark):
    """Puts the last saved state into the optimizer and its model; returns the last ended epoch."""
    whole = Path(folder).glob("step-*[0-9]")  # what a kill cut short ends in .partial
    steps = [int(path.name.removeprefix("step-")) for path in whole]
    if not steps:
        return 0
    last = Path(folder) / f"step-{max(steps)}"
    found = read_json(last / "mark.json")
    same = found["inputs"] == mark["inputs"]
    expect(same, folder, "a state of other weights or pairs", "this run's; remove it to start anew")
    for name, value in mark["options"].items():
        was = found["options"].get(name)
        expect(was == value, f"{folder}: {name}", f"{was!r}", f"{value!r}; remove it to start anew")
    missing = set(optimizer.state)
    for file in weight_files(last):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dict
                    optimizer.state[name].copy_(tensors.get_tensor(name))
                    missing.remove(name)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise InputError(f"{file}: not a saved state: {error}; remove {folder}") from None
    expect(not missing, last, f"no {min(missing, default='')}", f"it; remove {folder}")
    optimizer.steps = max(steps)
    with torch.no_grad():
        for name, p in optimizer.parameters.items():
            p.copy_(optimizer.state[f"weight.{name}"])
    ended = Path(folder) / "ended.json"
    return read_json(ended)["epoch"] if ended.exists() else 0


# Memory


def memory_parts(config, tokens, options, dtype):
    """Bytes that training takes at most, by part; tokens: of the largest micro-batch."""
    with torch.device("meta"):
        sizes = [p.numel() for p in LanguageModel(config).parameters()]
    count, largest, item = sum(sizes), max(sizes), dtype.itemsize
    narrow = item < 4
    hidden, wide = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # What the backward pass needs of a token in a block: both norms' results, q, k, v and a copy
    # where a prompt is shared, attention's output twice, gate, silu, up and their product.
    block = item * (6 * hidden + 3 * q_size + 3 * kv_size + 4 * wide) + narrow * 8 * hidden
    kept = min(options.keep_activations, config.num_layers)
    inputs = (config.num_layers - kept) * item * hidden
    moved = options.optimizer_device == "cpu"
    return {
        "weights": count * item,
        "gradients": count * item,
        "optimizer": count * (12 if narrow else 8),
        "activations": tokens * (inputs + kept * block),
        # Then one after another: the head's backward pass, a recomputed block's, the update.
        "logits": min(tokens, LOGIT_ROWS) * config.vocab_size * (4 + 2 * narrow)
        + item * hidden * (config.vocab_size + 3 * tokens),
        "block": tokens * (block * (kept == 0) + 2 * item * wide),
        "update": largest * 4 * (1 + narrow + moved * (2 + narrow)),
    }


def check_memory(config, pairs, options, device, dtype):
    """Prints what training will take, and refuses what cannot fit; returns the device's peak.

    Bytes, of the computation alone: Python and torch themselves, and a GPU's context, come on top.
    """
    longest = max(map(len, pairs))
    largest_batch = sum(sorted(map(len, pairs))[-options.batch_size :])
    tokens = min(largest_batch, max(longest, options.micro_batch_tokens))
    parts = memory_parts(config, tokens, options, dtype)
    on_host = device.type != "cpu" and options.optimizer_device == "cpu"
    backward = parts["activations"] + max(parts["logits"], parts["block"])
    passing = max(backward, parts["update"])
    peak = parts["weights"] + parts["gradients"] + passing + parts["optimizer"] * (not on_host)
    listed = ", ".join(f"{name} {size / GIB:.2g}" for name, size in parts.items())
    where = "host" if on_host or device.type == "cpu" else "device"
    print(f"memory in GiB: {listed}; optimizer on the {where}; peak {peak / GIB:.2g}")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = host if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]
    if peak > room:
        advice = ["--optimizer-device cpu"] * (device.type == "cuda" and not on_host)
        advice += ["--dtype bfloat16"] * (dtype == torch.float32)
        advice += [f"--micro-batch-tokens {longest}"] * (tokens > longest)
        raise InputError(
            f"--device {device}: found {room / GIB:.2f} GiB, expected {peak / GIB:.2f} for this "
            f"training; try {' or '.join(advice) or 'a larger device'}"
        )
    if on_host:
        need = f"{parts['optimizer'] / GIB:.2f} GiB of host memory"
        fits = parts["optimizer"] < host
        expect(fits, "--optimizer-device cpu", f"{host / GIB:.2f} GiB", need)
    return peak


def peak_memory(device):
    """Most bytes in use so far: of the GPU's tensors, or on the CPU of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # getrusage there counts what the process that began this one held
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


# Command line


def print_record(record):
    print(
        "epoch {epoch} step {step} loss {loss:.4f} accuracy {accuracy:.3f} margin {margin:.3f} "
        "log-probabilities {chosen_logprob:.1f} {rejected_logprob:.1f} norm {grad_norm:.3g} "
        "lr {lr:.2e} {tokens_per_second:,.0f} tokens/s".format(**record),
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description="One round of DPO on a file of pairs.")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder or hub id: start and reference")
    add("--pairs", required=True, help="file of pairs, as judge.py writes it or as text")
    add("--output", required=True, help="checkpoint folder to write")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default float32)")
    add_options(parser, Options)
    args = parser.parse_args()
    options = read_options(Options, vars(args))
    check_output(args.output)
    device, dtype = check_device(args.device), DTYPES[args.dtype]
    source = checkpoint_folder(args.model)
    config = read_config(source)
    pairs = read_pairs(args.pairs, load_tokenizer(source), config)
    estimate, before = check_memory(config, pairs, options, device, dtype), peak_memory(device)
    model = load_model(source, device, dtype)
    state = Path(args.output).with_name(Path(args.output).name + ".state")
    train(model, pairs, options, state, print_record)
    save_model(model, args.output, source)
    shutil.rmtree(state)
    measured = (peak_memory(device) - before) / GIB
    print(f"peak memory: estimated {estimate / GIB:.2f} GiB, measured {measured:.2f} GiB")


if __name__ == "__main__":
    run_main(main)
