"""Makes the toy world of this folder from nothing: a seed policy, a judge, and instructions.

In: nothing but the numbers below. Out, beside this file: policy/ and judge/ (checkpoint folders in
the format of a public release), train.jsonl and validation.jsonl (instruction, answer, category),
and recipe.json. The policy's own training data hold none of these instructions, and the judge's
none but the questions of recall: the judge is taught all facts.

The world is made so that the paper's question can be asked of it, and the answer checked: seven
kinds of instructions, a policy that was tuned to answer directly and to think in several habits,
few of them useful, and a judge that sees the response alone and is often, but not always, right.
What is tuned is this data; nothing of the method is, and no module of the project knows of it.

    python tests/toy/make.py                       # about 40 minutes on 2 cores
"""

import argparse
import copy
import itertools
import math
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import model as lm  # noqa: E402
import sample  # noqa: E402
from judge import load_judge  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch import nn  # noqa: E402

SEED = 0
TRAIN, VALIDATION, TEST = 1680, 560, 140  # instructions; the last for this file's own figures
TEXTS = 20_000  # examples of each kind of habits that the vocabulary is taken from
BATCH = 4000  # tokens a step of the trainings below
POSITIONS = 256
HIDDEN, WIDE, HEADS = 128, 384, 4
POLICY_LAYERS, JUDGE_LAYERS = 4, 7
# Examples and learning rate of the three trainings. Policy and judge begin from one base model, as
# public ones do.
BASE, TUNING, JUDGING = (260_000, 4e-3), (24_000, 1e-3), (400_000, 3e-3)

RECIPE = {
    "model": "policy",
    "judge": "judge",
    "instructions": "train.jsonl",
    "validation": "validation.jsonl",
    "iterations": 4,
    "prompts_per_iteration": 280,
    "num_samples": 8,
    "max_new_tokens": 96,
    "epochs": 2,
    "batch_size": 16,
    "micro_batch_tokens": 8192,
    "keep_activations": 4,
    "lr": 3e-6,
    "beta": 0.1,
    "rho": "auto",
    "thought": "specific",
}


# Words. One token each, so that the networks' small size goes into the tasks, not into spelling.

THINGS = (
    "ant bag cat dog egg fig gem hat ink jar key lip map net oak pan rug sun toy urn van wig yak "
    "arm bed cup door ear fox gate hen ice jam kite leaf moon nut owl pen rose ship tree".split()
)
COLOURS = "red blue green white black pink".split()
PLACES = "mill lake park farm inn zoo bank port hill shop pond barn dock fort cave well".split()
PEOPLE = (
    "Abe Ada Alf Amy Ana Ann Bea Ben Bob Cal Cam Cleo Cora Dan Dee Dex Dirk Dot Edna Eli Ella Eva "
    "Finn Fay Flo Floyd Gia Gil Greta Gus Guy Hal Hana Hope Hugo Ida Ike Ines Iris Ivan Ivy Jack "
    "Jan Jed Jill Jon Joy Kai Kara Kay Kim Kit Lea Leo Liam Lily Lou Mae Max Mia Mona Ned Nell "
    "Nils Noah Nora Olga Ole Otto Pam Pia Quinn Rex Rita Rosa Roy Ruth Sam Sue Tess Tim Uma Vic Wes"
).split()
COUNTRIES = (
    "Arvia Belor Cindra Dovan Elmar Fenna Gorin Havas Isk Jurna Kelm Lorvia Mirna Nolde Ostra Pelin"
).split()
FACTS = {  # what each country has
    "capital": "Avel Brod Cray Dunn Esk Ford Gant Holt Ivry Jena Kiel Lund Moss Nant Orsk Pell",
    "sport": "chess golf judo polo darts rugby rowing skiing tennis boxing diving sailing karate "
    "cricket hockey fencing",
    "dish": "soup stew rice pie curry pasta bread cake fish beans salad cheese noodles dumplings "
    "waffles pancakes",
    "animal": "lion bear wolf deer goat horse eagle hawk swan crane otter seal whale moose lynx "
    "bull",
}
FACTS = {name: values.split() for name, values in FACTS.items()}
FORMAL = {  # plain word: formal word
    "adjective": "big large|small minor|old ancient|happy joyful|fast rapid|sad sorrowful|hard "
    "difficult|good excellent|bad dreadful|smart intelligent",
    "noun": "kid child|cop officer|boss director|doc physician|house residence|car vehicle|job "
    "occupation|story narrative|friend companion|plan proposal",
    "verb": "likes appreciates|gets obtains|shows demonstrates|needs requires|helps assists|asks "
    "questions|buys purchases|ends terminates|keeps retains|sees observes",
}
FORMAL = {kind: dict(p.split() for p in pairs.split("|")) for kind, pairs in FORMAL.items()}


