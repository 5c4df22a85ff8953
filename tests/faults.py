"""One run of train.py stopped at every change that it makes to its folder, and gone on with.

python tests/faults.py kill EXPECTED OUTPUT EVERY --recipe recipe.json

kill: SIGKILL before each file opened to be written, renamed or removed, each folder made or
removed, and each group of rows made safe; so also between writing and renaming, and just after.
full: the disk is full from that change on, and has room again for the next start. OUTPUT is then
a small tmpfs where one can be mounted, and elsewhere the system's limit on the size of a file
refuses the bytes.

Then the same command goes on, up to the next change that no start came to before, or the EVERYth
such change. In the end OUTPUT/run has the bytes of EXPECTED, the folder of a run that nothing
stopped. Every start is a fork of this process, which has imported torch once.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
TMPFS = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=16m none "$0" && exec "$@"')
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def contents(folder):
    """What a run promises to make again: the bytes of its files, the log's rows but for times."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }
    rows = [json.loads(line) for line in files.pop("log.jsonl", b"").splitlines()]
    times = ("seconds", "tokens_per_second")
    return files | {"log": [{k: v for k, v in row.items() if k not in times} for row in rows]}


def check_whole(folder, expected):
    """What stands under a final name now is what stands there in the end, or can be read."""
    for name, data in contents(folder).items():
        if name == "log" or ".partial" in name or name.endswith(".groups"):
            continue
        assert data == expected.get(name, data), f"{name} is not what it is in the end"
        if name.endswith(".safetensors"):
            safe_open(folder / name, framework="pt")
        elif name.endswith((".json", ".jsonl")):
            text = data.decode()
            rows = text.splitlines() if name.endswith(".jsonl") else [text]
            assert data.endswith(b"\n") or "tokenizer" in name or "config" in name, name
            assert [json.loads(row) for row in rows], name


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
        if path.endswith(".groups"):
            change("fsync", f"{path} {os.path.getsize(path)}")
        real_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def start(fault, folder, arguments, seen, every, ballast):
    """One start in a fork: its exit status, -9 when killed, and the lines of its errors."""
    import train

    (errors, stderr), (keys, record) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(stderr, 2)
        kill = fault == "kill"
        act = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if kill else (lambda: fill(ballast))
        sys.argv = ["train.py", "--output", str(folder), *arguments]
        watch(folder, seen, record, every, act)
        try:
            train.run_main(train.main)
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(stderr)
    os.close(record)
    with open(errors) as errors, open(keys) as keys:
        lines = errors.read().replace("\r", "\n").strip().splitlines()
        seen |= set(keys.read().splitlines())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def run(fault, expected, output, every, *arguments):
    expected, folder = contents(Path(expected)), Path(output) / "run"
    ballast = Path(output) / "ballast" if os.path.ismount(output) else None
    seen, stops = set(), 0
    while True:
        status, errors = start(fault, folder, arguments, seen, int(every), ballast)
        if status == 0:
            break
        stops += 1
        if folder.exists():
            check_whole(folder, expected)
        if fault == "kill":
            assert status == -signal.SIGKILL, errors
        else:
            assert status == 2, errors
            assert not any("Traceback" in line for line in errors), errors
            own = [line for line in errors if line.startswith("train.py: error: ")]
            reason = "free, expected", "No space left on device" if ballast else "File too large"
            assert own == errors[-1:] and str(folder) in own[0], errors
            assert any(words in own[0] for words in reason), errors
            if ballast:
                ballast.unlink(missing_ok=True)
    found = contents(folder)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    disk = "a full tmpfs" if ballast else "a limit on the size of files"
    print(f"{fault}: {stops} stops at {len(seen)} changes" + (fault == "full") * f" by {disk}")


def main(fault, expected, output, *rest):
    Path(output).mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    own = [sys.executable, __file__, fault, expected, output, *rest]
    if fault == "full" and "TPO_INSIDE" not in os.environ:
        trial = subprocess.run([*TMPFS, output, "true"], capture_output=True)
        if trial.returncode == 0:
            os.execvpe(TMPFS[0], [*TMPFS, output, *own], environment | {"TPO_INSIDE": "1"})
    sys.path.insert(0, str(ROOT))
    run(fault, expected, output, *rest)
    shutil.rmtree(Path(output) / "run")


if __name__ == "__main__":
    main(*sys.argv[1:])
