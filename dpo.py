"""Direct Preference Optimization of one round's pairs (section 2.2): all weights are trained.

M_(t-1), the model that wrote the outputs, is start and reference; the trained model is M_t. The
loss covers thought, response and stop token: a thought is credited with its response's score,
although no judge ever read it.

    python dpo.py --model DIR --pairs FILE --output DIR

In: a checkpoint and a file of pairs. Out: a checkpoint. Unlike the DPO authors' code: a pair's
prompt is computed once for both outputs, nothing is padded, no second model is kept as the
reference, and the full logits are never in memory. The plain form of the log-probabilities is
`direct_logprobs` in tests/test_dpo.py.
"""

import math
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from model import (
    DTYPES,
    GIB,
    Device,
    InputError,
    batch_by_size,
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
    read_config,
    read_json,
    read_jsonl,
    run_main,
    save_model,
    set_deterministic,
    stored_tensors,
    write_json,
    write_whole,
)

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """DPO's loss (Rafailov et al. 2023, equation 7), which section 2.2 trains with.

    Four (B,) sums of log-probabilities of whole outputs, in nats -> three (B,): the losses, and the
    implicit rewards of chosen and rejected, beta * log(policy / reference), without gradient.

    >>> zero = torch.zeros(1)
    >>> dpo_loss(zero, zero, zero, zero, beta=0.1)[0].exp()
    tensor([2.])
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


@dataclass
class Pair:
    """A prompt and its two outputs as token ids; `name` says where it stands, for errors."""

    name: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference: tuple[float, float] | None = None  # log-probabilities of both, before training

    @property
    def num_tokens(self):
        """Tokens to compute. An output's last one predicts nothing and is not put in."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids) - 1


def output_logprobs(model, pairs, keep_activations=0, logit_rows=512):
    """Log-probabilities of whole outputs: (B,) of the chosen, (B,) of the rejected, in nats.

    Each sums log p(token | all before) over the output, stop token included. All pairs lie in one
    packed row. Only `logit_rows` tokens' logits exist at once (0.25 GiB at 128k words); they and
    all but `keep_activations` blocks are recomputed in the backward pass.
    """
    # The prompt's last token predicts an output's first, so it begins both continuations:
    #     input      prompt[:-1]   last, chosen[:-1]   last, rejected[:-1]
    #     predicts   (ignored)     chosen              rejected
    pieces = []
    predicts_output = []  # of each input token
    targets = []
    lengths = []
    for pair in pairs:
        *prompt, last = pair.prompt_ids
        prefix = None  # a prompt of one token leaves nothing to share
        if prompt:
            prefix = len(pieces)
            pieces.append((prompt, None))
            predicts_output += [False] * len(prompt)
        for ids in (pair.chosen_ids, pair.rejected_ids):
            pieces.append(([last, *ids[:-1]], prefix))
            predicts_output += [True] * len(ids)
            targets += ids
            lengths.append(len(ids))
    tokens, positions, attend = pack(pieces, model.device)
    recompute = max(0, model.config.num_hidden_layers - keep_activations)
    hidden = model.model(tokens, positions, attend, recompute)[0]  # (N, hidden)
    hidden = hidden[torch.tensor(predicts_output, device=model.device)]  # (M, hidden)
    targets = torch.tensor(targets, device=model.device)  # (M,)
    logprobs = []
    for rows, ids in zip(hidden.split(logit_rows), targets.split(logit_rows), strict=True):
        logprobs.append(checkpoint(token_logprobs, rows, model.head, ids, use_reentrant=False))
    outputs = torch.cat(logprobs).split(lengths)  # chosen, rejected, chosen, ...
    sums = torch.stack([output.sum() for output in outputs])  # (2 B,)
    chosen, rejected = sums.view(-1, 2).unbind(1)
    return chosen, rejected


def token_logprobs(hidden, head, targets):
    """log softmax(hidden @ head.T)[target]: (M, hidden), (V, hidden), (M,) -> (M,), in float32."""
    return -F.cross_entropy(logits_of(hidden, head), targets, reduction="none")


