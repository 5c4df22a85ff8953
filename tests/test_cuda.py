"""The CUDA paths without a GPU: fake tensors, which have a device, a dtype and a shape but no data.

Operators on them refuse mixed devices as a GPU would. What needs the data itself (a wait for the
device, a mask as an index) gets a stand-in. tests/benchmarks/gpu.py is the run on a real GPU.

    pytest tests/test_cuda.py
"""

import contextlib
import ctypes
import math
from collections import Counter, deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import dpo
import judge
import model as lm
import sample

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TensorBytes, buffer_bytes, use_dense_masks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
}
LLAMA_8B = TINY | {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_3B = LLAMA_1B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
}
QWEN_7B = LLAMA_8B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "qkv_bias": True,
}
PAIRS = [dpo.Pair("a", [1, 2, 3], [4, 5], [6, 7, 8]), dpo.Pair("b", [1], [4], [6, 7])]


@pytest.fixture(scope="module")
def device_guard():
    """Autograd asks for CUDA's device guard, and a CPU build of torch has none.

    torch has one that does nothing, which takes the place of a guard that counts no device. So
    such a guard is registered first: an object whose every method returns 0.
    """
    library = next(Path(torch.__file__).parent.glob("lib/libc10.*"), None)
    try:
        name = "_ZN3c104impl26device_guard_impl_registryE"
        registry = (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(library)), name)
    except (OSError, ValueError):
        pytest.skip("no place for a device guard in this build of torch")
    before = registry[1]
    if before is None:
        method = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
        methods = (ctypes.c_void_p * 64)(*[ctypes.cast(method, ctypes.c_void_p).value] * 64)
        instance = ctypes.c_void_p(ctypes.addressof(methods))
        registry[1] = ctypes.addressof(instance)
    torch._C._ensureCUDADeviceGuardSet()
    yield
    registry[1] = before


class StandIns(TorchFunctionMode):
    """For what needs data: a tensor's numbers are ones, and a mask selects as many as it has."""

    def __init__(self):
        super().__init__()
        self.pinned, self.waits, self.backwards = 0, 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.tolist, torch.Tensor.item):
            self.waits += args[0].is_cuda
            kind = float if args[0].is_floating_point() else int
            return np.ones(tuple(args[0].shape), dtype=kind).tolist()
        if function is torch.Tensor.backward:
            self.backwards += 1
            return run_backward(args[0])
        if function is torch.Tensor.__getitem__ and hasattr(args[1], "trues"):
            args = args[0], torch.arange(args[1].trues, device=args[1].device)
        self.pinned += kwargs.pop("pin_memory", False)
        made = function(*args, **kwargs)
        if function is torch.tensor and made.dtype == torch.bool:
            made.trues = sum(args[0])
        return made


@torch.no_grad()
def run_backward(root):
    """In place of torch's engine, which needs a CUDA build: each node after all that feed it.

    A gradient must be where its receiver is, and gets its dtype and shape, as in the engine.
    """
    feeding, nodes = Counter(), [root.grad_fn]
    for node in nodes:
        for following, _ in node.next_functions:
            feeding[following] += 1
            if following is not None and feeding[following] == 1:
                nodes.append(following)
    nodes.clear()
    received, ready = {root.grad_fn: {0: torch.ones_like(root)}}, [root.grad_fn]
    while ready:
        node = ready.pop()
        own = received.pop(node, {})
        if hasattr(node, "variable"):  # a weight
            p = node.variable
            p.grad = own[0] if p.grad is None else p.grad + own[0]
            continue
        given = [own.get(i) for i in range(len(node._input_metadata))]
        made = node(*given) if callable(node) else node.apply(*given)
        made = list(made) if isinstance(made, tuple) else [made]
        own, given = None, None
        for following, i in node.next_functions:
            grad = made.pop(0)
            if following is None:
                continue
            if grad is not None:
                asked, sums = following._input_metadata[i], received.setdefault(following, {})
                assert grad.device == asked.device, (node, following)
                weight = getattr(following, "variable", None)
                grad = grad.to(asked.dtype if weight is None else weight.grad_dtype)
                grad = grad.sum_to_size(asked.shape)
                sums[i] = sums[i] + grad if i in sums else grad
            feeding[following] -= 1
            if not feeding[following]:
                ready.append(following)


