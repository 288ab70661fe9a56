#!/usr/bin/env python3
"""What the training engine promises, tried on a GPU with tiny recipes:

    resume      100 steps are 50, a kill (SIGKILL), and the rest, bit for bit: models, checkpoints, log
    agreement   the first 50 losses are those of the processor, to 1 %
    recorded    models after 50 steps are equal bit for bit with steps recorded as CUDA graphs, and without
    stall       steps a second with a checkpoint every second, and without

    cargo build --release --features cuda
    cargo run --example tiny_models -- target/tiny      networks and data for the task `tav`
    FULGUR=target/release/fulgur MODELS=target/tiny scripts/engine-gpu.py
    DEVICE=cpu FULGUR=... MODELS=... scripts/engine-gpu.py      the same without a GPU; then `agreement` shows little

Writes engine-gpu.json (or the file named by RESULT); the exit code is 1 where anything fails. Takes less than 100 s.
"""
import concurrent.futures
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = os.environ.get("FULGUR", str(ROOT / "target/release/fulgur"))
MODELS = pathlib.Path(os.environ.get("MODELS", str(ROOT / "target/tiny"))).resolve()
DEVICE = os.environ.get("DEVICE", "cuda")
RESULT = pathlib.Path(os.environ.get("RESULT", "engine-gpu.json"))

STEPS = 100
KILLED_AFTER = 50
# A kill comes too late where the run is faster than this program looks.
ATTEMPTS = 5
COMPARED = 50
MOST_APART = 0.01
PATIENCE_S = 90
# A model whose checkpoint takes a while, and one for the processor.
LARGE = {"layers": 8, "width": 768, "hidden": 2048, "heads": 12}
SMALL = {"layers": 2, "width": 128, "hidden": 256, "heads": 2}
STALL_S = 10 if DEVICE != "cpu" else 3

# In the middle of an epoch and of a log interval when it is killed, with gradients of two batches a step.
TRAIN = {
    "max_steps": STEPS,
    "log_every": 7,
    "accumulate": 2,
    "validate_every": 40,
    "sample_every": 0,
    "checkpoint_seconds": 0.02,
    "ema": 0.98,
}


class Failure(Exception):
    """A promise that does not hold."""


def toml(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, pathlib.Path) else value)


def write_recipe(path, tables):
    """`tables` by name; the one without a name comes first."""
    lines = []
    for name, values in tables.items():
        lines += [f"[{name}]"] if name else []
        lines += [f"{key} = {toml(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def text(folder):
    """Words in a random order, the same each time."""
    path = folder / "text.txt"
    draw = random.Random(7)
    words = "a bell rings as the rain falls and someone far away plays the violin while dogs bark".split()
    path.write_text(" ".join(draw.choice(words) for _ in range(8000)))
    return path


def lm(folder, architecture, shape, batch=8):
    tokens = text(folder)
    own = {"tokens": tokens, "batch": batch, "context": 64, "validation": 8, "held_out": 0.05}
    return {"": {"task": "lm", "seed": 3}, "lm": own, "lm.model": {"architecture": architecture, **shape}}


def tav(_):
    parts, stream = MODELS / "builtin", {"channels": 4, "dim": 24, "heads": 2, "head_dim": 6, "hidden": 24}
    own = {
        "batch": 4,
        "pool": 30,
        "validation": 4,
        "sample_steps": 2,
        "video_codec": parts / "video_codec",
        "mel_codec": parts / "mel_codec",
        "text_encoder": parts / "text_encoder",
    }
    model = {"depth": 2, "text_every": 2, "fusion": [1], "fusion_heads": 2, "text_dim": 16, "contrast_dim": 8}
    return {
        "": {"task": "tav", "seed": 3},
        "tav": own,
        "tav.clips": {"data": MODELS / "data"},
        "tav.model": model,
        "tav.model.video": stream,
        "tav.model.audio": stream,
    }


TASKS = {
    "lm-tnl": lambda folder: lm(folder, "tnl", SMALL),
    "lm-llama": lambda folder: lm(folder, "llama", SMALL),
    "tav": tav,
}

# Architectures whose steps are compared, recorded and launched.
RECORDED = ["tnl", "hgrn2", "cosformer2", "lightnet", "llama"]


def recipe(folder, name, **train):
    tables = TASKS[name](folder)
    head = {**tables.pop(""), "run_dir": folder / "run"}
    muon = {"muon": ["blocks."]} if name == "tav" else {}
    shared = {
        "": head,
        "train": {**TRAIN, **train},
        "optimiser": {"lr": 1e-3, **muon},
        "schedule": {"warmup": 10},
    }
    return write_recipe(folder / "recipe.toml", {**shared, **tables})


def command(path, *more, device=DEVICE):
    return [PROGRAM, "train", str(path), "--device", device, "--json", *more]


def train(path, *more, device=DEVICE, codes=(0,), environment=(), says=None):
    """The answer of a run that ends by itself, and that says so on standard error."""
    arguments = command(path, *more, device=device)
    around = {**os.environ, **dict(environment)}
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, env=around)
    if says is not None and says not in done.stderr:
        raise Failure(f"{' '.join(arguments)}: did not say {says!r}")
    if done.returncode not in codes:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise Failure(f"{' '.join(arguments)}: exit code {done.returncode}: {last}")
    return json.loads(done.stdout)