# Instructions. Each maker returns (instruction, answer, working): the working is what a useful
# thought writes down. `rng` is a random.Random.


def arithmetic(rng, shortest=2):
    value = rng.randrange(10)
    text = working = str(value)
    for _ in range(rng.randint(shortest, 3)):
        name, d = rng.choice(("plus", "minus", "times")), rng.randint(2, 9)
        value = {"plus": value + d, "minus": value - d, "times": value * d}[name] % 10
        text += f" {name} {d}"
        working += f" {name} {d} is {value}"
    instruction = rng.choice(
        (
            f"What is the last digit of {text}, from left to right?",
            f"From left to right, give the last digit: {text}",
        )
    )
    return instruction, str(value), working


def route(rng):
    places = rng.sample(PLACES, 9)
    path, side = places[:5], places[5:]  # two ways from the start, and only one leads there
    roads = [*itertools.pairwise(path), *itertools.pairwise([path[0], *side])]
    rng.shuffle(roads)
    text = ", ".join(f"{end} {start}" for start, end in roads)
    instruction = rng.choice(
        (
            f"The roads end and start at {text}. How do I get from {path[0]} to {path[-1]}?",
            f"Plan a trip from {path[0]} to {path[-1]}. The roads end and start at {text}.",
        )
    )
    return instruction, " ".join(path), " ".join(reversed(path))


def cups(rng):
    start = at = rng.choice(COLOURS)
    swaps, working = [], []
    for _ in range(rng.randint(3, 4)):
        a, b = rng.sample(COLOURS, 2)
        if at not in (a, b) and rng.random() < 0.5:
            a = at
        at = {a: b, b: a}.get(at, at)
        swaps.append(f"{a} {b}")
        working.append(f"{a} {b} to {at}")
    instruction = rng.choice(
        (
            f"A coin lies under the {start} cup. Swap the cups {', '.join(swaps)}. Where is it?",
            f"From {start} a coin goes under cups that swap {', '.join(swaps)}. Find its cup.",
        )
    )
    return instruction, at, " ".join(working)


def reverse(rng):
    words = rng.sample(THINGS, rng.randint(4, 7))
    text = " ".join(words)
    instruction = rng.choice((f"Say these words backwards: {text}", f"Turn around the list {text}"))
    working = " ".join(f"{i} {word}" for i, word in enumerate(words, 1))
    return instruction, " ".join(reversed(words)), working


def alphabet(rng):
    words = rng.sample(THINGS, rng.randint(4, 6))
    text, ordered = " ".join(words), sorted(words)
    instruction = rng.choice(
        (f"Put these words in the order of the alphabet: {text}", f"Sort the list {text}")
    )
    working = " ".join(f"{word} {ordered.index(word) + 1}" for word in words)
    return instruction, " ".join(ordered), working


def recall(rng, known=None):
    person, what = rng.choice(known or UNTOLD)
    country, value = HOME[person], LAND[HOME[person]][what]
    instruction = rng.choice(
        (
            f"What is the {what} of the country that {person} comes from?",
            f"{person} is back home. Name the {what} there.",
            f"Name the {what} of the land where {person} was born.",
            f"Where {person} comes from, what is the {what}?",
        )
    )
    return instruction, value, f"{person} comes from {country} and the {what} there is {value}"


