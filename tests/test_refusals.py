"""Checkpoints and tokenizers that cannot be used: each is refused in one line naming the culprit.

python -m pytest tests/test_refusals.py
"""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    LLAMA,
    LLAMA_SPECIAL,
    byte_tokenizer,
    random_tensors,
    tensor_shapes,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

import model


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def refused(call, *parts):
    """Runs call(); it must end in an InputError whose message holds all parts."""
    with pytest.raises(model.InputError) as caught:
        call()
    message = " ".join(str(caught.value).split())  # as run_main prints it
    assert len(message) < 700, message
    for part in parts:
        assert part in message, message


def edit(file, **values):
    content = json.loads(file.read_text())
    content |= values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


# config.json

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "another family": ({"model_type": "gemma2"}, "model_type", "'gemma2'", "llama"),
    "no family": ({"model_type": ...}, "model_type", "None"),
    "family of another kind": ({"model_type": ["llama"]}, "model_type"),
    "not causal": ({"architectures": ["LlamaForSequenceClassification"]}, "causal"),
    "no architecture": ({"architectures": [None]}, "architectures"),
    "architectures of another kind": ({"architectures": 3}, "architectures"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type", "'yarn'"),
    "dynamic rope, older": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "newer rope": ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    "rope per layer": ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope"),
    "rope of another kind": ({"rope_scaling": "linear"}, "rope", "'linear'"),
    "no rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor", "None"),
    "rope factor text": ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor", "'4'"),
    "rope factor zero": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor", "0"),
    "rope factor not a number": ({"rope_scaling": LLAMA3 | {"factor": float("nan")}}, "factor"),
    "rope bounds": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
    "rope context": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "64"}},
        "original_max_position_embeddings",
    ),
    "negative theta": ({"rope_theta": -1.0}, "rope_theta", "-1.0"),
    "theta of another kind": ({"rope_theta": [1e4]}, "rope_theta"),
    "half-turned rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act", "'gelu'", "silu"),
    "window": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64},
        "sliding_window",
        "64",
    ),
    "window by default": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
        "sliding_window",
        "4096",
    ),
    "window in qwen2": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32},
        "sliding_window",
        "32",
    ),
    "window by layer": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types",
        "sliding_attention",
    ),
    "layer types of another kind": ({"model_type": "qwen2", "layer_types": 7}, "layer_types"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads", "3", "4"),
    "more kv heads": ({"num_key_value_heads": 8}, "num_key_value_heads", "8", "4"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size", "32", "5"),
    "odd head": ({"head_dim": 7}, "head_dim", "7", "even"),
    "no hidden size": ({"hidden_size": ...}, "hidden_size", "None"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers", "0"),
    "text for a number": ({"vocab_size": "264"}, "vocab_size", "'264'"),
    "a number and a half": ({"intermediate_size": 56.5}, "intermediate_size", "56.5"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers", "True"),
    "negative number": ({"max_position_embeddings": -1}, "max_position_embeddings", "-1"),
    "endless number": ({"rms_norm_eps": float("inf")}, "rms_norm_eps", "inf"),
    "number for a boolean": ({"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
    "absurd width": ({"hidden_size": 2**60}, "hidden_size", str(2**60)),
    "absurd depth": ({"num_hidden_layers": 10**9}, "num_hidden_layers", str(10**9)),
    "absurd vocabulary": ({"vocab_size": 2**62}, "vocab_size", str(2**62)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name, folder):
    values, *parts = CONFIGS[name]
    edit(folder / "config.json", **values)
    refused(lambda: model.load_model(folder), "config.json", *parts)


@pytest.mark.parametrize("call", [model.load_model, model.load_tokenizer])
@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "null", "{} {}", "\ufeff{}", "[" * 99999])
def test_configs_that_are_no_object(text, call, folder):
    (folder / "config.json").write_text(text)
    refused(lambda: call(folder), "config.json")


def test_config_not_utf8(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    refused(lambda: model.load_model(folder), "config.json")


# Folders


def test_folders(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for call in (model.load_model, model.load_tokenizer):
        refused(lambda call=call: call(tmp_path / "absent"), "absent", "no such folder")
        refused(lambda call=call: call("./a/b/c"), "a/b/c", "no such folder")
        refused(lambda call=call: call("file"), "file", "expected a checkpoint folder")
        refused(lambda call=call: call(""), "no such folder")
    (folder / "config.json").unlink()
    refused(lambda: model.load_model(folder), "config.json", "no such file")


def test_a_hub_id_without_a_network(tmp_path):
    """One line, and soon: a hub that cannot be reached must not hang the command."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, model.__file__, "--model", "nobody/no-such-model"]
    made = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | offline
    )
    assert made.returncode == 2
    assert len(made.stderr.splitlines()) == 1 and "nobody/no-such-model" in made.stderr


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_id_is_downloaded_or_taken_from_the_cache(answers, tiny, monkeypatch):
    import huggingface_hub

    model.hub_folder.cache_clear()

    def model_info(self, name, revision, timeout):
        if not answers:
            raise TimeoutError("no answer")
        return huggingface_hub.ModelInfo(id=name, sha="0123abc", tags=[])

    def download(name, revision, local_files_only, **patterns):
        assert (name, revision) == ("org/name-1.0", "0123abc" if answers else None)
        assert local_files_only != answers
        return str(tiny)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model.checkpoint_folder("org/name-1.0") == tiny
    model.hub_folder.cache_clear()


# Weights


def tensors(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    content = tensors(folder)
    change(content)
    save_file(content, folder / "model.safetensors")


NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
TENSORS = {
    "missing": (lambda t: t.pop(GATE), GATE, "missing"),
    "misshapen": (lambda t: t.update({GATE: t[GATE].T.contiguous()}), GATE, "[32, 56]", "[56, 32]"),
    "one dimension more": (lambda t: t.update({NORM: t[NORM][None]}), NORM, "[1, 32]", "[32]"),
    "unknown": (lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra"),
    "more layers": (
        lambda t: t.update(
            {k.replace("layers.1", "layers.2"): v.clone() for k, v in t.items() if "layers.1" in k}
        ),
        "model.layers.2",
    ),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
        "model.layers.0.self_attn.q_proj.bias",
    ),
    "not a number": (lambda t: t[GATE].view(-1)[9].fill_(float("nan")), GATE, "finite"),
    "endless": (lambda t: t[NORM][3].fill_(-float("inf")), NORM, "finite"),
    "integers": (lambda t: t.update({NORM: t[NORM].to(torch.int32)}), NORM, "int32"),
    "8 bit": (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), NORM, "float8"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name, folder):
    change, *parts = TENSORS[name]
    rewrite(folder, change)
    refused(lambda: model.load_model(folder), str(folder), *parts)


def test_values_that_the_dtype_cannot_hold(folder):
    """70,000 is a fine float32 and an infinite float16."""
    rewrite(folder, lambda t: t[GATE].view(-1)[9].fill_(7e4))
    model.load_model(folder)
    model.load_model(folder, dtype=torch.bfloat16)
    refused(lambda: model.load_model(folder, dtype=torch.float16), GATE, "float16")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_weights_cut_short(keep, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(lambda: model.load_model(folder), "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9]}}',
    ],
)
def test_headers(header, folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(lambda: model.load_model(folder), "model.safetensors", "not a whole safetensors file")


def test_a_header_longer_than_any_file(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(lambda: model.load_model(folder), "model.safetensors", "not a whole safetensors file")


def test_pickles_are_never_read(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: model.load_model(folder), "expected model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(lambda: model.load_model(folder), "pytorch_model.bin", "pickle")


def test_the_weights_are_a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(lambda: model.load_model(folder), "model.safetensors")


SHARD = "model-00002-of-00003.safetensors"
INDEXES = {
    "a lost shard": (lambda f, m: (f / SHARD).unlink(), SHARD),
    "a path above": (lambda f, m: m.update({NORM: f"../{SHARD}"}), f"../{SHARD}"),
    "an absolute path": (lambda f, m: m.update({NORM: str(f / SHARD)}), SHARD),
    "a shard of another kind": (lambda f, m: m.update({NORM: ["x"]}), "x"),
    "a shard twice": (
        lambda f, m: shutil.copy(f / SHARD, f / "b") and m.update({NORM: "b"}),
        "twice",
    ),
    "a shard cut short": (lambda f, m: (f / SHARD).write_bytes(b"1234"), SHARD),
    "nothing": (lambda f, m: m.clear(), "weight_map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes(name, tmp_path):
    change, part = INDEXES[name]
    folder = write_checkpoint(tmp_path / "model", shards=3)
    shutil.copy(folder / SHARD, tmp_path / SHARD)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(folder, content["weight_map"])
    index.write_text(json.dumps(content))
    refused(lambda: model.load_model(folder), str(folder), part)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 1}'])
def test_broken_indexes(text, tmp_path):
    folder = write_checkpoint(tmp_path / "model", shards=3)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(lambda: model.load_model(folder), "model.safetensors.index.json")


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:-7", "", "meta"])
def test_devices(device, tiny):
    refused(lambda: model.load_model(tiny, device), f"--device {device}")


# Tokenizers

BIG = byte_tokenizer(special=[*LLAMA_SPECIAL, *(f"<{i}>" for i in range(9))])
TOKENIZERS = {
    "missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json", "no such file"),
    "empty": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json"),
    "broken": (lambda f: (f / "tokenizer.json").write_text('{"model": '), "tokenizer.json"),
    "another file": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "not UTF-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff{}"), "tokenizer.json"),
    "larger than the embedding": (
        lambda f: BIG.save(str(f / "tokenizer.json")),
        "tokenizer.json",
        "264",
        "vocab_size",
    ),
    "config broken": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config"),
    "config a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config"),
    "eos not a token": (
        lambda f: edit(f / "tokenizer_config.json", eos_token="</s>"),
        "eos_token",
        "</s>",
    ),
    "stop id of another kind": (
        lambda f: edit(f / "generation_config.json", eos_token_id="2"),
        "generation_config.json",
        "eos_token_id",
    ),
    "stop id negative": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[2, -1]),
        "generation_config.json",
        "-1",
    ),
    "stop id outside": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[2, 264]),
        "264",
        "vocab_size",
    ),
    "template of another kind": (
        lambda f: edit(f / "tokenizer_config.json", chat_template=5),
        "chat_template",
    ),
    "templates of another kind": (
        lambda f: edit(f / "tokenizer_config.json", chat_template=[5]),
        "chat_template",
    ),
    "template unparsable": (
        lambda f: edit(f / "tokenizer_config.json", chat_template="{% for m in %}"),
        "chat_template",
        "does not parse",
    ),
    "template of an unknown tag": (
        lambda f: (f / "chat_template.jinja").write_text("{% include 'config.json' %}{% nope %}"),
        "chat_template",
        "does not parse",
    ),
    "template nested deep": (
        lambda f: (f / "chat_template.jinja").write_text("{{ " + "(" * 9999 + ")" * 9999 + "}}"),
        "chat_template",
        "does not parse",
    ),
    "template not UTF-8": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        "chat_template",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(name, folder):
    change, *parts = TOKENIZERS[name]
    change(folder)
    refused(lambda: model.load_tokenizer(folder), *parts)


ROLES = "{% if messages[0].role != 'user' %}{{ raise_exception('users\\nonly') }}{% endif %}"
SUBCLASSES = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
TEMPLATES = {
    "none": (None, "chat_template"),
    "the roles": (ROLES, "chat_template", "users only"),
    "a name that is not there": ("{{ messages[0].nothing.more }}", "chat_template"),
    "an error": ("{{ 1 / 0 }}", "chat_template", "division"),
    "classes": (SUBCLASSES, "chat_template"),
    "globals": ("{{ raise_exception.__globals__['os'].system('id') }}", "chat_template"),
    "globals of jinja": ("{{ cycler.__init__.__globals__.os.environ }}", "chat_template"),
    "attributes by filter": ("{{ (strftime_now|attr('__globals__'))['sys'] }}", "chat_template"),
    "format strings": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "chat_template"),
    "lists doubled": (
        "{% set n = namespace(l=[0]) %}{% for a in range(40) %}{% set n.l = n.l + n.l %}"
        "{% endfor %}{{ n.l|length }}",
        "chat_template",
        "MiB",
    ),
    "squared by replacing": (
        "{% set n = namespace(s='xxxxxxxxxx') %}{% for a in range(9) %}"
        "{% set n.s = n.s|replace('x', n.s) %}{% endfor %}{{ n.s|length }}",
        "chat_template",
        "MiB",
    ),
    "doubled by formatting": (
        "{% set n = namespace(s='x') %}{% for a in range(40) %}{% set n.s = '%s%s' % (n.s, n.s) %}"
        "{% endfor %}{{ n.s|length }}",
        "chat_template",
        "MiB",
    ),
    "a nested list as text": (
        "{% set n = namespace(l=['xxxxxxxxxxxxxxxx']) %}{% for a in range(30) %}"
        "{% set n.l = [n.l, n.l] %}{% endfor %}{{ (n.l|string)|length }}",
        "chat_template",
    ),
    "a growing list": (
        "{% set n = namespace(l=[]) %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% set n.l = n.l + ['x'|center(999999)] %}{% endfor %}{% endfor %}",
        "chat_template",
    ),
    "changed messages": ("{{ messages.append(1) }}", "chat_template"),
    "a file": ("{% include 'config.json' %}", "chat_template"),
    "an endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "chat_template",
        "still running",
    ),
    "endless writing": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 999 }}{% endfor %}"
        "{% endfor %}",
        "chat_template",
    ),
    "doubling": (
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}"
        "{% endfor %}{{ n.s }}",
        "chat_template",
    ),
    "doubling by ~": (
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}{{ n.s }}",
        "chat_template",
    ),
    "doubling by join": (
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = [n.s, n.s]|join %}"
        "{% endfor %}{{ n.s }}",
        "chat_template",
    ),
    "a wide text": ("{{ 'x'|center(10**13) }}", "chat_template"),
    "a wide text that fits": ("{{ 'x'|center(3000000000)|length }}", "chat_template"),
    "a wide format": ("{{ '%9999999999999d' % 1 }}", "chat_template"),
    "a wide format call": ("{{ '{:>9999999999999}'.format(1) }}", "chat_template"),
    "a long product": ("{{ 'x' * 10**12 }}", "chat_template"),
    "a list's product": ("{{ [0] * 10**12 }}", "chat_template"),
    "a tall power": ("{{ 9 ** 9 ** 9 }}", "chat_template"),
    "deep recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "chat_template"),
    "a list in itself": (
        "{% set n = namespace(l=[]) %}{% for a in range(9999) %}{% set n.l = [n.l, n.l] %}"
        "{% endfor %}{{ n.l }}",
        "chat_template",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name, folder, monkeypatch):
    """In time and memory, too: whatever a stranger's template tries, it ends soon and small."""
    template, *parts = TEMPLATES[name]
    edit(folder / "tokenizer_config.json", chat_template=... if template is None else template)
    monkeypatch.setattr(model, "TEMPLATE_SECONDS", 0.2)
    began, limits = time.thread_time(), resource.getrlimit(resource.RLIMIT_AS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def use():
        chat = [{"role": "system", "content": "x"}]
        model.load_tokenizer(folder).apply_chat_template(chat)

    refused(use, *parts)
    assert time.thread_time() - began < 5
    if sys.platform == "linux":
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 200 * 2**10, f"{grown} KiB"
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


# Saving


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_no_link_is_followed_out_of_the_folder(name, folder, tmp_path):
    ours = model.load_model(folder)
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    refused(lambda: model.save_model(ours, tmp_path / "saved", folder), name, "secret")
    assert not (tmp_path / "saved").exists()


def test_links_within_the_hubs_cache_are_followed(folder, tmp_path):
    """The hub's client keeps each file once, under blobs/, and links to it from snapshots/."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    model.load_tokenizer(snapshot)
    model.save_model(model.load_model(snapshot), tmp_path / "saved", snapshot)
    assert not any(file.is_symlink() for file in (tmp_path / "saved").iterdir())


def test_the_weights_link_out_of_the_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(lambda: model.load_model(folder), "model.safetensors", "elsewhere")


def test_the_whole_table_starts_from_a_good_checkpoint(folder):
    """Each refusal above has one cause: without it the same folder loads."""
    model.load_model(folder)
    model.load_tokenizer(folder).apply_chat_template([{"role": "system", "content": "x"}])
    assert tensors(folder).keys() == random_tensors(tensor_shapes(LLAMA)).keys()
