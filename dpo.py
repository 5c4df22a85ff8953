"""Direct Preference Optimization of one round's pairs (section 2.2): all weights are trained.

The model M_t that wrote the outputs is start and reference, the trained model is M_(t+1). The loss
covers thought, response and stop token: a thought is trained by what its response was worth,
although no judge ever read it.

    python dpo.py --model DIR --pairs FILE --output DIR

Unlike the DPO authors' code: a pair's prompt is computed once for both outputs, nothing is padded,
no second model is kept as the reference, and the full logits are never materialized.
"""

import math
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import model as lm

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

    def __len__(self):
        """Tokens to compute. An output's last one predicts nothing and is not put in."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids) - 1


def output_logprobs(model, pairs, keep_activations=0, logit_rows=512):
    """Log-probabilities of whole outputs: (B,) of the chosen, (B,) of the rejected, in nats.

    Each sums log p(token | all before) over the output, stop token included. All pairs lie in one
    packed row, the prompt once, both outputs as its continuations. Only `logit_rows` tokens' logits
    exist at once (0.25 GiB at 128k words); they and all but `keep_activations` blocks are
    recomputed in the backward pass.
    """
    pieces, is_output, targets, lengths = [], [], [], []
    for pair in pairs:
        # The prompt's last token predicts an output's first: it begins both continuations.
        *prompt, last = pair.prompt_ids
        prefix = len(pieces) if prompt else None
        if prompt:
            pieces.append((prompt, None))
            is_output += [False] * len(prompt)
        for ids in (pair.chosen_ids, pair.rejected_ids):
            pieces.append(([last, *ids[:-1]], prefix))
            is_output += [True] * len(ids)
            targets += ids
            lengths.append(len(ids))
    device = model.head.device
    recompute = max(0, model.config.num_hidden_layers - keep_activations)
    hidden = model.model(*lm.pack(pieces, device), recompute)[0]  # (N, hidden)
    hidden = hidden[torch.tensor(is_output, device=device)].split(logit_rows)  # (M, hidden) in all
    targets, logprobs = torch.tensor(targets, device=device).split(logit_rows), []
    for rows, ids in zip(hidden, targets, strict=True):
        logprobs.append(checkpoint(token_logprobs, rows, model.head, ids, use_reentrant=False))
    sums = torch.stack([output.sum() for output in torch.cat(logprobs).split(lengths)])  # (2 B,)
    return sums[0::2], sums[1::2]


def token_logprobs(hidden, head, targets):
    """log softmax(hidden @ head.T)[target]: (M, hidden), (V, hidden), (M,) -> (M,), in float32."""
    return -F.cross_entropy(lm.logits_of(hidden, head), targets, reduction="none")


def add_reference(model, pairs, options):
    """Sets each pair's reference: what the model before training gives both outputs."""
    for part in lm.fill(pairs, map(len, pairs), options.micro_batch_tokens):
        with torch.no_grad():
            logprobs = torch.stack(output_logprobs(model, part), dim=1).tolist()  # (B, 2)
        for pair, both in zip(part, logprobs, strict=True):
            pair.reference = both


def add_gradient(model, batch, options):
    """Adds the gradient of the batch's mean loss to the weights', one micro-batch at a time.

    Returns a dict of means over the pairs; accuracy is the share whose chosen output has the higher
    implicit reward, margin the difference of the two rewards.
    """
    for p in model.parameters():
        p.grad_dtype = torch.promote_types(p.dtype, torch.float32)  # the sums' over micro-batches
    records = []
    for part in lm.fill(batch, map(len, batch), options.micro_batch_tokens):
        chosen, rejected = output_logprobs(model, part, options.keep_activations)  # (B,) each
        reference = torch.tensor([pair.reference for pair in part]).to(chosen).T  # (2, B)
        losses, *rewards = dpo_loss(chosen, rejected, *reference, options.beta)
        margins = rewards[0] - rewards[1]
        if options.nll_weight:  # IRPO (Pang et al. 2024) divides by the chosen output's length
            lengths = torch.tensor([len(pair.chosen_ids) for pair in part]).to(chosen)
            losses = losses - options.nll_weight * chosen / lengths
        for pair, loss in zip(part, losses.tolist(), strict=True):
            lm.expect(math.isfinite(loss), f"{pair.name}: loss", loss, "a finite number")
        records += torch.stack([losses, margins > 0, margins, chosen, rejected], dim=1).tolist()
        (losses.sum() / len(batch)).backward()
    means = [sum(column) / len(batch) for column in zip(*records, strict=True)]
    names = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob")
    return dict(zip(names, means, strict=True))


