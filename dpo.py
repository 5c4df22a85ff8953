"""Direct Preference Optimization of one round's pairs (section 2.2).

M_(t-1), which wrote the outputs, is start and reference; the result is M_t, all weights
trained. A thought is credited with its response's score, though no judge ever read it.

    python dpo.py --model DIR --pairs FILE --output DIR

Unlike the DPO authors' code: a prompt is computed once for both outputs, nothing is
padded, no second model is the reference, and the full logits are never in memory.
"""

import math
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from model import DTYPES, Device, InputError, batch_by_size, check_output, hash_of, pack
from model import checkpoint_folder, load_model, load_tokenizer, logits_of, make_parser
from model import option, options_of, progress_bar, random_stream, read_config, read_json
from model import read_jsonl, run_main, save_model, stored_tensors, write_json, write_whole

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """DPO's loss (Rafailov et al. 2023, equation 7), which section 2.2 trains with.

    Four (B,) sums of log-probabilities of whole outputs, in nats -> three (B,): losses
    and the implicit rewards of chosen and rejected, without gradient.

    >>> zero = torch.zeros(1)
    >>> dpo_loss(zero, zero, zero, zero, beta=0.1)[0].exp()
    tensor([2.])
    """
    # An output's implicit reward: beta * log(policy / reference).
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    # Bradley-Terry: the sigmoid is the probability that chosen wins.
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


@dataclass
class Pair:
    """A prompt and its two outputs as token ids."""

    name: str  # its place in the file, for errors
    prompt_ids: list
    chosen_ids: list
    rejected_ids: list
    reference: tuple = ()  # both outputs' log-probabilities before training

    @property
    def num_tokens(self):  # of the packed input: prompt[:-1], and each output's length
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids) - 1


def output_logprobs(model, pairs, keep_activations=0, logit_rows=512):
    """Log-probabilities of whole outputs, in nats: (B,) of chosen, (B,) of rejected.

    Each sums log p(token | all before), stop token included. The backward pass computes
    all but `keep_activations` blocks again. Plain form: direct_logprobs in test_dpo.py.
    """
    # All pairs are one packed row. A prompt's last token begins both outputs:
    #     input      prompt[:-1]   last, chosen[:-1]   last, rejected[:-1]
    #     predicts   (ignored)     chosen              rejected
    pieces = []  # of the row: ids, and which piece they continue
    is_output = []  # per input token: does it predict an output token?
    targets = []  # chosen, rejected, chosen, ... end to end
    lengths = []
    for pair in pairs:
        *prompt, last = pair.prompt_ids
        prefix = len(pieces) if prompt else None  # one token leaves nothing to share
        if prompt:
            pieces.append((prompt, None))
            is_output += [False] * len(prompt)
        for ids in (pair.chosen_ids, pair.rejected_ids):
            pieces.append(([last, *ids[:-1]], prefix))
            is_output += [True] * len(ids)
            targets += ids
            lengths.append(len(ids))
    recompute = max(0, model.config.num_hidden_layers - keep_activations)
    hidden = model.model(*pack(pieces, model.device), recompute=recompute)[0]  # (N, hidden)
    hidden = hidden[torch.tensor(is_output, device=model.device)]  # (M, hidden)
    targets = torch.tensor(targets, device=model.device)  # (M,)

    def logprobs(hidden, ids):  # (R, hidden), (R,) -> (R,), in float32
        return -F.cross_entropy(logits_of(hidden, model.head), ids, reduction="none")

    # Logits of R = 512 tokens exist at once, 0.25 GiB at 128k words: `checkpoint` frees
    # them, and computes them again in the backward pass.
    parts = zip(hidden.split(logit_rows), targets.split(logit_rows), strict=True)
    parts = [checkpoint(logprobs, *part, use_reentrant=False) for part in parts]
    sums = [output.sum() for output in torch.cat(parts).split(lengths)]
    return torch.stack(sums).view(-1, 2).unbind(1)  # (B,) each


def micro_batches(pairs, options):
    """Lists of consecutive pairs of --micro-batch-tokens; a longer pair is alone."""
    return batch_by_size(pairs, [pair.num_tokens for pair in pairs], options.micro_batch_tokens)


@torch.no_grad()
def add_reference(model, pairs, options):
    """Sets each pair's reference: what the model before training gives."""
    for part in micro_batches(pairs, options):
        both = torch.stack(output_logprobs(model, part), dim=1)  # (B, 2)
        for pair, reference in zip(part, both.tolist(), strict=True):
            pair.reference = tuple(reference)