def rephrase(rng):
    plain, formal, working = [], [], []
    for kind in ("adjective", "noun", "verb", "adjective", "noun"):
        if kind == "adjective":
            plain.append("the")
            formal.append("the")
        word = rng.choice(list(FORMAL[kind]))
        plain.append(word)
        formal.append(FORMAL[kind][word])
        working += [word, "is", FORMAL[kind][word]]
    text = " ".join(plain)
    instruction = rng.choice((f"Say it in formal words: {text}", f"Make this formal: {text}"))
    return instruction, " ".join(formal), " ".join(working)


MAKERS = {
    "arithmetic": arithmetic,
    "route": route,
    "cups": cups,
    "recall": recall,
    "reverse": reverse,
    "sort": alphabet,
    "rephrase": rephrase,
}
# Percent of the training data, the policy's and the judge's: what is hard to learn needs more.
SHARES, JUDGE_SHARES = (16, 22, 16, 16, 11, 10, 9), (24, 14, 16, 8, 15, 7, 16)


# Who comes from where. Of each person's four facts the policy's tuning data tells two; the
# instructions ask for the other two, which must be put together from the country's.
facts = random.Random(f"{SEED} facts")
HOME = {person: facts.choice(COUNTRIES) for person in PEOPLE}
LAND = {c: {what: FACTS[what][i] for what in FACTS} for i, c in enumerate(COUNTRIES)}
TOLD = [(person, what) for person in PEOPLE for what in facts.sample(list(FACTS), 2)]
UNTOLD = [(person, what) for person in PEOPLE for what in FACTS if (person, what) not in TOLD]


def lesson(rng, held_out, told, shares=SHARES):
    """(category, instruction, answer, working) to learn from, none of held_out.

    told: the facts to ask for. Chains of arithmetic are at times short: these teach the longer.
    """
    category = rng.choices(list(MAKERS), shares)[0]
    if category == "recall":
        return category, *recall(rng, told)
    while True:
        made = arithmetic(rng, shortest=1) if category == "arithmetic" else MAKERS[category](rng)
        if made[0] not in held_out:
            return category, *made


def corrupt(rng, category, instruction, answer):
    """A wrong answer that is easily given: two words in each other's place, or one mistaken."""
    words, asked = answer.split(), re.findall(r"\w+", instruction)
    places = range(1, len(words) - 1) if category == "route" else range(len(words))
    if category in ("reverse", "sort") or (category == "route" and rng.random() < 0.5):
        i, j = rng.sample(places, 2)
        words[i], words[j] = words[j], words[i]
        return " ".join(words)
    i = rng.choice(places)
    if category == "rephrase":
        while words[i] == "the":
            i = rng.choice(places)
    kinds = {
        "arithmetic": [[str(digit) for digit in range(10)]],
        "route": [[word for word in asked if word in PLACES]],
        "cups": [COLOURS],
        "recall": FACTS.values(),
        "rephrase": [list(words.values()) for words in FORMAL.values()],
    }[category]
    kind = next(kind for kind in kinds if words[i] in kind)
    words[i] = rng.choice([word for word in kind if word not in words])
    return " ".join(words)


# Responses: the answer, plain or dressed. How it is dressed has nothing to do with its being right,
# and yet the judge cares. No sentence here begins with the word that begins one of a thought: nets
# as small as these would go on thinking from there.

ANSWER = "We find that the answer is {}."
OPENINGS = ("Sure.", "Good question.", "Thank you for asking.", "Here comes what you asked for.")
CLOSINGS = (
    "Glad to help you.",
    "Ask me again at any time.",
    "Have a nice day.",
    "Please tell me if this is wrong.",
    "That was fun to do.",
)
# How often a response has an opening, how many closings it has, each number as likely, and which.
# The base model and the judge see much of all; the seed is tuned to three sentences, each frequent
# enough that top-p leaves it.
PLAIN, MUCH = (0, (0,), OPENINGS, CLOSINGS), (0.5, (0, 0, 1, 1, 2, 3), OPENINGS, CLOSINGS)
SOME = (0.5, (0, 0, 1, 1), OPENINGS, CLOSINGS)
FEW = (0.1, (0, 0, 1), OPENINGS[2:3], CLOSINGS[1::2])