def checkpoints(run):
    names = (path.name for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(name[5:]) for name in names if not name.endswith(".tmp"))


def hashes(run):
    """Of the model and of what the newest checkpoint holds."""
    newest = run / "checkpoints" / f"step-{checkpoints(run)[-1]:010}"
    files = [path for path in (run / "model").rglob("*") if path.is_file()]
    files += newest.glob("*.safetensors")
    found = {}
    for path in sorted(files):
        where = path.relative_to(run).as_posix()
        found[where] = hashlib.sha256(path.read_bytes()).hexdigest()
    state = json.loads((newest / "state.json").read_text())
    # Time differs, and so does the folder of the run, which the recipe names.
    found["state"] = {key: value for key, value in state.items() if key not in ("elapsed_s", "recipe")}
    return found


def log(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("elapsed_s", "mfu")
    return [{key: v for key, v in line.items() if key not in timed and not key.endswith("_per_s")} for line in lines]


def kill_in_the_middle(folder, name):
    """Starts a run and kills it; the step of its last checkpoint, none where it was too fast."""
    path = recipe(folder, name)
    run = folder / "run"
    with open(folder / "said", "w") as said:
        running = subprocess.Popen(command(path), stdout=said, stderr=said)
    limit = time.monotonic() + PATIENCE_S
    while running.poll() is None and not any(step >= KILLED_AFTER for step in checkpoints(run)):
        if time.monotonic() > limit:
            running.kill()
            raise Failure(f"{name}: no checkpoint of step {KILLED_AFTER} after {PATIENCE_S} s")
        time.sleep(0.001)
    running.kill()
    code = running.wait()
    if code not in (0, -signal.SIGKILL):
        said = (folder / "said").read_text().strip().splitlines() or ["nothing was said"]
        raise Failure(f"{name}: exit code {code}: {said[-1]}")
    kept = checkpoints(run)[-1]
    return kept if code != 0 and kept < STEPS else None


def resume(work, name):
    straight = work / f"{name}-straight"
    straight.mkdir()
    train(recipe(straight, name))
    for attempt in range(ATTEMPTS):
        broken = work / f"{name}-broken-{attempt}"
        broken.mkdir()
        kept = kill_in_the_middle(broken, name)
        if kept is not None:
            break
    else:
        raise Failure(f"{name}: the run was over before it could be killed, {ATTEMPTS} times")
    train(broken / "recipe.toml", "--resume")
    one, other = hashes(straight / "run"), hashes(broken / "run")
    if one["state"]["step"] != STEPS:
        raise Failure(f"{name}: found step {one['state']['step']}, expected {STEPS}")
    differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if log(straight / "run") != log(broken / "run"):
        differing.append("metrics.jsonl")
    if differing:
        raise Failure(f"{name}: killed after step {kept}, and then another {', '.join(differing)}")
    return {"killed_after": kept, "files": one}


def losses(work, name, device):
    folder = work / f"{name}-{device.replace(':', '-')}-losses"
    folder.mkdir()
    more = {"max_steps": COMPARED, "log_every": 1, "validate_every": 0, "checkpoint_seconds": 1e6, "accumulate": 1}
    train(recipe(folder, name, **more), device=device)
    found = [line["loss"] for line in log(folder / "run") if "loss" in line]
    if len(found) != COMPARED:
        raise Failure(f"{name} on {device}: {len(found)} losses, expected {COMPARED}")
    return found


def agreement(name, found, expected):
    apart = [abs(a - b) / abs(b) for a, b in zip(found, expected)]
    most = max(apart)
    if not most <= MOST_APART:
        step = apart.index(most) + 1
        raise Failure(f"{name}: step {step} is {100 * most:.2f} % apart, expected at most {100 * MOST_APART:g} %")
    return {"largest_difference": most, "first_loss": found[0], "last_loss": found[-1]}


def recorded(work, architecture):
    found = []
    for label, choice, says in [("launched", "0", "steps are not recorded"), ("recorded", "1", "steps are recorded")]:
        folder = work / f"{architecture}-{label}"
        folder.mkdir()
        tables = lm(folder, architecture, SMALL)
        head = {**tables.pop(""), "run_dir": folder / "run"}
        plain = {**TRAIN, "max_steps": COMPARED, "accumulate": 1}
        path = write_recipe(folder / "recipe.toml", {"": head, "train": plain, **tables})
        train(path, environment={"FULGUR_GRAPHS": choice, "FULGUR_LOG": "debug"}, says=None if DEVICE == "cpu" else says)
        found.append((hashes(folder / "run"), log(folder / "run")))
    if found[0] != found[1]:
        raise Failure(f"{architecture}: recorded steps make another model or another log than launched ones")
    return {"files": found[0][0]}


def speed(work, label, seconds_between):
    """Steps a second by the clock on the wall, and the part of it for which training stood still."""
    folder = work / f"stall-{label}"
    folder.mkdir()
    shape, batch = (SMALL, 8) if DEVICE == "cpu" else (LARGE, 32)
    tables = lm(folder, "tnl", shape, batch)
    train_table = {**TRAIN, "max_steps": 10**9, "validate_every": 0, "accumulate": 1, "log_every": 50}
    train_table["checkpoint_seconds"] = seconds_between
    head = {**tables.pop(""), "run_dir": folder / "run"}
    path = write_recipe(folder / "recipe.toml", {"": head, "train": train_table, **tables})
    answer = train(path, "--pause-after", str(STALL_S), codes=(1,))
    newest = folder / "run/checkpoints" / f"step-{checkpoints(folder / 'run')[-1]:010}"
    size = sum(file.stat().st_size for file in newest.iterdir())
    trained = json.loads((newest / "state.json").read_text())["elapsed_s"]
    return {"steps_per_s": answer["step"] / STALL_S, "trained_s": trained, "checkpoint_bytes": size}


def stall(work):
    found = {"seconds": STALL_S, "without": speed(work, "without", 1e6), "every_second": speed(work, "every", 1.0)}
    found["slower_by"] = 1 - found["every_second"]["steps_per_s"] / found["without"]["steps_per_s"]
    return found


def gpu():
    if DEVICE == "cpu":
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[0]


def main():
    began = time.monotonic()
    if not (MODELS / "builtin").is_dir():
        sys.exit(f"engine-gpu: {MODELS}: no tiny models; make them by `cargo run --example tiny_models -- DIR`")
    result = {"device": DEVICE, "gpu": gpu(), "resume": {}, "agreement": {}, "recorded": {}, "stall": None, "failures": []}

    def take(into, name, work):
        try:
            into[name] = work()
            print(f"engine-gpu: {name}: {json.dumps({k: v for k, v in into[name].items() if k != 'files'})}", flush=True)
        except (Failure, subprocess.TimeoutExpired, OSError, ValueError, IndexError, KeyError) as error:
            result["failures"].append(f"{name}: {error}")
            print(f"engine-gpu: FAIL {name}: {error}", flush=True)

    with tempfile.TemporaryDirectory() as work, concurrent.futures.ThreadPoolExecutor(9) as pool:
        work = pathlib.Path(work)
        resumed = {name: pool.submit(resume, work, name) for name in TASKS}
        (work / "there").mkdir()
        (work / "here").mkdir()
        there = {name: pool.submit(losses, work / "there", name, DEVICE) for name in TASKS}
        here = {name: pool.submit(losses, work / "here", name, "cpu") for name in TASKS}
        for name in TASKS:
            take(result["resume"], name, resumed[name].result)
            take(result["agreement"], name, lambda: agreement(name, there[name].result(), here[name].result()))
        (work / "recorded").mkdir()
        same = {name: pool.submit(recorded, work / "recorded", name) for name in RECORDED}
        for name in RECORDED:
            take(result["recorded"], name, same[name].result)
        # Alone on the machine.
        take(result, "stall", lambda: stall(work))
    result["seconds"] = round(time.monotonic() - began, 1)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"engine-gpu: {len(result['failures'])} failures, {result['seconds']} s; {RESULT}")
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
