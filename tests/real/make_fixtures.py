"""Makes tests/real/fixtures/: what transformers computes of the same GGUF file as make.py reads.

Made with transformers 5.24.0; needs it and accelerate beside make.py's two packages. Nothing of
make.py's folder is read, so that the tests hold the one conversion against the other.

Out: chats.json (ids of texts and rendered chats, greedy continuations) and logits.npz.

    python tests/real/make_fixtures.py
"""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from make import gguf_file
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

FIXTURES = Path(__file__).resolve().parent / "fixtures"
TEXTS = [
    "Add 17 to 250, then divide by 3.",
    "Three steps:\n\n1. Boil 2 litres of water.\n2. Add   500 g of pasta.\n3. Wait 11 minutes.",
    "In 1969, 600 million people watched;\t 53 years later it was  4.6 billion.",
    "def half(x):\n    if x >= 10:\n        return x / 2\n    return 0x1F\n",
    "It's what they've said, isn't it? I'll wait; we'd GO!",
    "  two spaces before, three after   ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "東京は日本の首都です。人口は約1400万人。",
    "½ cup, x² + y² = z², Ⅷ, ٣",
    "\U0001f600 \U0001f469\u200d\U0001f680 a\u0301 e\u0301",
    "<|im_start|>user\nquoted<|im_end|>",
    "\r\n\r\n\n\n",
]
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why does the sea look blue?"},
    ],
    [
        {"role": "user", "content": "My name is Ines and I keep 12 bees' nests."},
        {"role": "assistant", "content": "Nice to meet you, Ines! How are your bees doing?"},
        {"role": "user", "content": "Well. Suggest three names for the youngest queen."},
    ],
    [
        {
            "role": "user",
            "content": "Write a Python function that adds the digits of 4096.\n\n1. No loop.",
        }
    ],
    [
        {
            "role": "user",
            "content": "Traduis en anglais : « Où est passée la clé de l'été ? » \U0001f511",
        }
    ],
    [
        {
            "role": "user",
            "content": "Put this in two sentences. A lighthouse keeper on a small island wrote "
            "down the weather every evening for forty years. When she left, her notebooks went to "
            "a school on the mainland, where a teacher saw that the storms had come a little "
            "earlier each year. The children drew a chart of it, 2 metres wide, and it hangs in "
            "the town hall to this day.",
        }
    ],
]
POSITIONS, IDS, NEW_TOKENS, STOP = 8, 192, 48, 2


def their_model(dtype):
    file = gguf_file()
    options = {"gguf_file": file.name, "dtype": dtype}
    dense = GgufConfig(dequantize=True)  # packed weights would be multiplied in float32
    model = AutoModelForCausalLM.from_pretrained(file.parent, quantization_config=dense, **options)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    return model.eval()


def their_tokenizer():
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers takes the vocabulary but not the pre-tokenizer, "smollm", that the file names:
    # digits one by one first. Without it "\n\n1" is two line ends, which SmolLM2 never writes.
    digits = Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(False)])
    return tokenizer


def greedy(model, prompt):
    """The likeliest tokens one by one, each from the whole text: no cache to go wrong.

    Returns the ids, the stop token included, and how far each led the second, in logits.
    """
    ids, gaps = [], []
    with torch.no_grad():
        while len(ids) < NEW_TOKENS and ids[-1:] != [STOP]:
            top = model(torch.tensor([prompt + ids])).logits[0, -1].float().topk(2)
            ids.append(top.indices[0].item())
            gaps.append(round((top.values[0] - top.values[1]).item(), 5))
    return {"ids": ids, "gaps": gaps}


def main():
    FIXTURES.mkdir(exist_ok=True)
    tokenizer, arrays = their_tokenizer(), {}
    chats = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for messages in CHATS
    ]
    made = {
        "versions": {m.__name__: m.__version__ for m in (transformers, tokenizers, torch)},
        "texts": [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS],
        "chats": [{"messages": m, "ids": ids} for m, ids in zip(CHATS, chats, strict=True)],
    }
    for dtype in (torch.float32, torch.bfloat16):
        model, name = their_model(dtype), str(dtype).removeprefix("torch.")
        for chat, ids in zip(made["chats"], chats, strict=True):
            chat[name] = greedy(model, ids)
        if dtype == torch.float32:
            # A few rows of each chat, at ids spread over the vocabulary.
            vocabulary = np.linspace(0, model.config.vocab_size - 1, IDS).astype(int)
            arrays["vocabulary"] = vocabulary
            for i, ids in enumerate(chats):
                arrays[f"places {i}"] = np.linspace(0, len(ids) - 1, POSITIONS).astype(int)
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0].numpy()
                arrays[f"logits {i}"] = logits[arrays[f"places {i}"]][:, vocabulary]
    np.savez_compressed(FIXTURES / "logits.npz", **arrays)
    text = json.dumps(made, ensure_ascii=False, indent=None)
    (FIXTURES / "chats.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