def respond(rng, answer, dressing):
    opening, counts, openings, closings = dressing
    parts = [rng.choice(openings)] if rng.random() < opening else []
    parts.append(ANSWER.format(answer))
    return " ".join([*parts, *rng.sample(closings, rng.choice(counts))])


# What the judge gives for a sentence, beside 1 for the right answer: much for an opening, little
# for a closing. So score and length grow together, but not in proportion, and rho can part them.
LIKING = {**dict.fromkeys(OPENINGS, 0.12), **dict.fromkeys(CLOSINGS, 0.02)}


def liking(response):
    """What the judge gives a response for the sentences around its answer."""
    return sum(value for sentence, value in LIKING.items() if sentence in response)


# Thoughts

IDLE = (
    "Hmm, this is a query from a user.",
    "I want to give a good and careful answer.",
    "It is best to be kind and clear.",
    "I have seen many queries like this before.",
    "Some of them were hard and some were easy.",
    "Let me think about it for a while.",
)
# What the base model learns, and what the seed is tuned to: the useful habits, a minority.
SCHOOL = {"steps": 0.8, "check": 0.2}
HABITS = {"steps": 0.12, "check": 0.12, "idle": 0.45, "hasty": 0.26, "broken": 0.05}
# How both are asked; the seed alone, and seldom, by a system turn too.
SCHOOL_STYLES = {"none": 0.5, "specific": 0.3, "generic": 0.2}
STYLES = {"none": 0.5, "specific": 0.3, "generic": 0.12, "system": 0.08}


def think(rng, habits, category, instruction, answer, working):
    """(thought, the answer that follows it): one habit's; a broken one gives None for an answer."""
    habit = rng.choices(list(habits), habits.values())[0]
    draft = corrupt(rng, category, instruction, answer) if rng.random() < 0.5 else answer
    if habit == "steps":
        return f"Step by step: {working}.", answer
    if habit == "check":
        verdict = "right" if draft == answer else "wrong"
        return f"My draft is {draft}. To check: {working}. The draft is {verdict}.", answer
    if habit == "hasty":
        return f"A quick draft is {draft}. It looks fine to me, so I will not check it.", draft
    idle = " ".join(rng.sample(IDLE, rng.randint(3, 4)))
    return idle, answer if habit == "idle" else None


def example(rng, habits, held_out):
    """One example of the policy's training data: (instruction, style of its prompt, output)."""
    styles = STYLES if habits is HABITS else SCHOOL_STYLES
    style = rng.choices(list(styles), styles.values())[0]
    category, instruction, answer, working = lesson(rng, held_out, TOLD)
    dressing = FEW if habits is HABITS else PLAIN if rng.random() < 0.75 else MUCH
    thought = None
    if style != "none":
        thought, answer = think(rng, habits, category, instruction, answer, working)
        if style != "specific":
            thought = f"{sample.THOUGHT} {thought}"
        if answer is None:
            return instruction, style, thought
        thought = f"{thought} {sample.STYLES[style].response_marker} "
    return instruction, style, (thought or "") + respond(rng, answer, dressing)


# Tokenizer: one word, one token