def micro_batches(pairs, options):
    """Lists of consecutive pairs with --micro-batch-tokens tokens or fewer each."""
    return batch_by_size(pairs, [pair.num_tokens for pair in pairs], options.micro_batch_tokens)


@torch.no_grad()
def add_reference(model, pairs, options):
    """Sets each pair's reference: what the model before training gives both outputs."""
    for part in micro_batches(pairs, options):
        chosen, rejected = output_logprobs(model, part)
        for pair, *both in zip(part, chosen.tolist(), rejected.tolist(), strict=True):
            pair.reference = tuple(both)


def add_gradient(model, batch, options):
    """Adds the gradient of the batch's mean loss to the weights', one micro-batch at a time.

    Returns a dict of means over the pairs; accuracy is the share whose chosen output has the higher
    implicit reward, margin the difference of the two rewards.
    """
    for p in model.parameters():
        # Gradients of micro-batches add up in float32, even for bfloat16 weights.
        p.grad_dtype = torch.promote_types(p.dtype, torch.float32)
    records = []
    for part in micro_batches(batch, options):
        chosen, rejected = output_logprobs(model, part, options.keep_activations)  # (B,) each
        reference = torch.tensor([pair.reference for pair in part]).to(chosen)  # (B, 2)
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, reference[:, 0], reference[:, 1], options.beta
        )
        margins = chosen_rewards - rejected_rewards
        if options.nll_weight:  # IRPO (Pang et al. 2024) divides by the chosen output's length
            lengths = torch.tensor([len(pair.chosen_ids) for pair in part]).to(chosen)
            losses = losses - options.nll_weight * chosen / lengths
        for pair, loss in zip(part, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise InputError(f"{pair.name}: the loss is {loss}: a smaller --lr, or float32")
        columns = [losses, margins > 0, margins, chosen, rejected]
        records += torch.stack(columns, dim=1).tolist()
        # Divided by the batch's size, not the micro-batch's: their gradients add up to the mean's.
        (losses.sum() / len(batch)).backward()
    means = torch.tensor(records, dtype=torch.float64).mean(0).tolist()
    names = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob")
    return dict(zip(names, means, strict=True))


def train(model, pairs, options, state=None, log=None, end_of_epoch=None):
    """Trains `model` in place on a list of Pair: one round of DPO, its start the reference.

    options are fit_options'. state: a folder to save in at each epoch's end and to resume from, to
    identical bytes (on a GPU with --deterministic); the caller removes it. log(dict) is called
    after each step and end_of_epoch(epoch, model) after each epoch. A loss that is not finite, or
    the state of another run, ends in InputError.
    """
    if model.dtype == torch.float16:  # without a scaled loss its small gradients round to nothing
        raise InputError("--dtype float16 cannot be trained here: take bfloat16 or float32")
    ids = [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in pairs]
    weights = sum(p.sum(dtype=torch.float64).item() for p in model.parameters())
    key = {**asdict(options), "pairs": hash_of(ids), "weights": weights}
    # The reference is the model before training: it must be computed before a state is loaded, or
    # the reference of a resumed run would be the half-trained model.
    add_reference(model, pairs, options)
    optimizer = AdamW(model, options)
    epochs_done = load_state(state, optimizer, key) if state else 0
    size = options.batch_size
    total_steps = options.epochs * math.ceil(len(pairs) / size)
    for epoch in range(epochs_done + 1, options.epochs + 1):
        order = random_stream(options.seed, "dpo", "epoch", epoch).permutation(len(pairs))
        name = f"DPO, epoch {epoch} of {options.epochs}"
        with progress_bar(name, len(pairs), 0, "pairs") as bar:
            for first in range(0, len(pairs), size):
                batch = [pairs[i] for i in order[first : first + size]]
                record = train_step(model, batch, optimizer, total_steps)
                bar.set_postfix(loss=record["loss"], margin=record["margin"], refresh=False)
                bar.update(len(batch))
                if log:
                    log({"epoch": epoch, "step": optimizer.steps, "pairs": len(batch), **record})
        if end_of_epoch:
            end_of_epoch(epoch, model)
        if state:
            save_state(state, optimizer, {**key, "epoch": epoch})


def train_step(model, batch, optimizer, total_steps):
    """One step on a batch of pairs; returns its record."""
    options = optimizer.options
    record = add_gradient(model, batch, options)
    norm = optimizer.gradient_norm()
    if not math.isfinite(norm):
        raise InputError(f"{batch[0].name} and its batch: the gradient's norm is {norm}")
    lr = learning_rate(optimizer.steps + 1, total_steps, options)
    optimizer.step(lr, min(1.0, options.max_grad_norm / (norm + 1e-6)))  # as clip_grad_norm_
    return {**record, "grad_norm": norm, "lr": lr}


def learning_rate(step, total_steps, options):
    """The rate of step 1..total: a linear rise that ends at lr, then constant or a half cosine."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.lr
    done = (step - 1 - options.warmup_steps) / max(1, total_steps - options.warmup_steps)
    return options.lr * (1 + math.cos(math.pi * done)) / 2


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) whose small steps are not lost in 16-bit weights.

    A step of 5e-7 is below the resolution of a bf16 weight, so a float32 master copy takes the
    steps, and 16-bit weights are its rounding. Moments and gradient sums are float32. The state may
    be in host memory: each parameter's is then brought to the device, used and sent back.
    """

    def __init__(self, model, options):
        self.options = options
        self.steps = 0
        self.parameters = dict(model.named_parameters())
        kinds = ["mean", "square"]
        has_master_copy = model.dtype.itemsize == 2
        if has_master_copy:
            kinds.append("weight")
        self.state = empty_state(self.parameters, kinds, model, options)
        for name, p in self.parameters.items():
            if has_master_copy:
                self.state[f"weight.{name}"].copy_(p.detach())
            else:
                self.state[f"weight.{name}"] = p.detach()  # the weight itself, in its own memory

    def gradient_norm(self):
        """Euclidean norm over all parameters' gradients, in float32."""
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters.values()]
        return torch.stack(norms).norm().item()

    @torch.no_grad()
    def step(self, lr, scale):
        """One update with the gradients times `scale`; each is freed as soon as it is used."""
        self.steps += 1
        beta1 = self.options.adam_beta1
        beta2 = self.options.adam_beta2
        for name, p in self.parameters.items():
            stored = [self.state[f"{kind}.{name}"] for kind in ("mean", "square", "weight")]
            mean, square, weight = (tensor.to(p.device) for tensor in stored)
            grad = p.grad.mul_(scale)
            p.grad = None
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if p.ndim > 1:  # norms and biases do not decay, as in Hugging Face's Trainer
                weight.mul_(1 - lr * self.options.weight_decay)
            spread = square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(1e-8)
            weight.addcdiv_(mean, spread, value=-lr / (1 - beta1**self.steps))
            p.copy_(weight)
            for tensor, updated in zip(stored, (mean, square, weight), strict=True):
                tensor.copy_(updated)  # back to the host; nothing to do where both are one tensor


