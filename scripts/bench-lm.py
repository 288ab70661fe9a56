#!/usr/bin/env python3
"""Benchmark of whole training steps of language models on one GPU: ours and their peers in the same run.

    make bench-lm                                     builds, measures, and writes the two files below
    scripts/bench-lm.py --fulgur BIN --only ours      the same with a program that was built elsewhere, some cases
    scripts/bench-lm.py --merge ONE.json TWO.json     one page of two runs; later ones replace cases of earlier ones

Writes docs/benchmarks-training.json after every case, so that a run that is stopped leaves what it has, and from it
docs/benchmarks-training.md. A step is everything: batch, loss, gradients, clipping of their norm, AdamW on f32 weights, computation in
bf16. `--list` names the cases; those that compile flash-linear-attention run only where `--only` names them. Peers run where Python
finds PyTorch; see scripts/lm_peers.py.
"""
import argparse
import array
import json
import math
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from bench_common import ROOT, commit, machine, write_json
from lm_peers import PEERS

SIZES = {"layers": 24, "width": 1024, "hidden": 2816, "heads": 8, "vocabulary": 50304}
TINY = {"layers": 2, "width": 64, "hidden": 176, "heads": 2, "vocabulary": 512}
MODELS = {"tnl": "TNL", "hgrn2": "HGRN2", "lightnet": "LightNet, causal", "llama": "LLaMA"}
# Which of our models stands beside a peer's.
BESIDE = {"hgrn2": "hgrn2", "lightnet": "lightnet", "llama": "llama", "retnet": "tnl"}
# Contexts by tokens a step.
FLAT = {32768: [2, 4, 8, 16, 32], 131072: [2, 8, 32, 64, 128]}
# bf16 without sparsity, as NVIDIA states it; by what the name of the GPU contains.
PEAK_TFLOPS = {"H100 80GB HBM3": 989.4, "H200": 989.4}
# Log lines that are never counted, and how many must be left.
DROPPED, LEAST = 3, 3


def all_cases():
    cases = {name: {"group": "ours", "model": name, "batch": 16, "context": 2048} for name in MODELS}
    for tokens, contexts in FLAT.items():
        recompute = tokens > 32768
        for kilo in contexts:
            name = f"flat-recompute-{kilo}k" if recompute else f"flat-{kilo}k"
            batch, context = tokens // (kilo * 1024), kilo * 1024
            cases[name] = {"group": "flat", "model": "tnl", "batch": batch, "context": context, "recompute": recompute}
    for name, (model, compiled, _) in PEERS.items():
        group = "compiled" if compiled and model != "llama" else "peers"
        cases[name] = {"group": group, "model": model, "batch": 16, "context": 2048}
    return cases


def chosen(only):
    cases = all_cases()
    groups = {case["group"] for case in cases.values()}
    wanted = only.split(",") if only else ["ours", "flat", "peers"]
    for name in wanted:
        if name not in cases and name not in groups:
            sys.exit(f"bench-lm: no case or group `{name}`, expected some of {', '.join([*sorted(groups), *cases])}")
    # In the order in which they are wanted: where time is short, the last ones are left out.
    return {name: case for want in wanted for name, case in cases.items() if want in (name, case["group"])}