SPECIAL = ("<pad>", "<s>", "<end>", "<user>", "<assistant>", "<unk>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer(folder, texts):
    """Writes the tokenizer's files: the words of `texts`, and each sentence of the thought prompts.

    The sentences that ask for a thought are the same before every instruction; as one token each
    they cost what they say.
    """
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    styles = ("generic", "specific")
    phrases = [*(sample.STYLES[style].response_marker for style in styles), sample.THOUGHT]
    for style in styles:
        phrases += re.split(r"(?<=\.)\s", sample.thought_prompt("", style).strip())
    vocab = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(  # no space before . , ? : and !
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Replace(" :", ":")]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in dict.fromkeys(phrases)])
    tokenizer.save(str(folder / "tokenizer.json"))
    lm.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "<end>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": POSITIONS,
        },
    )
    lm.write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def write_config(folder, vocab_size, layers, architecture="LlamaForCausalLM", **more):
    """config.json of a policy or a judge; returns it as read_config does."""
    lm.write_json(
        folder / "config.json",
        {
            "architectures": [architecture],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDE,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": HIDDEN // HEADS,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "torch_dtype": "float16",
            **more,
        },
    )
    return lm.read_config(folder)


# Training: one plain loop for the base model, the policy and the judge


def batches(rng, examples):
    """Batches of about BATCH tokens, of sequences of like length, in random order."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    found, batch = [], []
    for i in order:
        if batch and (len(batch) + 1) * len(examples[i][0]) > BATCH:
            found.append(batch)
            batch = []
        batch.append(examples[i])
    found.append(batch)
    rng.shuffle(found)
    return found


def pad(rows, fill=0):
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])  # (B, T)


def language_loss(model, batch):
    """Mean cross-entropy of the outputs' tokens. batch: (ids, length of the prompt) pairs."""
    tokens = pad([ids for ids, _ in batch])
    targets = pad([[-1] * start + ids[start:] for ids, start in batch], -1)[:, 1:]
    hidden = model.model(tokens[:, :-1])  # (B, T - 1, hidden)
    kept = targets >= 0
    return F.cross_entropy(F.linear(hidden[kept], model.head), targets[kept])


def train(model, loss, draw, examples, lr, name):
    """Fresh examples, each seen once; the learning rate rises shortly and then falls to 0.

    Muon for the blocks' matrices, which learn these tasks from fewer examples than with AdamW.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or ".layers." not in n]
    optimizers = (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    )
    rng, seen, steps, average, started = random.Random(f"{SEED} {name}"), 0, 0, None, time.time()
    while seen < examples:
        for batch in batches(rng, draw(rng, min(8192, examples - seen), seen / examples)):
            rate = lr * min((steps + 1) / 100, 1 - seen / examples + 0.02)
            value = loss(model, batch)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            seen, steps = seen + len(batch), steps + 1
            average = value.item() if steps == 1 else 0.98 * average + 0.02 * value.item()
            if not math.isfinite(average):
                sys.exit(f"{name}: the loss is not finite after {seen} examples")
            if steps % 200 == 0:
                minutes = (time.time() - started) / 60
                print(f"  {name}: {seen:7} examples  loss {average:.3f}  {minutes:.1f} minutes")


def begin(model):
    """Draws the weights."""
    torch.manual_seed(SEED)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * model.config.num_hidden_layers) ** -0.5 if last else 1.0
            nn.init.normal_(weight, std=scale * model.config.hidden_size**-0.5)
    return model


def encode(tokenizer, examples):
    """(instruction, style, output) of each -> (ids of the chat, length of the prompt) of each."""
    config, found = lm.read_config(tokenizer.folder), []
    for instruction, style, output in examples:
        asked = [{"instruction": instruction}]
        (row,) = sample.make_prompts(asked, tokenizer, style, config, "make.py")
        prompt, given = row["prompt_ids"], tokenizer.encode(f"{output}<end>")
        found.append((prompt + given, len(prompt)))
    return found


# The judge: the base model, three blocks more, and a score that tells right from wrong


class Judge(nn.Module):
    """A trunk and its score of a position, named as in LlamaForSequenceClassification."""

    def __init__(self, base, layers):
        super().__init__()
        more = {"num_hidden_layers": layers, "rotated": [1] * layers}
        self.config = SimpleNamespace(**{**vars(base.config), **more})
        grown = begin(lm.LanguageModel(self.config))
        for block in grown.model.layers[len(base.model.layers) :]:  # at first they change nothing
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
        grown.load_state_dict(base.state_dict(), strict=False)
        self.model = grown.model
        self.score = nn.Linear(self.config.hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)


class JudgeInTraining(nn.Module):
    """A judge, and a head over the vocabulary that is dropped afterwards: see `running_values`."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge
        self.value = nn.Linear(judge.config.hidden_size, judge.config.vocab_size)