def save_state(folder, optimizer, key):
    """Moments, weights and step as folder/epoch-N, written aside and renamed; older ones go."""
    final = Path(folder, f"epoch-{key['epoch']}")
    with write_whole(final, folder=True) as aside:
        save_file(optimizer.state, aside / "model.safetensors")
        write_json(aside / "key.json", {**key, "steps": optimizer.steps})
    for path in set(final.parent.glob("epoch-*")) - {final}:
        shutil.rmtree(path)


def load_state(folder, optimizer, key):
    """Puts the last saved state into the optimizer and its model; returns its epoch, 0 for none.

    key: options, pairs and weights that it must have been saved with. A change of the code is not
    seen: remove the folder after one, or old steps and new ones are mixed.
    """
    whole = Path(folder).glob("epoch-*[0-9]")  # what a kill cut short ends in .partial
    last = max(whole, key=lambda path: int(path.name.removeprefix("epoch-")), default=None)
    if last is None:
        return 0
    saved = read_json(last / "key.json")
    for name, value in key.items():
        if saved.get(name) != value:
            raise InputError(
                f"{folder}: {name} was {saved.get(name)} and is {value}: remove it to start anew"
            )
    for _, name, tensor in stored_tensors(last):
        optimizer.state[name].copy_(tensor)
    optimizer.steps = saved["steps"]
    for name, p in optimizer.parameters.items():
        p.detach().copy_(optimizer.state[f"weight.{name}"])
    return saved["epoch"]


