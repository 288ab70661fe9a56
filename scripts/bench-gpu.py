#!/usr/bin/env python3
"""Benchmark of the recurrences on one GPU: first the operators' tests, then our kernels and peers in the same run.

    make bench-gpu                                  builds, tests, measures, and writes the two files below
    scripts/bench-gpu.py --check BIN --bench BIN    the same with programs that were built elsewhere

Writes docs/benchmarks.json and, from it, docs/benchmarks.md. No number is written if a test fails. `--render` only makes
the page again. Peers are measured where Python finds PyTorch; see kernels/benches/peers.py.
"""
import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys

from bench_common import ROOT, commit, machine, write_json

NAMES = {
    "none": "no decay",
    "head": "constant decay",
    "token": "decay for each token",
    "channel": "decay for each channel (HGRN2, GLA), learnt",
    "additive": "LightNet, causal",
    "noncausal": "LightNet, non-causal",
    "step": "one token, constant decay",
}


def run(command, seconds=None):
    """Exit code, None if it was stopped, and what was printed."""
    print("bench-gpu:", " ".join(map(str, command)), file=sys.stderr)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds)
        code, printed = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        code, printed = None, (stopped.stdout or b"").decode()
    sys.stderr.write(printed)
    return code, printed


def lines_of(command, seconds=None):
    code, printed = run(command, seconds)
    if code not in (0, None):
        sys.exit(f"bench-gpu: {command[0]} failed ({code}): no numbers are written")
    return code, [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def sources_hash():
    """Of everything that decides what the kernels do, as scripts/gpu-record.sh counts it."""
    files = [path for path in ROOT.glob("kernels/**/*") if path.suffix in {".rs", ".cu", ".cuh", ".toml"}]
    names = sorted(path.relative_to(ROOT).as_posix() for path in [*files, ROOT / "Cargo.lock"])
    lines = [f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def measure(arguments):
    code, _ = run([arguments.check, "untimed", f"record={arguments.record}"])
    if code != 0:
        sys.exit("bench-gpu: the operators' tests fail: no numbers are written")
    record = json.loads(pathlib.Path(arguments.record).read_text())
    found = machine()
    record = {"sources": sources_hash(), **found, "commit": arguments.commit, **record}
    write_json(arguments.record, record)
    _, ours = lines_of([arguments.bench])
    copy = next(line["gbps"] for line in ours if line["kind"] == "copy")
    peers = []
    if not arguments.no_peers:
        script = [sys.executable, str(ROOT / "kernels/benches/peers.py")]
        # Triton compiles what its autotuners try with one processor; all of them do it before the measurement.
        script += ["--tuning-threads", str(max(1, (os.cpu_count() or 1) - 2))]
        for kinds, few in (("step,noncausal,head", 0), ("channel,additive", arguments.few)):
            code, found_peers = lines_of([*script, "--kinds", kinds, "--few", str(few)], arguments.peer_seconds)
            if code is None:
                note = f"stopped after {arguments.peer_seconds:.0f} s, autotuning included"
                fla = "flash-linear-attention 0.6.0"
                ended = {line["kind"] for line in found_peers if line["peer"].startswith(fla)}
                stopped = [kind for kind in kinds.split(",") if kind not in ended | {"noncausal"}]
                found_peers += [{"peer": fla, "kind": kind, "shape": [0] * 4, "error": note} for kind in stopped]
            peers += found_peers
    rows = [line for line in ours if line["kind"] != "copy"]
    # What decides which numbers come out, not where programs and files lie.
    command = "scripts/bench-gpu.py"
    if not arguments.no_peers:
        command += f" --few {arguments.few} --peer-seconds {arguments.peer_seconds:.0f}"
    facts = {**found, "commit": arguments.commit, "dtype": "bf16", "copy_gbps": copy, "command": command}
    return {**facts, "ours": rows, "peers": peers}


def shape_of(row):
    if not any(row["shape"]):
        return ""
    b, n, h, d = row["shape"]
    return f"B{b} N{n} H{h} D{d}"


def render(data):
    copy = data["copy_gbps"]
    page = [
        "# Benchmarks of the recurrences",
        "",
        f"One {data['gpu']}, driver {data['driver']}, commit {data['commit']}, bf16; `{data['command']}`",
        "(`make bench-gpu` builds first, and does not limit the peers' tuning). A copy on the device moves",
        f"{copy} GB/s, read and written. Times are medians in milliseconds, through the public entries; `kernels` is what their",
        "kernels alone take; `share` is that of the copy's bandwidth, counting every operand and result once. TFLOP/s count the",
        "products with the state only, 4 D E for a token and head forward and 12 D E backward.",
        "",
        "## Ours",
        "",
        "| operator | shape | forward | kernels | GB/s | share | TFLOP/s | backward | kernels | GB/s | share | TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cells(row, way):
        ms = row.get(f"{way}_ms")
        if ms is None:
            return "| | | | |"
        gbps, flops = row[f"{way}_bytes"] / ms / 1e6, row[f"{way}_flops"] / ms / 1e9
        return f"{ms:.3f} | {row[f'{way}_kernels_ms']:.3f} | {gbps:.0f} | {100 * gbps / copy:.0f} % | {flops:.0f}"

    for row in data["ours"]:
        page.append(f"| {NAMES[row['kind']]} | {shape_of(row)} | {cells(row, 'forward')} | {cells(row, 'backward')} |")
    page += ["", "## Beside peers, same run", ""]
    if not data["peers"]:
        page.append("None was measured.")
    else:
        page += [
            "| operator | shape | peer | peer forward | ours | times | peer backward | ours | times |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    mine = {(row["kind"], tuple(row["shape"])): row for row in data["ours"]}
    notes = []
    for peer in data["peers"]:
        row = mine.get((peer["kind"], tuple(peer["shape"])))
        name = peer["peer"]
        if peer.get("note"):
            if peer["note"] not in notes:
                notes.append(peer["note"])
            name += f" [{notes.index(peer['note']) + 1}]"
        if peer.get("error"):
            page.append(f"| {NAMES[peer['kind']]} | {shape_of(peer)} | {name} | none: {peer['error']} | | | | | |")
            continue
        columns = []
        for way in ("forward", "backward"):
            theirs, ours = peer.get(f"{way}_ms"), (row or {}).get(f"{way}_ms")
            if theirs is None or ours is None:
                columns.append("| | ")
            else:
                columns.append(f"{theirs:.3f} | {ours:.3f} | {theirs / ours:.2f}")
        page.append(f"| {NAMES[peer['kind']]} | {shape_of(peer)} | {name} | {' | '.join(columns)} |")
    if notes:
        page += [""] + [f"[{i + 1}] {note}." for i, note in enumerate(notes)]
    return "\n".join(page) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", default="target/release/examples/check_cuda")
    parser.add_argument("--bench", default="target/release/examples/bench_cuda")
    parser.add_argument("--record", default=str(ROOT / "tests/gpu-record.json"))
    parser.add_argument("--out", default=str(ROOT / "docs/benchmarks.json"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--few", type=int, default=0, help="limit the autotuners of peers of the kinds channel and additive")
    parser.add_argument("--peer-seconds", type=float, default=1200, help="most time for each group of peers")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--render", action="store_true", help="only make the page from docs/benchmarks.json")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    if not arguments.render:
        if not arguments.commit:
            arguments.commit = commit()
        write_json(out, measure(arguments))
    out.with_suffix(".md").write_text(render(json.loads(out.read_text())))
    print(f"wrote {out} and {out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