class Watch(threading.Thread):
    """Asks the driver for the memory in use and the clock, five times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.before = self.ask()[0]
        self.reset()
        self.start()

    @staticmethod
    def ask():
        query = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used,clocks.sm", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True, timeout=30)
        used, clock = done.stdout.splitlines()[0].split(", ")
        return int(used), int(clock)

    def reset(self):
        self.peak, self.clocks = 0, []

    def run(self):
        while not self.over.wait(0.2):
            try:
                used, clock = self.ask()
            except (subprocess.SubprocessError, ValueError):
                continue
            self.peak = max(self.peak, used)
            self.clocks.append(clock)

    def found(self):
        self.over.set()
        self.join()
        if not self.clocks:
            return {}
        return {"peak_mib": self.peak - self.before, "before_mib": self.before, "clock_sm": int(statistics.median(self.clocks))}


def wait_for_memory(least):
    """Until what the case before took is given back, as far as the driver knows."""
    for _ in range(50):
        if Watch.ask()[0] <= least + 64:
            return
        time.sleep(0.2)


class Lines:
    """The lines of a file that is being written."""

    def __init__(self, path):
        self.path, self.read, self.rest = path, 0, b""

    def new(self):
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read)
            fresh = file.read()
        self.read += len(fresh)
        *whole, self.rest = (self.rest + fresh).split(b"\n")
        return [json.loads(line) for line in whole]


def counted(rates, seconds):
    """Without the first lines, and without those of the first 10 s or the first quarter of the time."""
    warm = min(10.0, seconds / 4)
    return [line for line in rates[DROPPED:] if line["elapsed_s"] - rates[0]["elapsed_s"] >= warm]


def follow(command, metrics, step_tokens, seconds, latest, arguments):
    """Runs a program that trains, reads its lines until `seconds` after the first one, and stops it."""
    print("bench-lm:", " ".join(map(str, command)), file=sys.stderr)
    began = time.monotonic()
    rates, facts, first, limit = [], {}, None, None
    lines = Lines(metrics)
    on_gpu = arguments.device != "cpu"
    watch = Watch() if on_gpu else None
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(list(map(str, command)), stdout=printed, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = process.poll() is not None
                for line in lines.new():
                    if "tokens_per_s" not in line:
                        facts.update(line)
                        continue
                    rates.append(line)
                    if first is None:
                        first = time.monotonic()
                        if watch:
                            watch.reset()
                now = time.monotonic()
                limit = now - began > arguments.start_seconds if first is None else now - first > seconds
                if ended or limit or now > latest:
                    break
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        printed.seek(0)
        said = [line.strip() for line in printed.read().splitlines() if line.strip()]
    found = {"seconds": round(time.monotonic() - began, 1), **facts, **(watch.found() if watch else {})}
    if rates:
        # Of the last line: the most since the first one, at which peers give back what compiling and tuning took.
        found.update({key: rates[-1][key] for key in ("allocated", "reserved") if key in rates[-1]})
    kept = counted(rates, seconds)
    if ended:
        return {**found, "error": said[-1][:200] if said else f"ended with code {process.returncode}"}
    if first is None:
        return {**found, "error": f"stopped after {now - began:.0f} s before its first log line"}
    if len(kept) < LEAST:
        return {**found, "error": f"stopped after {now - began:.0f} s with {len(rates)} log lines, {len(kept)} of them after warm-up"}
    if any(line["loss"] is None or not math.isfinite(line["loss"]) for line in rates):
        return {**found, "error": "its loss is not finite"}
    speeds = [line["tokens_per_s"] for line in kept]
    rate = statistics.median(speeds)
    return {
        **found,
        "tokens_per_s": round(rate),
        "slowest": round(min(speeds)),
        "fastest": round(max(speeds)),
        "lines": len(kept),
        # All that the first steps took beyond what they take later.
        "start_s": round(first - began - rates[0]["step"] * step_tokens / rate, 1),
        "loss": round(rates[-1]["loss"], 4),
    }


RECIPE = """task = "lm"
seed = 1
run_dir = "{run_dir}"

[train]
max_steps = 1000000
ema = 0.0
log_every = {log_every}
checkpoint_seconds = 1e9

[optimiser]
lr = 3e-4
beta2 = 0.95
weight_decay = 0.1
clip = 1.0

[lm]
tokens = "{tokens}"
held_out = 0.0
batch = {batch}
context = {context}
recompute = {recompute}