@dataclass
class Options:
    """What training depends on. "Field": usual for Llama-3-8B, where our text gives no value."""

    beta: float = option(0.1, "weight of the reference in the loss; field", low=1e-9)
    lr: float = option(5e-7, "learning rate; field", low=0, high=1)
    adam_beta1: float = option(0.9, "decay of the first moment; field", low=0, high=0.9999999)
    adam_beta2: float = option(0.95, "of the second moment; field", low=0, high=0.9999999)
    weight_decay: float = option(0.0, "AdamW's, of matrices alone; ours", low=0)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down; field", low=1e-9)
    warmup_steps: int = option(0, "steps over which the rate rises to --lr; ours", low=0)
    lr_schedule: str = option("constant", "after it; ours", choices=("constant", "cosine"))
    epochs: int = option(10, "passes over the pairs; paper 3.1", low=1)
    batch_size: int = option(64, "pairs a step; field", low=1)
    nll_weight: float = option(0.0, "IRPO's term; paper: made little difference", low=0)
    micro_batch_tokens: int = option(None, "tokens at once (default: 8192 or fewer; CPU 1024)", 1)
    keep_activations: int = option(None, "blocks not recomputed (default: what fits; CPU 1)", 0)
    optimizer_device: str = option("auto", "AdamW's; ours", choices=("auto", "same", "cpu"))
    seed: int = option(0, "names the random stream of each epoch's order", low=0)


def read_pairs(path, config):
    """The pairs of a file, list of Pair; refuses what cannot be trained on, by its line."""
    pairs = []
    context = config.max_position_embeddings
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        sides = ("prompt_ids", "chosen_ids", "rejected_ids")
        for side in sides:
            check_ids(row.get(side), config.vocab_size, f"{where}: {side}")
        length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if length > context:
            raise InputError(f"{where}: {length} tokens in a context of {context}")
        pairs.append(Pair(where, *(row[side] for side in sides)))
    if not pairs:
        raise InputError(f"{path}: there is no pair in it")
    return pairs


def check_ids(ids, vocab_size, where):
    """Refuses what is no list of token ids."""
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise InputError(f"{where} is {ids!r:.40}, not a list of token ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise InputError(f"{where}: id {bad} is outside of the vocabulary, 0 to {vocab_size - 1}")


def fit_options(model, longest, options):
    """Fills in what is left to the device, by trying the longest pair out before the long work."""
    is_gpu = model.device.type == "cuda"
    layers = model.config.num_hidden_layers
    options = replace(options, optimizer_device=place_optimizer(model, options))
    tokens = options.micro_batch_tokens or (8192 if is_gpu else 1024)
    if options.keep_activations is not None:
        keeps = [options.keep_activations]
    else:
        keeps = [layers, layers // 2, layers // 4, 0] if is_gpu else [1]
    candidates = [(tokens, keep) for keep in keeps]
    if options.micro_batch_tokens is None:
        candidates.append((1, keeps[-1]))  # one pair at a time
    for tokens, keep in candidates:
        candidate = replace(options, micro_batch_tokens=tokens, keep_activations=keep)
        try:
            try_out(model, longest, candidate)
            return candidate
        except torch.OutOfMemoryError:
            pass  # the next candidate takes less
        finally:
            model.zero_grad()
    raise InputError(
        f"{model.device}: out of memory on a pair of {longest.num_tokens} tokens: try --dtype "
        "bfloat16, --optimizer-device cpu, a smaller --max-new-tokens or a smaller model"
    )


def try_out(model, longest, options):
    """Computes the gradient of the largest micro-batch that can come, beside the optimizer."""
    count = math.ceil(options.micro_batch_tokens / longest.num_tokens)
    largest = replace(options, micro_batch_tokens=count * longest.num_tokens)
    # First any pair: in training the sums of gradients are there beside the activations.
    short = Pair("a trial", [0], [0], [0], (0.0, 0.0))
    optimizer = AdamW(model, options) if options.optimizer_device == "same" else None
    add_gradient(model, [short], largest)
    add_gradient(model, [replace(longest, reference=(0.0, 0.0))] * count, largest)
    del optimizer  # it only had to be there


def place_optimizer(model, options):
    """Where AdamW's state goes: "same", the model's device, or "cpu"; refuses what fits nowhere."""
    count = sum(p.numel() for p in model.parameters())
    weights = count * model.dtype.itemsize
    state = count * (12 if model.dtype.itemsize == 2 else 8)  # two moments, and a master copy
    place = "same" if options.optimizer_device == "auto" else options.optimizer_device
    needed = weights + 4 * count + state  # the gradient sums are float32
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
        if options.optimizer_device == "auto" and needed > 0.85 * total:
            place = "cpu"
        # Of the host's memory: the state, and the weights that a save brings there.
        needed = weights + (state if place == "cpu" else 0)
    free = host_memory()
    if needed > free:
        raise InputError(
            f"training takes {needed / GIB:.1f} GiB of memory or more, and {free / GIB:.1f} are "
            "free: take a smaller model"
        )
    return place


def host_memory():
    """Bytes that are free for this process, within its container's limit."""
    free = math.inf
    if Path("/proc/meminfo").exists():
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()))
    return free


