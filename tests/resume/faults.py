"""One run of train.py stopped again and again, and resumed: it ends with the same bytes.

    python tests/resume/faults.py kill                # at every change of the run's folder
    python tests/resume/faults.py full                # the disk is full from every change on
    python tests/resume/faults.py moment --kills 200  # at random moments
    python tests/resume/faults.py kill --every 30     # at each 30th change: seconds, not minutes

kill: SIGKILL before each file opened to be written, renamed or removed, each folder made or
removed, and each group of rows made safe; so also between writing and renaming, and just after.
full: from that change on the disk is full, and has room again for the next start. The folder is
then a small tmpfs where one can be mounted; elsewhere the system's limit on the size of a file
refuses the bytes.

The next start goes on up to the next change that no start came to before. At every stop what
stands under a final name is whole. Each start is a fork of this process, which has imported torch
once; the world is a policy and a judge of random weights.
"""

import argparse
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import train  # noqa: E402

import conftest  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tokenizers import Regex, decoders  # noqa: E402

TMPFS = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=16m none "$0" && exec "$@"')
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")

# The world


def make_world(folder):
    """A policy and a judge of random weights, instructions, and a recipe. Returns the folder.

    The policy's tokenizer writes "<R>" for digits, so about half of what it draws can be cut;
    without-marker/ is the same policy with another tokenizer, which writes it for nothing.
    """
    reward = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    room = {"max_position_embeddings": 512}  # the thought prompt has 240 bytes
    stops = {"eos_token_id": list(range(0, 260, 8))}  # random weights would rarely stop
    for seed, (name, change) in enumerate({"policy": {}, "judge": reward}.items()):
        conftest.write_checkpoint(folder / name, conftest.LLAMA | room | change, seed=seed)
        conftest.write_tokenizer(folder / name, eos="<|eot_id|>")
        (folder / name / "generation_config.json").write_text(json.dumps(stops))
    shutil.copytree(folder / "policy", folder / "without-marker")
    tokenizer = conftest.byte_tokenizer()
    marker = decoders.Replace(Regex("[ -?]"), "<R>")
    bell = decoders.Replace(Regex("[^ -~]"), "\a")  # which should not reach a terminal
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), marker, bell])
    tokenizer.save(str(folder / "policy" / "tokenizer.json"))
    for name, count in (("train", 40), ("validation", 6)):
        rows = [
            {
                "instruction": f"{name} {'x' * (i % 7)} {i}",
                "answer": str(i),
                "category": "ab"[i % 2],
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": "policy",
        "judge": "judge",
        "instructions": "train.jsonl",
        "validation": "validation.jsonl",
        "iterations": 2,
        "prompts_per_iteration": 10,
        "num_samples": 4,
        "max_new_tokens": 24,
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-3,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


# A run's folder


def contents(folder):
    """What a run promises to make again: the bytes of its files, the log's rows but for times."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    rows = [json.loads(line) for line in files.pop("log.jsonl", b"").splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
    return files | {"log": rows}


def check_whole(folder, expected):
    """What stands under a final name now is what stands there in the end, or can be read."""
    for name, data in contents(folder).items():
        if name == "log" or ".partial" in name:
            continue
        assert data == expected.get(name, data), f"{name} is not what it is in the end"
        if name.endswith(".safetensors"):
            safe_open(folder / name, framework="pt")
        elif name.endswith((".json", ".jsonl")):
            text = data.decode()
            rows = text.splitlines() if name.endswith(".jsonl") else [text]
            assert data.endswith(b"\n") or "tokenizer" in name or "config" in name, name
            assert [json.loads(row) for row in rows], name


# Faults


def fill(ballast):
    """From here on no byte can be written: a real full disk, or a limit that acts as one."""
    if ballast:
        room = os.statvfs(ballast.parent)
        with open(ballast, "ab") as file:
            if room.f_bavail:
                os.posix_fallocate(file.fileno(), file.tell(), room.f_bavail * room.f_frsize)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))


def watch(folder, seen, record, every, act):
    """Calls act() before each change to the folder from the `every`th one not in `seen` on."""
    log, real_fsync, count = folder / "log.jsonl", os.fsync, 0

    def change(name, path):
        nonlocal count
        rows = log.read_bytes().count(b"\n") if log.exists() else 0
        key = f"{name} {path} {rows}"
        if key not in seen and count < every:
            seen.add(key)
            os.write(record, f"{key}\n".encode())
            count += 1
        if count == every:
            act()

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        inside = str(path).startswith(str(folder))
        by_rmtree = not os.path.isabs(str(path))  # a name within a folder that it has open
        if not isinstance(path, int) and (inside or by_rmtree):
            change(event, path)

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if re.search(r"\.[0-9a-f]{8}\.partial$", path):
            change("fsync", f"{path} {os.path.getsize(path)}")
        real_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def start(folder, recipe, prepare=None, patience=None):
    """One start in a fork: its exit status, -9 when killed, and the lines of its errors.

    prepare() is called in the fork; after `patience` seconds it is killed.
    """
    errors, stderr = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout, sys.stderr = open(os.devnull, "w"), os.fdopen(stderr, "w")  # noqa: SIM115
        sys.argv = ["train.py", "--output", str(folder), "--recipe", str(recipe)]
        gc.freeze()  # what the parent holds is not looked through again and again
        status = 1
        try:
            if prepare:
                prepare()
            train.run_main(train.main, resumes=True)
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(status)
    os.close(stderr)
    timer = threading.Timer(patience or 600, os.kill, (child, signal.SIGKILL))
    timer.start()
    with open(errors) as errors:
        lines = errors.read().replace("\r", "\n").strip().splitlines()
    timer.cancel()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def run_through(world, folder):
    """One run that nothing stops: its contents, and how many seconds it took."""
    began = time.monotonic()
    status, errors = start(folder, world / "recipe.json")
    assert status == 0, errors
    return contents(folder), time.monotonic() - began


def stop_and_resume(fault, world, output, unstopped, every=1, kills=6, ballast=None):
    """Stops a run of `world` until it comes through; returns how often, and of how many changes.

    output: an empty folder. unstopped: what run_through gave. every: of "kill" and "full"; kills:
    of "moment". ballast: the file that fills the disk.
    """
    folder, recipe = output / "run", world / "recipe.json"
    expected, length = unstopped
    seen, record, stops, moments = set(), os.memfd_create("changes"), 0, random.Random(0)

    def prepare():
        if fault != "moment":
            act = partial(fill, ballast) if fault == "full" else partial(os.kill, os.getpid(), 9)
            watch(folder, seen, record, every, act)

    while True:
        by_clock = fault == "moment" and stops < kills
        status, errors = start(folder, recipe, prepare, by_clock and moments.uniform(0, length))
        seen |= set(os.pread(record, 2**24, 0).decode().splitlines())
        if status == 0:
            found = contents(folder)
            assert sorted(found) == sorted(expected)
            assert [name for name in found if found[name] != expected[name]] == []
            if not by_clock:
                return stops, len(seen)
            shutil.rmtree(folder)  # it was through before its moment came
            continue
        stops += 1
        if folder.exists():
            check_whole(folder, expected)
        if fault == "full":
            check_refused(status, errors, folder, ballast)
        else:
            assert status == -signal.SIGKILL, errors


def check_refused(status, errors, folder, ballast):
    """A full disk ended the run in one line that names a file of it; makes room again."""
    assert status == 2, errors
    assert not any("Traceback" in line for line in errors), errors
    own = [line for line in errors if line.startswith("train.py: error: ")]
    reason = "No space left on device" if ballast else "File too large"
    assert own == errors[-1:] and str(folder) in own[0] and reason in own[0], errors
    if ballast:
        ballast.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Stops a run again and again, and resumes it.")
    add = parser.add_argument
    add("fault", choices=("kill", "full", "moment"), help="how it is stopped")
    add("--every", type=int, default=1, help="kill, full: at each such change (default 1)")
    add("--kills", type=int, default=50, help="moment: how many at least (default 50)")
    add("--disk", type=Path, help=argparse.SUPPRESS)  # a small file system, already mounted
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if args.fault == "full" and not args.disk:
            mount = [*TMPFS, scratch]
            if subprocess.run([*mount, "true"], capture_output=True).returncode == 0:
                command = [sys.executable, *sys.argv, "--disk", scratch]
                sys.exit(subprocess.run([*mount, *command]).returncode)
        world, output = make_world(Path(scratch) / "world"), args.disk or Path(scratch)
        ballast = args.disk and args.disk / "ballast"
        unstopped, how = run_through(world, output / "expected"), (args.every, args.kills, ballast)
        stops, changes = stop_and_resume(args.fault, world, output, unstopped, *how)
    by = {"full": " by a full tmpfs" if args.disk else " by a limit on the size of files"}
    found = f"{stops} stops{by.get(args.fault, '')}" + (f", {changes} changes" if changes else "")
    print(f"{args.fault}: {found}, the same bytes in the end; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