def train(model, pairs, options, state=None, log=None, end_of_epoch=None):
    """Trains `model` in place on a list of Pair: one round of DPO, its start the reference.

    options are fit_options'. state: a folder to save in at each epoch's end and to resume from, to
    identical bytes (on a GPU with --deterministic); the caller removes it. log(dict) is called
    after each step and end_of_epoch(epoch, model) after each epoch. A loss that is not finite, or
    the state of another run, ends in lm.InputError.
    """
    # Without a scaled loss the small gradients of float16 would be rounded to nothing.
    lm.expect(model.head.dtype != torch.float16, "--dtype", "float16", "bfloat16 or float32")
    ids = [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in pairs]
    weights = sum(p.sum(dtype=torch.float64).item() for p in model.parameters())
    key = {**asdict(options), "pairs": lm.hash_of(ids), "weights": weights}
    add_reference(model, pairs, options)
    optimizer, size = AdamW(model, options), options.batch_size
    total = options.epochs * math.ceil(len(pairs) / size)
    done = load_state(state, optimizer, key) if state else 0
    for epoch in range(done + 1, options.epochs + 1):
        order = lm.stream(options.seed, "dpo", "epoch", epoch).permutation(len(pairs))
        name = f"DPO, epoch {epoch} of {options.epochs}"
        with lm.progress_bar(name, len(pairs), 0, "pairs") as bar:
            for first in range(0, len(pairs), size):
                batch = [pairs[i] for i in order[first : first + size]]
                record = train_step(model, batch, optimizer, total)
                bar.set_postfix(loss=record["loss"], margin=record["margin"], refresh=False)
                bar.update(len(batch))
                if log:
                    log({"epoch": epoch, "step": optimizer.steps, **record})
        if end_of_epoch:
            end_of_epoch(epoch, model)
        if state:
            save_state(state, optimizer, {**key, "epoch": epoch})


def train_step(model, batch, optimizer, total):
    """One step on a batch of pairs; returns its record."""
    options = optimizer.options
    record = add_gradient(model, batch, options)
    norm = optimizer.gradient_norm()
    lm.expect(math.isfinite(norm), f"{batch[0].name} and its batch: gradient norm", norm, "finite")
    lr = learning_rate(optimizer.steps + 1, total, options)
    optimizer.step(lr, min(1.0, options.max_grad_norm / (norm + 1e-6)))  # as clip_grad_norm_
    return {**record, "grad_norm": norm, "lr": lr}


def learning_rate(step, total, options):
    """The rate of step 1..total: a linear rise that ends at lr, then constant or a half cosine."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.lr_schedule == "constant":
        return options.lr
    done = (step - 1 - options.warmup_steps) / max(1, total - options.warmup_steps)
    return options.lr * (1 + math.cos(math.pi * done)) / 2


class AdamW:
    """AdamW whose small steps are not lost in 16-bit weights.

    A step of 5e-7 is below the resolution of a bf16 weight, so a float32 master copy takes the
    steps, and 16-bit weights are its rounding. Moments and gradient sums are float32. The state may
    be in host memory: each parameter's is then brought to the device, used and sent back.
    """

    def __init__(self, model, options):
        self.options, self.steps, head = options, 0, model.head
        self.parameters = dict(model.named_parameters())
        wide = torch.promote_types(head.dtype, torch.float32)
        new = {"dtype": wide, "device": head.device}
        if options.optimizer_device == "cpu":  # page-locked, so copied at the bus's full speed
            new |= {"device": "cpu", "pin_memory": head.is_cuda}
        kinds = ["mean", "square"] + ["weight"] * (wide != head.dtype)
        self.state = {}  # all that a resumed run needs, by name
        # torch rounds page-locked memory up to a power of two, a third more for Llama-3.2-3B. So
        # it is asked for in such powers, each of which parameters fill, the largest first.
        rest = sorted(self.parameters.items(), key=lambda item: -item[1].numel())
        while rest:
            counts = [p.numel() for _, p in rest]
            part = lm.fill(rest, counts, 1 << sum(counts).bit_length() - 1)[0]
            rest, counts = rest[len(part) :], counts[: len(part)]
            for kind in kinds:
                views = torch.zeros(sum(counts), **new).split(counts)
                for (name, p), view in zip(part, views, strict=True):
                    self.state[f"{kind}.{name}"] = view.view(p.shape)
        for name, p in self.parameters.items():
            self.state.setdefault(f"weight.{name}", p.detach()).copy_(p.detach())

    def gradient_norm(self):
        """Euclidean norm over all parameters' gradients, in float32."""
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters.values()]
        return torch.stack(norms).norm().item()

    @torch.no_grad()
    def step(self, lr, scale):
        """One update with the gradients times `scale`; each is freed as soon as it is used."""
        self.steps += 1
        beta1, beta2 = self.options.adam_beta1, self.options.adam_beta2
        for name, p in self.parameters.items():
            state = [self.state[f"{kind}.{name}"] for kind in ("mean", "square", "weight")]
            mean, square, weight = (x.to(p.device) for x in state)
            grad, p.grad = p.grad.mul_(scale), None
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if p.ndim > 1:  # norms and biases do not decay, as in Hugging Face's Trainer
                weight.mul_(1 - lr * self.options.weight_decay)
            spread = square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(1e-8)
            weight.addcdiv_(mean, spread, value=-lr / (1 - beta1**self.steps))
            p.copy_(weight)
            for kept, moved in zip(state, (mean, square, weight), strict=True):
                kept.copy_(moved)  # nothing where both are one tensor