def empty_state(parameters, kinds, model, options):
    """Zeros for AdamW's state: {"kind.name": float32 tensor of the parameter's shape}.

    In host memory they are page-locked, so that copies run at the bus's full speed. torch rounds
    each page-locked buffer up to a power of two, a third more for Llama-3.2-3B. So buffers of such
    sizes are allocated, and parameters fill them, the largest first.
    """
    where = {"dtype": torch.promote_types(model.dtype, torch.float32), "device": model.device}
    if options.optimizer_device == "cpu":
        where |= {"device": "cpu", "pin_memory": model.device.type == "cuda"}
    state = {}
    left = sorted(parameters.items(), key=lambda item: -item[1].numel())
    while left:
        counts = [p.numel() for _, p in left]
        power_of_two = 1 << (sum(counts).bit_length() - 1)
        part = batch_by_size(left, counts, power_of_two)[0]
        left = left[len(part) :]
        counts = counts[: len(part)]
        for kind in kinds:
            views = torch.zeros(sum(counts), **where).split(counts)
            for (name, p), view in zip(part, views, strict=True):
                state[f"{kind}.{name}"] = view.view(p.shape)
    return state


def main():
    parser = make_parser("One round of DPO on a file of pairs.", Options, Device)
    parser.add_argument("--model", required=True, help="checkpoint or hub id, also the reference")
    parser.add_argument("--pairs", required=True, help="file of pairs, from judge.py")
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    args = parser.parse_args()
    check_output(args.output)
    source = checkpoint_folder(args.model)
    pairs = read_pairs(args.pairs, read_config(source))
    stop_ids = load_tokenizer(source).stop_ids
    endless = sum(pair.chosen_ids[-1] not in stop_ids for pair in pairs)
    if endless:
        print(
            f"warning: {args.pairs}: {endless} of {len(pairs)} chosen outputs do not end in one of "
            f"the model's stop tokens {stop_ids}; it would unlearn to stop",
            file=sys.stderr,
        )
    device = options_of(Device, args)
    set_deterministic(device)
    model = load_model(source, device.device, DTYPES[device.dtype])
    longest = max(pairs, key=lambda pair: pair.num_tokens)
    options = fit_options(model, longest, options_of(Options, args))
    state = Path(args.output).with_name(Path(args.output).name + ".state")
    train(model, pairs, options, state, print)
    save_model(model, args.output, source)
    shutil.rmtree(state)


if __name__ == "__main__":
    run_main(main, resumes=True)
