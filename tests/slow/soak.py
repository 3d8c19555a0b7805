"""Train for hours under random kills and faults, and compare with an undisturbed run: `make soak`.

Each disturbed run is short. It is killed at a moment drawn uniformly over the length of the undisturbed run, including
imports and compilation. Runs take turns at the faults of FAULTS. The same command resumes a run until it is done. Its
final state, its rows except for times, and its checkpoints must equal those of the undisturbed run.

A longer run is watched from outside for growing memory and open files. With --gcs the disturbed runs lie on an emulated
object store.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from etils import epath

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
TIMING = ("images_per_s", "step_s", "data_wait", "mfu", "goodput")
SHAPES = (
    "shapes --data.shapes-size 32 32 --data.shapes-count 64 --model.width 0.03 --model.encoder vgg11 "
    "--model.fc-features 8 --model.fc6-kernel 1 --train.batch-size 8 --train.log-every 3"
).split()
FAULTS = ("none", "workers", "torn checkpoint", "two kills", "signal first")


def command(run, steps, every, workers=0):
    """Return the command line of a run of some steps with a validation every so many."""
    sizes = f"--train.steps {steps} --train.eval-every {every * 8 / 64} --data.workers {workers}"
    cache = ["--data.cache-dir", str(run.parent / "cache")]
    return [sys.executable, str(ROOT / "train.py"), *SHAPES, *sizes.split(), *cache, "--run", str(run)]


def start(arguments, log):
    """Start a run, its output going to a file."""
    return subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def end(run):
    """Return the result of a run: rows without times, and saved steps with their scores and checksums."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    saved = [run / "checkpoints" / str(step) for step in steps]
    checksums = [json.loads((path / "progress" / "metadata").read_text())["checksums"] for path in saved]
    scores = [json.loads((path / "metrics" / "metrics").read_text()) for path in saved]
    left = (run / "interrupted").exists()
    return {"rows": rows, "steps": steps, "checksums": checksums, "scores": scores, "left": left}


def files_in(folder):
    """Return all files in a folder and its subfolders, on a disk or an object store."""
    return [file for path in folder.iterdir() for file in (files_in(path) if path.is_dir() else [path])]


def tear(run):
    """Truncate the largest file of the newest checkpoint, if there is an older one to fall back to."""
    steps = sorted((path for path in (run / "checkpoints").glob("*") if path.name.isdigit()), key=lambda p: int(p.name))
    if len(steps) > 1:
        contents = {path: path.read_bytes() for path in files_in(steps[-1])}
        largest = max(contents, key=lambda path: len(contents[path]))
        largest.write_bytes(contents[largest][: len(contents[largest]) // 2])


def disturb(run, fault, seconds, draw, log):
    """Run to completion through a kill and the fault; return the number of starts and the exit code."""
    workers = 2 if fault == "workers" else 0
    arguments = command(run, 30, 5, workers)
    signals = {"two kills": [signal.SIGKILL] * 2, "signal first": [signal.SIGTERM, signal.SIGKILL]}
    starts = 0
    for number in signals.get(fault, [signal.SIGKILL]):
        process = start(arguments, log)
        starts += 1
        try:
            process.wait(draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        process.wait(120)
        if fault == "torn checkpoint" and (run / "checkpoints").is_dir():
            tear(run)
    code = start(arguments, log).wait(300)
    return starts + 1, code


def kills(count, folder, seed, logs):
    """Disturb `count` runs; return whether all gave the expected result."""
    draw = random.Random(seed)
    with open(logs / "kills.log", "w") as log:
        for _ in range(2):  # the first compiles; the second takes as long as the runs that follow
            if (folder / "undisturbed").exists():
                (folder / "undisturbed").rmtree()
            began = time.monotonic()
            assert start(command(folder / "undisturbed", 30, 5), log).wait(600) == 0, f"see {log.name}"
            seconds = time.monotonic() - began
        expected = end(folder / "undisturbed")
        print(f"undisturbed: {seconds:.1f} s, {len(expected['rows'])} rows", flush=True)
        same = 0
        for number in range(count):
            fault, run = FAULTS[number % len(FAULTS)], folder / f"run{number}"
            starts, code = disturb(run, fault, seconds, draw, log)
            found = end(run) if code == 0 else None
            same += found == expected
            what = "same" if found == expected else f"DIFFERENT, exit code {code}, kept in {run}"
            print(f"{number + 1}/{count} {fault}: {starts} starts, {what}", flush=True)
            if found == expected:
                run.rmtree()
    print(f"kills: {same} of {count} runs ended bit-identical", flush=True)
    return same == count


def size(pid):
    """Return the resident megabytes and open files of a process and its children."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    pages = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *children))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def growth(steps, validations, folder):
    """Watch a longer run; return whether memory and open files stay level over its last three quarters."""
    run, seen = folder / "long", []
    with open(folder / "long.log", "w") as log:
        process = start(command(run, steps, steps // validations), log)
        while process.poll() is None:
            time.sleep(0.2)
            rows = run / "metrics.jsonl"
            done = rows.read_text().count('"kind": "val"') if rows.exists() else 0
            with contextlib.suppress(OSError):  # the process has just exited
                seen.append((done, *size(process.pid)))

    def least(first, last):
        """Return the minimum megabytes and open files between two validations; saves open some for a while."""
        between = [(megabytes, files) for done, megabytes, files in seen if first <= done < last]
        return [min(values) for values in zip(*between, strict=True)]

    quarter = validations // 4
    early, late = least(quarter, 2 * quarter), least(3 * quarter, validations)
    if process.returncode or not early or not late:
        print(f"the longer run did not finish, see {log.name}")
        return False
    level = late[0] < 1.05 * early[0] and late[1] <= early[1] + 2
    print(
        f"growth over {steps} steps and {validations} validations: second quarter {early[0]:.0f} MB and {early[1]} "
        f"open files, last quarter {late[0]:.0f} MB and {late[1]}: {'level' if level else 'GROWS'}",
        flush=True,
    )
    return level


def main():
    """Run all parts; the exit code is 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the watched run; 0 skips it")
    parser.add_argument("--validations", type=int, default=20)
    parser.add_argument("--cases", type=int, default=100_000, help="number of damaged inputs; 0 skips them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gcs", action="store_true", help="only kill runs, on an emulated object store")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fcn_jax_soak_"))
    if given.gcs:
        import fsspec
        import gcs

        fsspec.config.conf["gcs"] = {"use_listings_cache": False}  # other processes write these objects
        store, environment = gcs.start()
        os.environ.update(environment)
        try:
            same = kills(given.kills, epath.Path(f"gs://{gcs.BUCKET}/soak"), given.seed, folder)
        finally:
            store.kill()
        return 0 if same else 1
    good = True
    if given.kills:
        good &= kills(given.kills, epath.Path(folder), given.seed, folder)
    if given.steps:
        good &= growth(given.steps, given.validations, folder)
    if given.cases:
        fuzz = [sys.executable, str(ROOT / "tests" / "fuzzing.py"), "--cases", str(given.cases)]
        good &= subprocess.run([*fuzz, "--seed", str(given.seed)], cwd=ROOT).returncode == 0
    print(f"logs in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