@pytest.fixture
def fake(device_guard, monkeypatch):
    """Everything in the test is a fake tensor; yields the stand-ins."""
    stand_ins = StandIns()
    monkeypatch.setattr(FakeTensor, "tolist", torch.Tensor.tolist)  # its own takes items singly
    # A checkpointed block computes again once in each pass that has a number.
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: stand_ins.backwards)

    def replay(decoder, both):  # there is no CUDA graph
        return decoder.forward(both, decoder.length)

    monkeypatch.setattr(sample.Decoder, "replay", replay)

    use_dense_masks(monkeypatch, CUDA)
    with FakeTensorMode(), stand_ins:
        yield stand_ins


def fill(make, dtype=torch.bfloat16):
    """A module with weights of this dtype on the fake device."""
    torch.set_default_dtype(dtype)
    try:
        with CUDA:
            module = make().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    module.model.frequencies = lm.rope_frequencies(module.config).to(CUDA)
    return module


def config_of(values):
    """As read_config gives it, of a llama."""
    same = {"rotated": [1] * values["num_hidden_layers"], "head_norms": False}
    return SimpleNamespace(**same, **values)


def fill_model(config=TINY, dtype=torch.bfloat16):
    return fill(lambda: lm.LanguageModel(config_of(config)), dtype)


both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def is_at(x, shape, dtype, device=CUDA):
    return tuple(x.shape) == tuple(shape) and x.dtype == dtype and x.device == device


@both_dtypes
def test_logits_are_float32(fake, dtype):
    model = fill_model(TINY, dtype)
    with torch.no_grad():
        logits = model(torch.zeros(2, 7, dtype=torch.int64, device=CUDA))
    assert is_at(logits, (2, 7, 500), torch.float32)


@both_dtypes
@pytest.mark.parametrize("kept", [0, 1])
def test_a_step_of_dpo_sums_gradients_in_float32(fake, dtype, kept):
    model = fill_model(TINY, dtype)
    options = dpo.Options(micro_batch_tokens=4, keep_activations=kept, nll_weight=0.5)
    pairs = [replace(pair) for pair in PAIRS]
    dpo.add_reference(model, pairs, options)
    record = dpo.add_gradient(model, pairs, options)
    assert set(record) == {"loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob"}
    for p in model.parameters():
        assert is_at(p, p.shape, dtype) and is_at(p.grad, p.shape, torch.float32)


@both_dtypes
@pytest.mark.parametrize("place", ["same", "cpu"])
def test_the_optimizer_keeps_its_state_in_float32(fake, dtype, place):
    model = fill_model(TINY, dtype)
    options = dpo.Options(micro_batch_tokens=2048, keep_activations=1, optimizer_device=place)
    optimizer = dpo.AdamW(model, options)
    pairs = [replace(pair, reference=(1.0, 1.0)) for pair in PAIRS]
    home = CUDA if place == "same" else torch.device("cpu")
    kinds = 2 + (dtype != torch.float32)
    held = [x.untyped_storage()._cdata for x in optimizer.state.values() if not x.is_cuda]
    assert fake.pinned == len(set(held)) and bool(held) == (place == "cpu")
    dpo.train_step(model, pairs, optimizer, 1)
    for name, p in model.named_parameters():
        assert is_at(p, p.shape, dtype) and p.grad is None
        for kind in ("mean", "square", "weight"):
            at = CUDA if kind == "weight" and kinds == 2 else home  # float32 weights are their own
            assert is_at(optimizer.state[f"{kind}.{name}"], p.shape, torch.float32, at)


@both_dtypes
def test_decoding(fake, monkeypatch, dtype):
    """Prefill, cache, steps of rows that end at different times, drawing up to its one wait."""
    model = fill_model(TINY, dtype)
    decoder = sample.Decoder(model, 3, 40)
    assert is_at(decoder.cache.k, (2, 3, 2, 40, 16), dtype)
    held, logits = decoder.prefill([[5, 6, 7], [8]])
    assert is_at(held[0], (2, 2, 2, 3, 16), dtype) and is_at(held[1], (2, 2, 2, 1, 16), dtype)
    assert is_at(logits, (2, 500), torch.float32)
    decoder.cache.write(1, *held[0])
    assert is_at(decoder.step([1, 2], [3, 4]), (2, 500), torch.float32)
    # A draw waits for the probabilities drawn, for what the likelier tokens weigh, and for the
    # ids. Of ones for numbers, so small a nucleus has none.
    waits = fake.waits
    uniforms = torch.zeros(2, 2, dtype=torch.float64, device=CUDA)
    assert sample.draw(logits, uniforms, 0.8, 1e-5) == [1, 1]
    assert fake.waits == waits + 3
    complete = torch.no_grad()(sample.complete.__wrapped__)  # inference mode hides the fake device
    monkeypatch.setattr(sample, "complete", complete)
    completions = sample.generate(model, [[5, 6], [7, 8, 9]], 2, 6, stop_ids=[9], decoder=decoder)
    assert [c.ids for own in completions for c in own] == [[1] * 6] * 4


