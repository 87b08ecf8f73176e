"""Reads damaged and forged files, one after another, as a user's process would: run by
test_hostile_files.py in a process of its own, since what it looks for is a process that dies.

    python tests/support/mutated.py FOLDER FIRST_SEED COUNT KIND ...

A line a case on standard output before it is read: a process that died names its last one. It ends
with exit code 1 where something else than one clear line came, took over 30 s, or touched what it
must not.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path

MEMORY_GIB, SECONDS = 12, 30.0
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find")
SNIPPETS = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\0", b"\xff", b"\n", b"-1", b"1e999", b"null",
    b"18446744073709551615", b"../../canary/secret", b"/dev/zero", b"[" * 3000, b'{"a":' * 3000,
    b"F64", b"[0,99999999999]", b"\\ud800", b"true",
)  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few bits, cuts, repeats and snippets; the begin and the end, where headers lie, most."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        span = min(len(changed), rng.choice((64, 1000, len(changed) + 1))) or 1
        at = (
            rng.randrange(span)
            if rng.random() < 0.7
            else max(0, len(changed) - 1 - rng.randrange(span))
        )
        match rng.randrange(6):
            case 0 if changed:
                changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.choice(SNIPPETS)
            case 2:
                del changed[at : at + rng.choice((1, 4, 100))]
            case 3:
                changed[at : at + 8] = struct.pack(
                    "<Q", rng.choice((0, 1, 255, 2**31, 2**63, 2**64 - 1))
                )
            case 4:
                changed[at : at + 1] = rng.choice(SNIPPETS)
            case 5:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
    return bytes(changed)


def spoil(folder: Path, rng: random.Random) -> str:
    """Change a file of a folder, or put something else in its place; says what was done."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    content, kind = path.read_bytes(), rng.randrange(12)
    outside = folder.parent / "canary" / "secret"
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.symlink_to(rng.choice((outside, Path("/dev/zero"), folder, Path("nowhere"))))
    elif kind == 2:
        path.unlink()
        os.mkfifo(path)
    elif kind == 3:
        path.unlink()
        path.mkdir()
    elif kind == 4:
        path.write_bytes(gzip.compress(content))
    elif kind == 5 and path.suffix == ".json":
        path.write_text(json.dumps(forged(json.loads(content), rng)))
    elif kind == 6 and len(files) > 1:
        path.write_bytes(rng.choice(files).read_bytes())
    else:
        path.write_bytes(mutate(content, rng))
    return f"{path.relative_to(folder)} {kind}"


def forged(value, rng: random.Random):
    """The same JSON with one value, somewhere, in another's place."""
    odd = (
        None, True, -1, 0, 2**40, 10**30, 1.5, float("nan"), "", "../../canary/secret", "/dev/zero",
        [], {}, [[]], {"a": {}}, "x" * 5000, "a\nb", "kdjax.evil",
    )  # fmt: skip
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        return {**value, key: forged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], forged(value[at], rng), *value[at + 1 :]]
    return rng.choice(odd)


def read_model(folder: Path) -> None:
    from kdjax import models

    models.identity(folder)
    models.load(folder)


def read_tokenizer(folder: Path) -> None:
    from kdjax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.decode(
        tokenizer.encode_prompt("12+3= né \ud83d\ude00".encode(errors="ignore").decode())
    )


def read_data(folder: Path) -> None:
    from kdjax.data.sources.load import load_path

    names = sorted(p for p in folder.iterdir())
    loaded = load_path(names[0] if len(names) == 1 else folder)
    loaded.problem(loaded.size - 1)


def read_rollouts(folder: Path) -> None:
    import numpy as np

    from kdjax.storage import trajectories

    settings = trajectories.read_settings(folder)
    trajectories.require_complete(folder, settings)
    trajectories.identity(folder)
    trajectories.reader(folder, settings)(np.arange(min(settings["rows"], 10)))


def reseal(folder: Path) -> None:
    """Sums that fit what was forged."""
    from kdjax.storage.trajectories import SUMS, _digest

    for chunk in folder.glob("chunk-*"):
        if chunk.is_dir() and (chunk / SUMS).is_file() and not (chunk / SUMS).is_symlink():
            names = [p for p in chunk.iterdir() if p.name != SUMS and p.is_file()]
            own = {p.name: _digest(p) for p in names if not p.is_symlink()}
            (chunk / SUMS).write_text(json.dumps(own))


READERS = {
    "model": read_model, "tokenizer": read_tokenizer, "rollouts": read_rollouts,
    "resealed": read_rollouts,
}  # fmt: skip
"""By the name of the folder of good files; every other is data."""


def main(root: Path, first: int, count: int, kinds: list[str]) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30,) * 2)
    from kdjax.errors import KdjaxError

    work, canary = root / "work", root / "canary"
    for kind in kinds:  # good ones are read, and whatever is loaded lazily is loaded
        READERS.get(kind, read_data)(root / "good" / kind)
    seen: list[str] = []
    watch(canary, seen)
    before = listing(canary)
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + count):
        for kind in kinds:
            rng = random.Random(f"{kind} {seed}")
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(root / "good" / kind, work)
            what = spoil(work, rng)
            if kind == "resealed":
                reseal(work)
            print(f"{kind} {seed}: {what}", flush=True)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # the process dies of it
            began, outcome = time.monotonic(), "read"
            try:
                READERS.get(kind, read_data)(work)
            except KdjaxError as error:
                outcome = "refused"
                if not str(error).isprintable() or len(str(error)) > 2100:
                    outcome = f"NOT ONE LINE {error!r}"
            except BaseException as error:
                outcome = f"RAISED {type(error).__name__}: {str(error)[:200]!r}"
            signal.setitimer(signal.ITIMER_REAL, 0)
            if seen or listing(canary) != before:
                outcome = f"TOUCHED {seen} {listing(canary) - before}"
                seen.clear()
            outcomes[outcome.split()[0]] += 1
            if outcome not in ("read", "refused"):
                print(f"!!! {outcome} ({time.monotonic() - began:.1f} s)", flush=True)
    print(
        json.dumps(
            {**outcomes, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
        )
    )
    return int({*outcomes} - {"read", "refused"} != set())


def watch(canary: Path, seen: list[str]) -> None:
    """Notes what Python opens in the canary's folder, and whatever runs or calls something."""
    own = str(Path("kdjax", "data", "chat", "program.py"))

    def hook(event: str, args: tuple) -> None:
        if event == "open" and str(canary) in str(args[0]) and "listing" not in str(args[0]):
            seen.append(f"open {args[0]}")
        if event == "subprocess.Popen" and own not in str(args[1]):
            seen.append(f"run {args[1]}")
        if event.startswith(FORBIDDEN):
            seen.append(f"{event} {args}")

    sys.addaudithook(hook)


def listing(canary: Path) -> set[tuple[str, int, int]]:
    return {(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in canary.rglob("*")}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