[lm.model]
architecture = "{model}"
tied = true
"""


def measure(name, case, folder, latest, arguments):
    sizes = TINY if arguments.tiny else SIZES
    batch, context = (2, 64) if arguments.tiny else (case["batch"], case["context"])
    step_tokens = batch * context
    log_every = 4 if step_tokens <= 32768 else 1
    seconds = arguments.flat_seconds if case["group"] == "flat" else arguments.seconds
    metrics = folder / f"{name}.jsonl"
    shape = {**sizes, "batch": batch, "context": context}
    if name in PEERS:
        command = [arguments.python, ROOT / "scripts/lm_peers.py", name, "--sizes", json.dumps(shape), "--metrics", metrics]
        command += ["--device", arguments.device, "--log-every", log_every]
        case = {**case, "notes": []}
        if case["model"] != "llama":
            command += ["--few", arguments.few, "--tuning-threads", arguments.tuning_threads]
            case["notes"] += [f"autotuning limited to {arguments.few} configurations"] if arguments.few else []
        if arguments.compile_mode != "default":
            command += ["--compile-mode", arguments.compile_mode]
            case["notes"] += [f"compiled as {arguments.compile_mode}"] if PEERS[name][1] else []
        if arguments.micro_batches > 1:
            command += ["--micro-batches", arguments.micro_batches]
            case["notes"].append(f"each batch in {arguments.micro_batches} parts")
    else:
        run_dir = folder / name
        recipe = folder / f"{name}.toml"
        values = {"run_dir": run_dir, "tokens": folder / "tokens.u16", "log_every": log_every, "batch": batch, "context": context}
        text = RECIPE.format(**values, model=case["model"], recompute=str(case.get("recompute", False)).lower())
        recipe.write_text(text + "".join(f"{key} = {value}\n" for key, value in sizes.items()))
        command = [arguments.fulgur, "train", recipe, "--device", arguments.device]
        metrics = run_dir / "metrics.jsonl"
        case = {**case, "weights": matmul_weights(case["model"], sizes)}
    found = follow(command, metrics, step_tokens, seconds, latest, arguments)
    return {"case": name, **case, "batch": batch, "context": context, **found}


def matmul_weights(model, sizes):
    """Weights of matrix products of ours; the tied head is one, the lookup of the embedding is not counted again."""
    width, heads = sizes["width"], sizes["heads"]
    mixer = 4 * width * width
    if model in ("tnl", "lightnet"):
        mixer += 2 * width * (width // heads)
    return sizes["layers"] * (mixer + 3 * width * sizes["hidden"]) + sizes["vocabulary"] * width


def flops(case, sizes):
    """Of the model for a token, forward and backward, whatever is computed again."""
    layers, width, heads = sizes["layers"], sizes["width"], sizes["heads"]
    reach = case["context"] / 2 if case["model"] == "llama" else width / heads
    return 6 * case["weights"] + 12 * layers * width * reach


def run(arguments):
    cases = chosen(arguments.only)
    if any(name not in PEERS for name in cases) and not pathlib.Path(arguments.fulgur).is_file():
        sys.exit(f"bench-lm: {arguments.fulgur}: no such program")
    # What decides which numbers come out, not where programs and files lie.
    command = f"scripts/bench-lm.py --seconds {arguments.seconds:g} --flat-seconds {arguments.flat_seconds:g}"
    for option, usual in {"only": "", "start_seconds": 1200, "few": 0, "micro_batches": 1, "compile_mode": "default"}.items():
        value = getattr(arguments, option)
        if value != usual:
            command += f" --{option.replace('_', '-')} {value}"
    found = {"gpu": "none, tiny models on the CPU"} if arguments.device == "cpu" else machine()
    about = {**found, "commit": arguments.commit, "command": command}
    data = {"sizes": TINY if arguments.tiny else SIZES, "runs": [about], "cases": []}
    latest = time.monotonic() + arguments.total_seconds
    least = None
    with tempfile.TemporaryDirectory(prefix="fulgur-bench-") as folder:
        folder = pathlib.Path(folder)
        random.seed(1)
        ids = array.array("H", random.choices(range(data["sizes"]["vocabulary"]), k=4_000_000))
        if sys.byteorder == "big":
            ids.byteswap()
        (folder / "tokens.u16").write_bytes(ids.tobytes())
        for name, case in cases.items():
            if arguments.device != "cpu":
                least = Watch.ask()[0] if least is None else least
                wait_for_memory(least)
            if time.monotonic() > latest - 5:
                row = {"case": name, **case, "error": f"not begun: the {arguments.total_seconds:.0f} s of the run were over"}
            else:
                row = measure(name, case, folder, latest, arguments)
            about.setdefault("packages", {}).update(row.pop("versions", {}))
            print(json.dumps(row), flush=True)
            data["cases"].append({**row, "run": 0})
            write_json(arguments.out, data)
    return data


def merge(files):
    merged = {}
    for data in map(lambda path: json.loads(pathlib.Path(path).read_text()), files):
        if not merged:
            merged = {"sizes": data["sizes"], "runs": [], "cases": []}
        if data["sizes"] != merged["sizes"]:
            sys.exit("bench-lm: files of models of different sizes cannot be merged")
        shift, again = len(merged["runs"]), {case["case"] for case in data["cases"]}
        merged["runs"] += data["runs"]
        merged["cases"] = [case for case in merged["cases"] if case["case"] not in again]
        merged["cases"] += [{**case, "run": case["run"] + shift} for case in data["cases"]]
    order = list(all_cases())
    merged["cases"].sort(key=lambda case: order.index(case["case"]))
    return merged


def gib(case):
    return f"{case['peak_mib'] / 1024:.1f}" if "peak_mib" in case else ""


def render(data):
    sizes, runs = data["sizes"], data["runs"]
    several = len(runs) > 1
    cases = {case["case"]: case for case in data["cases"]}

    def label(case, text):
        notes = case.get("notes", []) + ([f"run {case['run'] + 1}"] if several else [])
        return f"{text} ({'; '.join(notes)})" if notes else text

    def mfu(case):
        peaks = [peak for part, peak in PEAK_TFLOPS.items() if part in runs[case["run"]]["gpu"]]
        if not peaks:
            return ""
        return f"{100 * case['tokens_per_s'] * flops(case, sizes) / peaks[0] / 1e12:.1f} %"

    page = ["# Benchmarks of training", ""]
    for number, about in enumerate(runs, 1):
        head = f"Run {number}: one" if several else "One"
        clocks = f", clocks up to {about['clock_sm']}, memory {about['clock_memory']}" if "clock_sm" in about else ""
        driver = f", driver {about['driver']}" if "driver" in about else ""
        page += [f"{head} {about['gpu']}{driver}{clocks}, commit {about['commit']};", f"`{about['command']}`."]
        if about.get("packages"):
            page.append("Peers: " + ", ".join(f"{name} {version}" for name, version in about["packages"].items()) + ".")
        page.append("")
    page += [
        "`make bench-lm` builds first. Whole steps of {layers} layers x {width}, {heads} heads, GLU {hidden}, vocabulary {vocabulary}, tied:".format(**sizes),
        "batch, loss, gradients, clipping of their norm to 1, AdamW; bf16 computation, f32 weights and moments, random ids. Ours by",
        "`fulgur train`, whose batches come from a file; peers' are drawn on the GPU. Medians of log lines after warm-up (3 lines, and 10 s or a",
        "quarter of the time). `start` is what the first steps took from the start of the process beyond what they take later: building,",
        "compiling, tuning. `GiB` is the most that nvidia-smi saw in use after the first line, beyond what was in use before the process. MFU",
        "counts 6 FLOPs for every weight of a matrix product and token, and 12 L d C for a token's mixers, with C half the context for softmax",
        "attention and the width of a head for the others, over {:g} TFLOP/s.".format(max(PEAK_TFLOPS.values())),
        "",
        "## Ours",
        "",
        "| model | batch | tokens/s | slowest, fastest line | ms a step | MFU | GiB | start, s | SM clock, MHz |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def failure(case):
        return "none: " + case["error"].replace("|", "/")

    def shape(case):
        return f"{case['batch']} x {case['context']}"

    def speed(case):
        return f"{case['tokens_per_s']:,}"

    ours = [case for case in data["cases"] if case["group"] == "ours"]
    for case in ours:
        start = f"| {label(case, MODELS[case['model']])} | {shape(case)} |"
        if "error" in case:
            page.append(f"{start} {failure(case)} | | | | {gib(case)} | | |")
            continue
        step = 1e3 * case["batch"] * case["context"] / case["tokens_per_s"]
        page.append(
            f"{start} {speed(case)} | {case['slowest']:,}, {case['fastest']:,} | {step:.1f} | {mfu(case)} | {gib(case)} | "
            f"{case['start_s']} | {case.get('clock_sm', '')} |"
        )
    if not ours:
        page.append("| none was measured | | | | | | | | |")
    peers = [case for case in data["cases"] if case["case"] in PEERS]
    page += ["", "## Beside peers", ""]
    if not peers:
        page.append("None was measured.")
    else:
        page += [
            "`times` is ours over the peer. `autocast` computes in bf16 from f32 weights, with a residual stream in f32 as ours; `masters`",
            "computes from a bf16 copy of the weights, with a stream in bf16. `reserved` is PyTorch's own count after warm-up.",
            "flash-linear-attention has no TNL: RetNet has constant decays too, but rotary positions, no activations, and a full output gate.",
            "",
            "| model | peer | peer's tokens/s | ours | times | peer's MFU | GiB | reserved | ours, GiB | start, s | ours, s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
    for case in peers:
        mine = cases.get(BESIDE[case["model"]], {})
        if mine and runs[mine["run"]]["gpu"] != runs[case["run"]]["gpu"]:
            mine = {}
        start = f"| {MODELS[BESIDE[case['model']]]} | {label(case, case.get('peer', case['case']))} |"
        own = speed(mine) if "tokens_per_s" in mine else ""
        reserved = f"{case['reserved'] / 2**30:.1f}" if "reserved" in case else ""
        if "error" in case:
            page.append(f"{start} {failure(case)} | {own} | | | {gib(case)} | {reserved} | {gib(mine)} | | {mine.get('start_s', '')} |")
            continue
        times = f"{mine['tokens_per_s'] / case['tokens_per_s']:.2f}" if own else ""
        page.append(
            f"{start} {speed(case)} | {own} | {times} | {mfu(case)} | {gib(case)} | {reserved} | {gib(mine)} | {case['start_s']} | "
            f"{mine.get('start_s', '')} |"
        )
    flat = [case for case in data["cases"] if case["group"] == "flat"]
    page += ["", "## TNL by context", ""]
    if not flat:
        page.append("It was not measured.")
    else:
        page += ["| tokens a step | layers run again | context | tokens/s | of that at 2K | GiB |", "|---|---|---|---|---|---|"]
    for case in flat:
        base = cases.get("flat-recompute-2k" if case["recompute"] else "flat-2k", {})
        context = label(case, f"{case['context']:,}")
        start = f"| {case['batch'] * case['context']:,} | {'yes' if case['recompute'] else 'no'} | {context} |"
        if "error" in case:
            page.append(f"{start} {failure(case)} | | {gib(case)} |")
            continue
        part = f"{100 * case['tokens_per_s'] / base['tokens_per_s']:.1f} %" if "tokens_per_s" in base else ""
        page.append(f"{start} {speed(case)} | {part} | {gib(case)} |")
    return "\n".join(page) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fulgur", default="target/release/fulgur")
    parser.add_argument("--python", default=sys.executable, help="runs the peers")
    parser.add_argument("--out", default=str(ROOT / "docs/benchmarks-training.json"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", default="", help="cases or groups (ours, flat, peers, compiled), in this order, with commas between")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--seconds", type=float, default=60, help="of each case, from its first log line on")
    parser.add_argument("--flat-seconds", type=float, default=25, help="the same for TNL by context")
    parser.add_argument("--start-seconds", type=int, default=1200, help="most time to the first log line")
    parser.add_argument("--total-seconds", type=float, default=math.inf, help="most time for all cases")
    parser.add_argument("--few", type=int, default=0, help="limit the autotuners of flash-linear-attention")
    parser.add_argument("--tuning-threads", type=int, default=0, help="compile what is to be tuned in so many threads")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a peer's batch, where memory ends")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this script; needs --out")
    parser.add_argument("--render", action="store_true", help="only make the page again")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="only make one page of these files")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench-lm: stopped"))
    if arguments.list:
        print("\n".join(f"{name}  [{case['group']}]" for name, case in all_cases().items()))
        return
    out = pathlib.Path(arguments.out)
    if arguments.tiny and arguments.out == parser.get_default("out"):
        sys.exit("bench-lm: --tiny needs --out: its numbers are no benchmark")
    if arguments.merge:
        write_json(out, merge(arguments.merge))
    elif not arguments.render:
        arguments.commit = arguments.commit or commit()
        run(arguments)
    out.with_suffix(".md").write_text(render(json.loads(out.read_text())))
    print(f"wrote {out} and {out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