def save_state(folder, optimizer, key):
    """Moments, weights and step as folder/epoch-N, written aside and renamed; older ones go."""
    final = Path(folder, f"epoch-{key['epoch']}")
    with lm.write_whole(final, folder=True) as aside:
        save_file(optimizer.state, aside / "model.safetensors")
        lm.write_json(aside / "key.json", {**key, "steps": optimizer.steps})
    for path in set(final.parent.glob("epoch-*")) - {final}:
        shutil.rmtree(path)


def load_state(folder, optimizer, key):
    """Puts the last saved state into the optimizer and its model; returns its epoch, 0 for none."""
    whole = Path(folder).glob("epoch-*[0-9]")  # what a kill cut short ends in .partial
    last = max(whole, key=lambda path: int(path.name.removeprefix("epoch-")), default=None)
    if last is None:
        return 0
    found = lm.read_json(last / "key.json")
    for name, value in key.items():
        was = found.get(name)
        lm.expect(was == value, f"{folder}: {name}", was, f"{value}; remove it to start anew")
    for _, name, tensor in lm.stored_tensors(last):
        optimizer.state[name].copy_(tensor)
    optimizer.steps = found["steps"]
    for name, p in optimizer.parameters.items():
        p.detach().copy_(optimizer.state[f"weight.{name}"])
    return found["epoch"]


