#!/usr/bin/env python3
"""Benchmark of classifiers of pictures on one GPU: ours and softmax ViTs of timm in the same run.

    make bench-vision                                  builds, measures, and writes the two files below
    scripts/bench-vision.py --fulgur BIN --only ours   with a program that was built elsewhere, a part

Writes docs/benchmarks-vision.json after every case, so that a run that is stopped leaves what it has, and from it
docs/benchmarks-vision.md and docs/vision-speed.svg. A step of training is everything but the loading of pictures: loss, gradients, the limit of their
norm, AdamW on f32 weights, computation in bf16. A batch has 50,176 patches at every size, 256 pictures of 224 pixels.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

from bench_common import ROOT, commit, machine, write_json
from vision_peers import PEERS

SIDES = [224, 384, 512, 768, 1024, 1536, 2048]
PEER_SIDES = [224, 1024]
TOKENS, PATCH = 50176, 16
# Mixers and form; the usual form of each, and one scan of what usually takes several.
OURS = [("lightnet,softmax", None), ("hgrn2,tnl", None), ("hgrn2,tnl", "causal")]


def run(command, seconds):
    """The object that a program prints; its last line of stderr where it fails."""
    print("bench-vision:", " ".join(map(str, command)), file=sys.stderr)
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]) if lines[-1].startswith("{") else json.loads(done.stdout)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return {"error": said[-1][:200] if said else f"ended with code {done.returncode}"}


def batch_of(side):
    return max(1, TOKENS // (side // PATCH) ** 2)


def rows_of_ours(data):
    for result in data["ours"]:
        for model in result.get("models", []):
            for measure in model["measures"]:
                yield model["name"], measure


def cell(value, form="{:,.0f}"):
    return "-" if value is None else form.format(value)


def page(data):
    machine = data["machine"]
    packages = next((peer["packages"] for peer in data["peers"] if "packages" in peer), {})
    named = ", ".join(f"{name} {version}" for name, version in packages.items())
    lines = [
        "# Benchmarks of pictures",
        "",
        f"One {machine['gpu']}, driver {machine['driver']}, clocks up to {machine['clock_sm']}, commit {data['commit']}; `{data['command']}`.",
        f"Peers: {named}." if named else "No peers were there.",
        "",
        f"Classifiers of size {data['size']}, patches of {PATCH}, 1,000 classes, bf16. A batch has {TOKENS:,} patches at every size. A step of",
        "training is loss, gradients, the limit of their norm, and AdamW; pictures are noise that lies on the GPU. Memory is what a picture",
        "takes beyond weights, moments and the pictures themselves.",
        "",
        "## Ours",
        "",
        "| mixer | side | patches | batch | training, images/s | answers, images/s | training, MB an image | answers, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    trained = {}
    for name, measure in rows_of_ours(data):
        train, answer = measure["train"], measure["answer"]
        trained[name, measure["side"]] = train["images_per_s"]
        megabytes = [None if used["bytes_per_image"] is None else used["bytes_per_image"] / 1e6 for used in (train, answer)]
        values = [f"{measure['side']}", f"{measure['tokens']:,}", f"{measure['batch']}"]
        values += [cell(train["images_per_s"]), cell(answer["images_per_s"]), cell(megabytes[0], "{:.2f}"), cell(megabytes[1], "{:.2f}")]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines += ["", "![Time and memory of a picture against its pixels](vision-speed.svg)", "", "## Beside peers", ""]
    lines += [
        "Softmax ViTs of timm, autocast, AdamW fused; `times` is LightNet over the peer.",
        "",
        "| peer | side | batch | training, images/s | LightNet's | times | MB an image | start, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for peer in data["peers"]:
        if "error" in peer:
            lines.append(f"| {peer['peer']} | {peer['side']} | {peer['batch']} | none: {peer['error']} | | | | |")
            continue
        ours = trained.get(("lightnet", peer["side"]))
        times = cell(ours / peer["images_per_s"] if ours else None, "{:.2f}")
        memory = cell(peer["bytes_per_image"] / 1e6 if "bytes_per_image" in peer else None, "{:.2f}")
        lines.append(
            f"| {peer['peer']} | {peer['side']} | {peer['batch']} | {cell(peer['images_per_s'])} | {cell(ours)} | {times} | {memory} | {peer['start_s']} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fulgur", default=ROOT / "target/release/fulgur")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--size", default="small")
    parser.add_argument("--only", choices=["ours", "peers"])
    parser.add_argument("--sides", type=lambda text: [int(side) for side in text.split(",")], default=SIDES)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=1500, help="of all cases together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs")
    parser.add_argument("--commit", help="where this is no checkout")
    arguments = parser.parse_args()
    latest = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = {
        "machine": machine(),
        "commit": arguments.commit or commit(),
        "command": "scripts/bench-vision.py " + " ".join(f"--{key} {getattr(arguments, key)}" for key in ["size", "steps"]),
        "size": arguments.size,
        "ours": [],
        "peers": [],
    }

    def keep():
        write_json(arguments.out / "benchmarks-vision.json", data)
        (arguments.out / "benchmarks-vision.md").write_text(page(data))

    def left():
        return max(1.0, latest - time.monotonic())

    if arguments.only != "peers":
        for mixer, form in OURS:
            command = [arguments.fulgur, "eval", "speed", "--size", arguments.size, "--mixer", mixer, "--patch", PATCH]
            command += ["--sides", ",".join(map(str, arguments.sides)), "--tokens", TOKENS, "--steps", arguments.steps]
            command += ["--device", arguments.device, "--json", "-q"]
            command += ["--form", form] if form else []
            command += ["--plot", arguments.out / "vision-speed.svg"] if mixer == OURS[0][0] else []
            data["ours"].append(run(command, left()))
            keep()
    if arguments.only != "ours":
        for side in PEER_SIDES:
            for peer in PEERS:
                batch = batch_of(side)
                command = [arguments.python, ROOT / "scripts/vision_peers.py", peer, "--size", arguments.size]
                command += ["--side", side, "--batch", batch, "--steps", arguments.steps, "--device", arguments.device]
                data["peers"].append({"peer": peer, "side": side, "batch": batch, **run(command, left())})
                keep()


if __name__ == "__main__":
    main()