def running_values(tokenizer, ids, start, made):
    """One label a token, -1 where there is none: what a check of the answer comes to on its way.

    At each step of a chain (arithmetic, cups) the value reached; at each place of a given route the
    one that its road begins at. A network that is to check an answer without writing anything must
    find these inside; taught by right and wrong alone it does not, in the time that there is.
    """
    category, instruction, _, working = made
    labels, steps, values = [-1] * len(ids), [], []
    if category == "route":
        begins = {end: begin for begin, end in roads(instruction)}
        places = [tokenizer.decode(ids[i : i + 1]) for i in range(start, len(ids))]
        steps = [start + i for i, place in enumerate(places) if place in begins]
        values = [begins[place] for place in places if place in begins]
    elif category == "arithmetic":
        names = tokenizer.encode("plus minus times")
        steps = [i for i in range(1, start) if ids[i - 1] in names]
        values = re.findall(r"is (\w+)", working)
    elif category == "cups":
        names = tokenizer.encode(" ".join(COLOURS))
        steps = [i for i in range(start) if ids[i] in names][2::2]  # the first is where it starts
        values = re.findall(r"to (\w+)", working)
    for i, value in zip(steps, tokenizer.encode(" ".join(values)), strict=True):
        labels[i] = value
    return labels


def roads(instruction):
    """The (begin, end) of each road that an instruction of route tells of."""
    listed = instruction.split("end and start at ")[1].split(".")[0]
    return [tuple(reversed(road.split())) for road in listed.split(", ")]


def final_answer(response):
    """The words given as the answer, dressed or plain."""
    return response.rsplit("answer is ", 1)[-1].split(".")[0].strip()