def fit_options(model, longest, options):
    """Fills in the options left to the device; refuses, before the long work, what cannot fit."""
    head, layers, size = model.head, model.config.num_hidden_layers, len(longest)
    given = {name: value for name, value in asdict(options).items() if value is not None}
    given["optimizer_device"] = place_optimizer(model, options)
    most, pair = max(1, 8192 // size) * size, replace(longest, reference=(0.0, 0.0))
    tries = [(most, layers * share // 4) for share in (4, 3, 2, 1)] + [(most, 1), (size, 1)]
    for tokens, kept in tries if head.is_cuda else [(1024, 1)]:
        tried = Options(**{"micro_batch_tokens": tokens, "keep_activations": kept, **given})
        count = -(-tried.micro_batch_tokens // size)  # no micro-batch has more tokens than these
        whole = replace(tried, micro_batch_tokens=count * size)
        try:
            held = AdamW(model, tried) if tried.optimizer_device == "same" else None
            # First any pair: in training the sums of gradients are there beside the activations.
            add_gradient(model, [Pair("", [0], [0], [0], (0.0, 0.0))], whole)
            add_gradient(model, [pair] * count, whole)
            return tried
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
        finally:
            held = None  # noqa: F841, it only had to be there beside the gradient
            model.zero_grad()
    hint = "--dtype bfloat16, --optimizer-device cpu, --max-new-tokens or a smaller model"
    raise lm.InputError(f"{head.device}: out of memory on a pair of {size} tokens; try {hint}")


def place_optimizer(model, options):
    """Where AdamW's state goes: "same", the model's device, or "cpu"; refuses what fits nowhere."""
    head, count = model.head, sum(p.numel() for p in model.parameters())
    state = count * (12 if head.itemsize == 2 else 8)  # two moments, and a master copy
    needed = count * (head.itemsize + 4) + state  # with weights and gradient sums
    place = options.optimizer_device.replace("auto", "same")
    if head.is_cuda:
        total = torch.cuda.get_device_properties(head.device).total_memory
        if options.optimizer_device == "auto" and needed > 0.85 * total:
            place = "cpu"
        # Of the host's memory: the state, and the weights that a save brings there.
        needed = state * (place == "cpu") + count * head.itemsize
    free, least = host_memory(), f"{needed / lm.GIB:.1f} GiB or more, or a smaller model"
    lm.expect(needed <= free, "training: free memory", f"{free / lm.GIB:.1f} GiB", least)
    return place


def host_memory():
    """Bytes that are free for this process, within its container's limit."""
    free, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    free = re.search(r"MemAvailable:\s+(\d+)", free.read_text())[1] if free.exists() else "inf"
    limit = limit.read_text().strip() if limit.exists() else "max"
    return min(1024 * float(free), float(limit.replace("max", "inf")))


@dataclass
class Options:
    """What training depends on. "Field": usual for Llama-3-8B, where our text gives no value."""

    beta: float = lm.option(0.1, "weight of the reference in the loss; field", low=1e-9)
    lr: float = lm.option(5e-7, "learning rate; field", low=0, high=1)
    adam_beta1: float = lm.option(0.9, "decay of the first moment; field", low=0, high=0.9999999)
    adam_beta2: float = lm.option(0.95, "of the second moment; field", low=0, high=0.9999999)
    weight_decay: float = lm.option(0.0, "AdamW's, of matrices alone; ours", low=0)
    max_grad_norm: float = lm.option(1.0, "longer gradients are scaled down; field", low=1e-9)
    warmup_steps: int = lm.option(0, "steps over which the rate rises to --lr; ours", low=0)
    lr_schedule: str = lm.option("constant", "after it; ours", choices=("constant", "cosine"))
    epochs: int = lm.option(10, "passes over the pairs; paper 3.1", low=1)
    batch_size: int = lm.option(64, "pairs a step; field", low=1)
    nll_weight: float = lm.option(0.0, "IRPO's term; paper: made little difference", low=0)
    micro_batch_tokens: int = lm.option(None, "at once; ours: by trying, 1024 on the CPU", low=1)
    keep_activations: int = lm.option(None, "blocks not recomputed; ours: by trying, 1", low=0)
    optimizer_device: str = lm.option("auto", "AdamW's; ours", choices=("auto", "same", "cpu"))
    seed: int = lm.option(0, "names the random stream of each epoch's order", low=0)


def read_pairs(path, config):
    """The pairs of a file, list of Pair; refuses what cannot be trained on, by its line."""
    pairs, sides = [], ("prompt_ids", "chosen_ids", "rejected_ids")
    top, most = config.vocab_size - 1, config.max_position_embeddings
    for line, row in lm.read_jsonl(path):
        where = f"{path}:{line}"
        for side in sides:
            ids = row.get(side)
            good = isinstance(ids, list) and set(map(type, ids)) == {int}
            good = good and 0 <= min(ids) <= max(ids) <= top
            lm.expect(good, f"{where}: {side}", repr(ids)[:40], f"a list of ids from 0 to {top}")
        length = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        lm.expect(length <= most, f"{where}: prompt and output", length, f"{most} tokens at most")
        pairs.append(Pair(where, *map(row.get, sides)))
    lm.expect(pairs, path, "no pair", "at least one")
    return pairs


def main():
    parser = lm.make_parser("One round of DPO on a file of pairs.", Options, lm.Device)
    parser.add_argument("--model", required=True, help="checkpoint or hub id, also the reference")
    parser.add_argument("--pairs", required=True, help="file of pairs, from judge.py")
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    args = parser.parse_args()
    lm.check_output(args.output)
    source = lm.checkpoint_folder(args.model)
    pairs = read_pairs(args.pairs, lm.read_config(source))
    device, options = lm.options_of(lm.Device, args), lm.options_of(Options, args)
    model = lm.load_model(source, device.device, lm.DTYPES[device.dtype])
    options = fit_options(model, max(pairs, key=len), options)
    state = Path(args.output).with_name(Path(args.output).name + ".state")
    train(model, pairs, options, state, print)
    lm.save_model(model, args.output, source)
    shutil.rmtree(state)


if __name__ == "__main__":
    lm.run_main(main)