def add_gradient(model, batch, options):
    """Adds the gradient of a batch's mean loss; returns means over its pairs, a dict.

    accuracy: the share with a positive margin, which is chosen - rejected reward.
    """
    for p in model.parameters():
        # Summed in float32: a bfloat16 sum would round small gradients away.
        p.grad_dtype = torch.promote_types(p.dtype, torch.float32)
    records = []  # a row a pair
    for part in micro_batches(batch, options):
        chosen, rejected = output_logprobs(model, part, options.keep_activations)
        reference = torch.tensor([pair.reference for pair in part])  # (B, 2)
        reference = reference.to(chosen).unbind(1)  # (B,) each
        losses, *rewards = dpo_loss(chosen, rejected, *reference, options.beta)
        margins = rewards[0] - rewards[1]  # (B,)
        if options.nll_weight:  # IRPO (Pang et al. 2024) divides by the length
            lengths = torch.tensor([len(pair.chosen_ids) for pair in part])
            losses = losses - options.nll_weight * chosen / lengths.to(chosen)
        for pair, loss in zip(part, losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise InputError(f"{pair.name}: the loss is {loss}: a smaller --lr, or float32")
        # Over the batch's size: micro-batches add up to the gradient of the mean.
        (losses.sum() / len(batch)).backward()
        columns = [losses, (margins > 0).to(losses), margins, chosen, rejected]
        records += torch.stack(columns, dim=1).tolist()  # (B, 5)
    names = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob")
    means = torch.tensor(records, dtype=torch.float64).mean(0).tolist()
    return dict(zip(names, means, strict=True))


def train(model, pairs, options, state=None, log=None, end_of_epoch=None):
    """One round of DPO: trains `model` in place on a list of Pair.

    options: from fit_options. state: a folder to resume from, byte for byte (on a GPU
    with --deterministic); the caller removes it. log(dict) is called after each step,
    end_of_epoch(epoch, model) after each epoch. Raises InputError for a loss that is not
    finite and for the state of another run.
    """
    if model.dtype == torch.float16:  # small gradients would be 0 in it
        raise InputError("float16 cannot be trained: take bfloat16 or float32")
    # A state with another key is refused: it would mix two trainings.
    ids = [[pair.prompt_ids, pair.chosen_ids, pair.rejected_ids] for pair in pairs]
    weights = sum(p.sum(dtype=torch.float64).item() for p in model.parameters())
    key = {**asdict(options), "pairs": hash_of(ids), "weights": weights}
    # Before load_state, which puts half-trained weights into the model: a resumed run
    # must have the same reference, the model before training.
    add_reference(model, pairs, options)
    optimizer = AdamW(model, options)
    last_epoch = load_state(state, optimizer, key) if state else 0
    size = options.batch_size
    total_steps = options.epochs * math.ceil(len(pairs) / size)
    for epoch in range(last_epoch + 1, options.epochs + 1):
        # A random stream of its own: a resumed run draws the same order.
        stream = random_stream(options.seed, "dpo", "epoch", epoch)
        order = stream.permutation(len(pairs))
        label = f"DPO, epoch {epoch} of {options.epochs}"
        with progress_bar(label, len(pairs), 0, "pairs") as bar:
            for first in range(0, len(pairs), size):
                batch = [pairs[i] for i in order[first : first + size]]
                record = train_step(model, batch, optimizer, total_steps)
                bar.set_postfix(loss=record["loss"], margin=record["margin"])
                bar.update(len(batch))
                if log:
                    log({"epoch": epoch, "step": optimizer.steps, "pairs": len(batch), **record})
        if end_of_epoch:
            end_of_epoch(epoch, model)
        if state:  # last: if end_of_epoch is interrupted, a resumed run calls it again
            save_state(state, optimizer, {**key, "epoch": epoch})


def train_step(model, batch, optimizer, total_steps):
    """One step on a batch of pairs; returns its record."""
    options = optimizer.options
    record = add_gradient(model, batch, options)
    norm = optimizer.gradient_norm()
    if not math.isfinite(norm):
        raise InputError(f"{batch[0].name} and its batch: the gradient's norm is {norm}")
    lr = learning_rate(optimizer.steps + 1, total_steps, options)
    scale = min(1.0, options.max_grad_norm / (norm + 1e-6))  # as clip_grad_norm_
    optimizer.step(lr, scale)
    return {**record, "grad_norm": norm, "lr": lr}


def learning_rate(step, total_steps, options):
    """The rate of step 1..total: a linear rise, then constant or a half cosine."""
    warmup = options.warmup_steps
    if step <= warmup:
        return options.lr * step / warmup
    if options.lr_schedule == "constant":
        return options.lr
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)  # 0 to just below 1
    return options.lr * (1 + math.cos(math.pi * progress)) / 2


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) that keeps small steps of 16-bit weights.

    A step of 5e-7 is below a bf16 weight's resolution. A float32 master copy takes the
    steps, and the weight is its rounding.
    """

    def __init__(self, model, options):
        self.options = options
        self.steps = 0
        self.parameters = dict(model.named_parameters())
        self.state = {}
        wide = torch.promote_types(model.dtype, torch.float32)
        new = {"dtype": wide, "device": model.device}
        if options.optimizer_device == "cpu":
            # Page-locked memory is copied at the bus's full rate. But torch rounds each
            # buffer up to a power of two, at most doubling host RAM: 99 GiB, not 90, for
            # Llama-3-8B; 162, not 85, for Qwen2.5-7B.
            new = {"dtype": wide, "pin_memory": model.device.type == "cuda"}
        for name, p in self.parameters.items():
            weight = p.detach()  # in float32 no copy: the weight itself takes the steps
            if p.dtype != wide:
                weight = torch.empty(p.shape, **new).copy_(weight)
            self.state[f"mean.{name}"] = torch.zeros(p.shape, **new)
            self.state[f"square.{name}"] = torch.zeros(p.shape, **new)
            self.state[f"weight.{name}"] = weight

    def gradient_norm(self):  # the Euclidean norm over all parameters, in float32
        norms = [torch.linalg.vector_norm(p.grad) for p in self.parameters.values()]
        return torch.stack(norms).norm().item()

    @torch.no_grad()
    def step(self, lr, scale):
        """One update with the gradients times `scale`."""
        self.steps += 1
        beta1 = self.options.adam_beta1
        beta2 = self.options.adam_beta2
        for name, p in self.parameters.items():
            state = [self.state[f"{kind}.{name}"] for kind in ("mean", "square", "weight")]
            # Tensors on the host are copied over, one parameter's at a time.
            mean, square, weight = (tensor.to(p.device) for tensor in state)
            grad = p.grad.mul_(scale)
            p.grad = None  # frees the gradients one by one
            mean.lerp_(grad, 1 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if p.ndim > 1:  # as in Hugging Face's Trainer: no decay of norms and biases
                weight.mul_(1 - lr * self.options.weight_decay)
            # Both moments begin at 0: 1 - beta**steps corrects that bias.
            spread = square.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(1e-8)
            weight.addcdiv_(mean, spread, value=-lr / (1 - beta1**self.steps))
            p.copy_(weight)  # rounds to 16 bits; in float32 p is weight
            for tensor, value in zip(state, (mean, square, weight), strict=True):
                tensor.copy_(value)  # no copy if it is the same tensor


def save_state(folder, optimizer, key):
    """Moments, weights and step as folder/epoch-N; older ones are removed."""
    final = Path(folder, f"epoch-{key['epoch']}")
    with write_whole(final, folder=True) as aside:  # renamed when it is whole
        save_file(optimizer.state, aside / "model.safetensors")
        write_json(aside / "key.json", {**key, "steps": optimizer.steps})
    for path in set(final.parent.glob("epoch-*")) - {final}:
        shutil.rmtree(path)


def load_state(folder, optimizer, key):
    """Puts the last state into optimizer and model; returns its epoch, 0 for none."""
    whole = Path(folder).glob("epoch-*[0-9]")  # what a kill cut short ends in .partial
    epochs = [int(path.name.removeprefix("epoch-")) for path in whole]
    if not epochs:
        return 0
    last = Path(folder, f"epoch-{max(epochs)}")
    # A change of the code is not noticed: remove the folder after one.
    old = read_json(last / "key.json")
    for name, value in key.items():
        if old.get(name) != value:
            change = f"{name} was {old.get(name)} and is {value}"
            raise InputError(f"{folder}: {change}: remove it to start anew")
    for _, name, tensor in stored_tensors(last):
        optimizer.state[name].copy_(tensor)
    optimizer.steps = old["steps"]
    for name, p in optimizer.parameters.items():
        p.detach().copy_(optimizer.state[f"weight.{name}"])
    return old["epoch"]


@dataclass
class Options:
    """What training depends on; fit_options fills in what is None."""

    beta: float = option(0.1, "weight of the reference in the loss; field", low=1e-9)
    lr: float = option(5e-7, "learning rate; field", low=0, high=1)
    adam_beta1: float = option(0.9, "decay of the mean; field", low=0, high=0.9999999)
    adam_beta2: float = option(0.95, "of the square; field", low=0, high=0.9999999)
    weight_decay: float = option(0.0, "AdamW's, of matrices alone; ours", low=0)
    max_grad_norm: float = option(1.0, "scales longer gradients down; field", low=1e-9)
    warmup_steps: int = option(0, "in which the rate rises to --lr; ours", low=0)
    lr_schedule: str = option("constant", "after it; ours", choices=("constant", "cosine"))
    epochs: int = option(10, "passes over the pairs; paper 3.1", low=1)
    batch_size: int = option(64, "pairs a step; field", low=1)
    nll_weight: float = option(0.0, "IRPO's term; paper: made little difference", low=0)
    micro_batch_tokens: int = option(None, "tokens at once (default: 8192; CPU 1024)", low=1)
    keep_activations: int = option(None, "blocks not recomputed (default: 0; CPU 1)", low=0)
    optimizer_device: str = option(None, "default: same if it fits", choices=("same", "cpu"))
    seed: int = option(0, "of each epoch's random order", low=0)


def read_pairs(path, config):
    """A file's list of Pair; refuses by its line what cannot be trained on."""
    pairs = []
    top = config.vocab_size - 1
    context = config.max_position_embeddings
    for where, row in read_jsonl(path):
        sides = {name: row.get(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for name, ids in sides.items():
            # By type, not isinstance: True would pass for token 1.
            if not isinstance(ids, list) or set(map(type, ids)) != {int}:
                raise InputError(f"{where}: {name} is {ids!r:.40}, not a list of token ids")
            if min(ids) < 0 or max(ids) > top:
                raise InputError(f"{where}: {name} has an id outside of 0 to {top}")
        pair = Pair(where, **sides)
        length = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if length > context:
            raise InputError(f"{where}: {length} tokens in a context of {context}")
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{path}: there is no pair in it")
    return pairs


def fit_options(model, longest, options):
    """Fills in the device's defaults; tries the longest pair before the long work."""
    is_gpu = model.device.type == "cuda"
    defaults = {"micro_batch_tokens": 8192 if is_gpu else 1024}
    defaults["keep_activations"] = 0 if is_gpu else 1  # a GPU has less memory
    defaults["optimizer_device"] = place_optimizer(model) if is_gpu else "same"
    given = {name: value for name, value in asdict(options).items() if value is not None}
    options = Options(**defaults | given)
    # Copies of the longest pair, at least as many tokens as any micro-batch has.
    count = math.ceil(options.micro_batch_tokens / longest.num_tokens)
    largest = replace(options, micro_batch_tokens=count * longest.num_tokens)
    trial = [replace(longest, reference=(0.0, 0.0))] * count
    optimizer = AdamW(model, options) if options.optimizer_device == "same" else None
    # A small call first: as in training, p.grad exists while the largest batch runs.
    add_gradient(model, [Pair("a trial", [0], [0], [0], (0.0, 0.0))], largest)
    add_gradient(model, trial, largest)  # raises torch.OutOfMemoryError
    model.zero_grad()
    del optimizer  # it only had to be there
    return options


def place_optimizer(model):
    """Where AdamW's state fits: "same", the model's GPU, or "cpu"."""
    # Bytes: weight, summed gradient, two moments; in 16 bits a master copy.
    size = 2 + 4 + 8 + 4 if model.dtype.itemsize == 2 else 4 + 4 + 8
    need = size * sum(p.numel() for p in model.parameters())
    total = torch.cuda.get_device_properties(model.device).total_memory
    return "cpu" if need > 0.85 * total else "same"  # the rest is for activations


def main():
    parser = make_parser("One round of DPO on a file of pairs.", Options, Device)
    parser.add_argument("--model", required=True, help="checkpoint or hub id")
    parser.add_argument("--pairs", required=True, help="file of pairs, from judge.py")
    parser.add_argument("--output", required=True, help="checkpoint folder to write")
    args = parser.parse_args()
    check_output(args.output)
    source = checkpoint_folder(args.model)
    pairs = read_pairs(args.pairs, read_config(source))
    stop_ids = load_tokenizer(source).stop_ids
    endless = sum(pair.chosen_ids[-1] not in stop_ids for pair in pairs)
    if endless:
        text = f"{endless} of {len(pairs)} chosen outputs do not end in one of the model's"
        text += f" stop tokens {stop_ids}; it would unlearn to stop"
        print(f"warning: {args.pairs}: {text}", file=sys.stderr)
    device = options_of(Device, args)
    model = load_model(source, device.device, DTYPES[device.dtype])
    longest = max(pairs, key=lambda pair: pair.num_tokens)
    options = fit_options(model, longest, options_of(Options, args))
    state = Path(f"{Path(args.output)}.state")
    train(model, pairs, options, state, print)
    save_model(model, args.output, source)
    shutil.rmtree(state)  # after save_model: a run killed in it resumes


if __name__ == "__main__":
    run_main(main, resumes=True)