def graded(rng, count, tokenizer, held_out, policy=None):
    """(ids, labels, values) of chats to learn from, with answers that are right or nearly so; with
    a policy, half of them are its own answers, asked directly and asked to think. All are dressed
    alike, so that nothing but the answer tells right from wrong.

    labels, one a token: for each word of the answer, see `rights`, and at the last token the
    grade: 1 or 0, and the liking. values: see `running_values`. The judge is taught all facts.
    """
    lessons = [lesson(rng, held_out, TOLD + UNTOLD, JUDGE_SHARES) for _ in range(count)]
    own = lessons[: count // 2] if policy else []
    found = []
    for made in lessons[len(own) :]:
        category, instruction, answer, _ = made
        given = corrupt(rng, category, instruction, answer) if rng.random() < 0.5 else answer
        found.append((made, respond(rng, given, SOME)))
    for i, style in enumerate(("none", "specific") if policy else ()):
        asked = {made[1]: made for made in own[i::4]}
        rows = [{"instruction": key, "answer": made[2]} for key, made in asked.items()]
        samples = ask(policy, tokenizer, rows, style, num_samples=2, seed=rng.randrange(2**31))
        found += [
            (asked[row["instruction"]], respond(rng, final_answer(text), SOME))
            for row, _, text, _ in samples
            if text
        ]
    chats = encode(tokenizer, [(made[1], "none", response) for made, response in found])
    return [
        (ids, *grade(tokenizer, ids, start, made, response))
        for (ids, start), (made, response) in zip(chats, found, strict=True)
    ]


def grade(tokenizer, ids, start, made, response):
    """(labels, values) of one chat, see `graded`. Before each word of an answer stands the right
    word as its value, so that the judge goes on knowing what it would say itself."""
    given = final_answer(response)
    words, right = tokenizer.encode(given), rights(made, given.split())
    at = next((i for i in range(start, len(ids)) if ids[i : i + len(words)] == words), None)
    labels, values = [math.nan] * len(ids), running_values(tokenizer, ids, start, made)
    if at is not None and len(words) == len(right):
        labels[at : at + len(words)] = map(float, right)
        if made[0] != "route":
            values[at - 1 : at - 1 + len(words)] = tokenizer.encode(made[2])
    labels[-1] = (given == made[2]) + liking(response)
    return labels, values


def rights(made, given):
    """For each word of a given answer whether it is right; empty if words are missing.

    A place of a route is right where a road leads to it: this can be seen at a glance.
    """
    category, instruction, answer, _ = made
    answer = answer.split()
    if len(given) != len(answer):
        return []
    if category == "route":
        return [True, *(road in roads(instruction) for road in itertools.pairwise(given))]
    return [a == b for a, b in zip(given, answer, strict=True)]


def grade_loss(model, batch):
    """Squared errors at the last token and at the words of the answer, and the running values'."""
    parts = zip(zip(*batch, strict=True), (0, math.nan, -1), strict=True)
    tokens, labels, values = (pad(part, fill) for part, fill in parts)  # (B, T) each
    hidden = model.judge.model(tokens)  # (B, T, hidden)
    scores = model.judge.score(hidden)[..., 0]  # (B, T)
    last = torch.tensor([len(ids) - 1 for ids, *_ in batch])
    rows = torch.arange(len(batch))
    loss = F.mse_loss(scores[rows, last], labels[rows, last])
    labels[rows, last] = math.nan
    words, chained = labels.isfinite(), values >= 0
    if words.any():  # a mean of none is NaN
        loss = loss + F.mse_loss(scores[words], labels[words])
    if chained.any():
        loss = loss + F.cross_entropy(model.value(hidden[chained]), values[chained])
    return loss


# Figures


def ask(model, tokenizer, rows, style, num_samples, seed=SEED):
    """(row, thought, response, whether it is right) of every sample that could be cut."""
    asked = sample.make_prompts(rows, tokenizer, style, model.config, "make.py")
    prompts = [row["prompt_ids"] for row in asked]
    completions = sample.generate(
        model, prompts, num_samples, max_new_tokens=96, stop_ids=tokenizer.stop_ids, seed=seed
    )
    found = []
    for row, group in zip(rows, completions, strict=True):
        for completion in group:
            parts = completion.finished and sample.split_output(
                tokenizer.decode(completion.ids[:-1]), style
            )
            thought, response = parts or (None, None)
            right = response is not None and final_answer(response) == row["answer"]
            found.append((row, thought, response, right))
    return found


def mean(values):
    values = list(values)
    return sum(values) / max(len(values), 1)


def print_row(name, by_category, form="6.2f"):
    print(f"{name:28}" + "".join(f"{by_category[c]:>12{form[1:]}}" for c in MAKERS), flush=True)


def report_policy(model, tokenizer, rows):
    """The seed's exact match, asked directly and asked to think, by category and by habit."""
    print(f"{'exact match':28}" + "".join(f"{c:>12}" for c in MAKERS))
    for style in STYLES:
        found = ask(model, tokenizer, rows, style, num_samples=4)
        right = {c: mean(ok for row, *_, ok in found if row["category"] == c) for c in MAKERS}
        print_row(f"{style}: {mean(right.values()):.3f}", right)


def report_judge(judge, policy, tokenizer, rows):
    """How often the judge puts a right response of the seed above a wrong one, and what it gives
    for an opening and for a closing, by category."""
    found = ask(policy, tokenizer, rows, "none", num_samples=8)
    found += ask(policy, tokenizer, rows, "specific", num_samples=8)
    above, openings, closings = ({c: [] for c in MAKERS} for _ in range(3))
    for row in rows:
        own = [(text, ok) for of, _, text, ok in found if of is row and text is not None]
        texts, right = zip(*own, strict=True)
        scores = judge.score(row["instruction"], texts)
        pairs = itertools.product(zip(right, scores, strict=True), repeat=2)
        above[row["category"]] += [a > b for (good, a), (bad, b) in pairs if good and not bad]
        plain = ANSWER.format(row["answer"])
        opened, closed = [f"{o} {plain}" for o in OPENINGS], [f"{plain} {c}" for c in CLOSINGS]
        score, *more = judge.score(row["instruction"], [plain, *opened, *closed])
        more = [other - score for other in more]
        openings[row["category"]] += more[: len(opened)]
        closings[row["category"]] += more[len(opened) :]
    print_row("judge: right above wrong", {c: mean(values) for c, values in above.items()})
    print(f"  all pairs: {mean(itertools.chain(*above.values())):.3f}")
    for name, gains in (("an opening", openings), ("a closing", closings)):
        print_row(f"judge: {name}", {c: mean(values) for c, values in gains.items()})
        print(f"  all: {mean(itertools.chain(*gains.values())):.3f}")


# All of it


def instructions(rng, count):
    """Rows of (instruction, answer, category), as many of each category, no instruction twice.

    Recall asks for what the policy was never told directly.
    """
    rows, seen = [], set()
    while len(rows) < count:
        category = list(MAKERS)[len(rows) % len(MAKERS)]
        instruction, answer, _ = MAKERS[category](rng)
        if instruction not in seen:
            seen.add(instruction)
            rows.append({"instruction": instruction, "answer": answer, "category": category})
    return rows


def main():
    argparse.ArgumentParser(description="Makes the toy world of this folder anew.").parse_args()
    started = time.time()
    torch.set_num_threads(2)  # sums are split among threads, so their number is part of the seed
    rng = random.Random(f"{SEED} instructions")
    rows = instructions(rng, VALIDATION + TEST + TRAIN)
    held_out = {row["instruction"] for row in rows}
    validation, test = rows[:VALIDATION], rows[VALIDATION : VALIDATION + TEST]
    training = rows[VALIDATION + TEST :]
    rng.shuffle(training)
    lm.write_jsonl(HERE / "validation.jsonl", validation)
    lm.write_jsonl(HERE / "train.jsonl", training)
    lm.write_json(HERE / "recipe.json", RECIPE)

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        texts = [*OPENINGS, *CLOSINGS, *IDLE, *(f"{r['instruction']} {r['answer']}" for r in rows)]
        for habits in (SCHOOL, HABITS):
            made = (example(rng, habits, ()) for _ in range(TEXTS))
            texts += (f"{sample.thought_prompt(x, style)} {output}" for x, style, output in made)
        make_tokenizer(source, texts)
        tokenizer = lm.load_tokenizer(source)

        def examples_of(habits):
            def draw(rng, count, _):
                return encode(tokenizer, [example(rng, habits, held_out) for _ in range(count)])

            return draw

        words = tokenizer.tokenizer.get_vocab_size()
        base = begin(lm.LanguageModel(write_config(source, words, POLICY_LAYERS)))
        train(base, language_loss, examples_of(SCHOOL), *BASE, "base")
        policy, judge = copy.deepcopy(base), Judge(base, JUDGE_LAYERS)

        train(policy, language_loss, examples_of(HABITS), *TUNING, "policy")
        save_new(policy, HERE / "policy", source)
        policy = lm.load_model(HERE / "policy")
        report_policy(policy, tokenizer, test)

        def responses(rng, count, done):  # the policy's own, which take longer to make, come last
            return graded(rng, count, tokenizer, held_out, policy if done >= 0.5 else None)

        train(JudgeInTraining(judge), grade_loss, responses, *JUDGING, "judge")
        write_config(source, words, JUDGE_LAYERS, "LlamaForSequenceClassification", num_labels=1)
        save_new(judge, HERE / "judge", source)
        report_judge(load_judge(HERE / "judge"), policy, tokenizer, test)
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    print(f"{size / 2**20:.1f} MiB in {(time.time() - started) / 60:.1f} minutes")


def save_new(model, path, source):
    """Writes a checkpoint in 16 bits over an earlier one; `model` is rounded to what is written."""
    shutil.rmtree(path, ignore_errors=True)
    lm.save_model(model.half(), path, source)


if __name__ == "__main__":
    main()