# CUDA graphs


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph: the operators of a capture, run again at each replay.

    As in the real one, a replay reads and writes the very tensors of the capture, whatever Python
    would make of them now, and the capture itself computes nothing that could be used: what it
    wrote is NaN until the first replay.
    """

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, tensors_in(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)


def tensors_in(result):
    results = result if isinstance(result, (tuple, list)) else [result]
    return [x for x in results if isinstance(x, torch.Tensor)]


class Capture(TorchDispatchMode):
    """In place of torch.cuda.graph."""

    def __init__(self, graph, pool, stream):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, tensors_in(result)))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for *_, outputs in self.graph.calls[-1:]:
            outputs[0].fill_(math.nan)  # the logits


class Replaying(sample.Decoder):
    """A decoder on the CPU that steps as on a GPU. `sizes` gets the rows of each step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sizes = []

    def step(self, tokens, positions):
        self.sizes.append(len(tokens))
        return self.replay(torch.tensor([tokens, positions]))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that a test makes, on the CPU."""
    made = []

    def graph():
        made.append(RecordedGraph())
        return made[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    return made


def complete_in_waves(decoder, temperature):
    """Completions of 12 requests by name: four more come when all rows but two have ended."""
    law = (sample.Options(max_new_tokens=25, temperature=temperature), range(0, 264, 40))
    left = []
    for i in range(12):
        prompt, streams = [7 * i + 1] * (1 + 5 * i % 9), [(3, "completion", i, j) for j in (0, 1)]
        left.append([sample.Completion(prompt=prompt, stream=stream) for stream in streams])
    groups, left, found = deque(left[:4]), left[4:], {}
    for completion in sample.complete(decoder, groups, *law):
        found[completion.stream] = completion.ids
        if len(found) % 8 == 6:
            groups += left[:4]
            left = left[4:]
    assert len(found) == 24
    return found


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("slots", [5, 8])
def test_decoding_through_graphs_gives_the_ids_of_the_plain_path(tiny, graphs, slots, temperature):
    """Rows that come and go, in graphs of the next power of two, or of all slots."""
    model = lm.load_model(tiny)
    plain = complete_in_waves(sample.Decoder(model, slots, 80), temperature)
    decoder = Replaying(model, slots, 80)
    assert complete_in_waves(decoder, temperature) == plain
    rounded = {1 << (n - 1).bit_length() for n in decoder.sizes}
    assert len(graphs) == len({min(rows, slots) for rows in rounded}), "one graph for each size"
    assert sum(graph.replays for graph in graphs) == len(decoder.sizes) > 40
    changes = {b - a for a, b in pairwise(decoder.sizes)}
    assert min(changes) < 0 < max(changes) and len(graphs) > 2


def test_a_step_through_graphs_leaves_the_other_slots_alone(tiny, graphs):
    """Three rows in a graph of four: the fourth writes where no active row reads."""
    model = lm.load_model(tiny)
    prompts = [[5, 6, 7], [8], [9, 10]]
    decoders = [sample.Decoder(model, 5, 20), Replaying(model, 5, 20)]
    with torch.inference_mode():
        for decoder in decoders:
            for slot, held in enumerate(decoder.prefill(prompts)[0]):
                decoder.cache.write(slot, *held)
        for i in range(4):
            call = [i + 1, i + 2, i + 3], [3 + i, 1 + i, 2 + i]
            one, two = (decoder.step(*call).clone() for decoder in decoders)
            assert one.shape == two.shape == (3, 264)
            assert (one - two).abs().max() < 1e-5 * one.abs().max()
        for slot, prompt in enumerate(prompts):
            seen = len(prompt) + 4
            for cache in ("k", "v"):
                one, two = (
                    getattr(decoder.cache, cache)[:, slot, :, :seen] for decoder in decoders
                )
                assert (one - two).abs().max() < 1e-5 * one.abs().max()
    assert len(graphs) == 1


@both_dtypes
def test_judging(fake, dtype):
    """ArmoRM on a packed row: the head, which is float32, gets float32."""
    raw = {"num_objectives": 5, "gating_hidden_dim": 8, "gating_n_hidden": 2}
    raw["gating_temperature"] = 10

    def make():
        return judge.ArmoRM(config_of(TINY), raw)

    model = fill(make, torch.float32)
    model.model = fill(make, dtype).model
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: [1, 2],
        apply_chat_template=lambda messages, add_generation_prompt: [
            7, 1, 2, *range(len(messages[1]["content"]))
        ],
    )  # fmt: skip
    pointwise = judge.Pointwise(model, tokenizer)
    assert pointwise.score("an instruction", ["one", "another", "one"]) == [1.0] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_kernel_may_give_another_memory_order(monkeypatch, packed):
    """Some attention kernels write (B, T, H, head_dim) and return it transposed."""
    attention = F.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        return attention(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    model = lm.LanguageModel(config_of(TINY)).eval()
    pieces = [([5, 6, 7], None), ([8, 9], 0), ([4], 0)]

    def compute():
        with torch.no_grad():
            if packed:
                return model.model(*lm.pack(pieces))
            decoder = sample.Decoder(model, 2, 9)
            for slot, held in enumerate(decoder.prefill([[5, 6, 7], [8]])[0]):
                decoder.cache.write(slot, *held)
            return decoder.step([1, 2], [3, 1])

    use_dense_masks(monkeypatch)
    expected = compute()
    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert torch.equal(compute(), expected)


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    lm.check_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("config", "dtype", "expected"),
    [
        (LLAMA_8B, torch.bfloat16, "cpu"),
        (LLAMA_1B, torch.bfloat16, "same"),
        (LLAMA_1B, torch.float32, "same"),
        (LLAMA_8B, torch.float32, "cpu"),
    ],
)
def test_where_the_optimizer_goes(fake, monkeypatch, config, dtype, expected):
    """By weights, gradient sums and state: 2 + 4 + 12 bytes a parameter in bf16, on 80 GiB."""
    card = SimpleNamespace(total_memory=80 * lm.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert dpo.place_optimizer(fill_model(config, dtype)) == expected


def test_a_step_of_llama_3_8b_fits_80_gib(fake):
    """The most bytes alive on the device in a step on two outputs of 2,048 tokens."""
    at = [step_of(LLAMA_8B | {"num_hidden_layers": layers}) for layers in (2, 4)]
    count, host, sums, peak = (b + (b - a) * (32 - 4) // (4 - 2) for a, b in zip(*at, strict=True))
    assert count == pytest.approx(8.03e9, rel=1e-3)
    assert host == 12 * count <= 92 * lm.GIB
    assert 6 * count <= sums <= 6 * count + lm.GIB  # weights and gradient sums
    assert sums < peak <= 76 * lm.GIB


@pytest.mark.parametrize(
    ("config", "gib"),
    [(LLAMA_8B, 99), (LLAMA_3B, 51), (QWEN_7B, 162)],  # 89.7, 35.9 and 85.1 by the numbers alone
)
def test_page_locked_memory_is_rounded_up_to_at_most_twice(fake, config, gib):
    optimizer = dpo.AdamW(fill_model(config), dpo.Options(optimizer_device="cpu"))
    exact, rounded = buffer_bytes(optimizer.state.values())
    assert exact == 12 * sum(p.numel() for p in optimizer.parameters.values())
    assert rounded < 2 * exact
    assert round(rounded / lm.GIB) == gib


def step_of(config):
    """(parameters, bytes of the host's state, on the device after the backward, at most)."""
    model = fill_model(config)
    options = dpo.Options(micro_batch_tokens=1, keep_activations=1, optimizer_device="cpu")
    optimizer = dpo.AdamW(model, options)
    with DeviceBytes() as device:
        for p in model.parameters():
            device.count(p)
        before = device.alive
        pair = dpo.Pair("pair", [1] * 200, [1] * 2048, [1] * 2048, (1.0, 1.0))
        dpo.add_gradient(model, [pair], options)
        sums = device.alive
        optimizer.step(1e-6, 1.0)
    # What autograd leaves for Python's collector is not the step's.
    assert device.alive <= before + lm.GIB
    host = sum(x.nbytes for x in optimizer.state.values())
    return before // 2, host, sums, device.peak


class DeviceBytes(TensorBytes):
    """Of the tensors on the device alone."""

    def count(self, tensor):
        if tensor.is_cuda:
            super().count(tensor)


def test_the_named_gpu_becomes_the_current_one(monkeypatch):
    """Streams and graphs are made on the current device, which would be the first GPU."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [str(lm.check_device(name)) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    assert chosen == ["cuda:1"]
