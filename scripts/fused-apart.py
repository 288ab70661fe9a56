#!/usr/bin/env python3
"""Whether streams that hear each other do better: the published architecture, fused against apart.

    scripts/fused-apart.py OUT [--fulgur PATH] [--steps 900] [--seeds 1,2,3] [--prompts 200] [--set KEY=VALUE]..

Trains recipes/tav-published.toml once a seed and kind, with as many steps and parameters: `fused` as the recipe says, `apart` with each
stream reading itself where it would read the other (tav-published.unet.reads = "itself"). Then both are judged on the same held-out
prompts with the same noise (fulgur eval tav), and compared prompt by prompt: differences of means with intervals of a paired bootstrap
over prompts, where the seeds of a prompt stay together. `shuffled` is the onset error of the generated pictures with the sounds of other
clips of the same model. Needs data/stamps, data/backgrounds, models/builtin and models/judges. Prints a table, and writes it with all
figures to OUT/fused-apart.json and OUT/fused-apart.md. What was trained or judged before is not done again.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

KINDS = {"fused": "other", "apart": "itself"}
RESAMPLES = 4000
MISSING_MS = 1000.0
FIGURES = [
    # name, key of a clip, how it reads, whether more is better
    ("picture named", "picture", "{:.1%}", True),
    ("sound named", "sound", "{:.1%}", True),
    ("motion recognised", "motion", "{:.1%}", True),
    ("onset error, mean", "onset_error_ms", "{:.0f} ms", False),
    ("AVHScore", "avhscore", "{:.4f}", True),
]


def run(arguments, log):
    """Runs a command, with its messages in a file; ends the script with its last words where it fails."""
    began = time.monotonic()
    with open(log, "w") as out:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=out, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))}: exit code {done.returncode}\n{log.read_text()[-2000:]}")
    print(f"{log.stem}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return done.stdout


def trained(options, kind, seed):
    """The validation figures of a run, which is made where it is not there."""
    folder = options.out / f"{kind}-{seed}"
    if not (folder / "model" / "model_index.json").is_file():
        sets = [
            f"run_dir={json.dumps(str(folder))}",
            f"seed={seed}",
            "train.max_seconds=0",
            f"train.max_steps={options.steps}",
            f'tav-published.unet.reads="{KINDS[kind]}"',
            "tav-published.samples=0",
            *options.set,
        ]
        arguments = [options.fulgur, "train", "recipes/tav-published.toml", "--json", "--device", options.device]
        for value in sets:
            arguments += ["--set", value]
        run(arguments, options.out / f"train-{kind}-{seed}.log")
    figures = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        figures.update({key: value for key, value in values.items() if key.startswith("validation/")})
    return figures


def judged(options, kind, seed):
    """What the judges found in each clip, and the figures of all of them."""
    rows = options.out / f"{kind}-{seed}.jsonl"
    answer = options.out / f"eval-{kind}-{seed}.json"
    if not (rows.is_file() and answer.is_file()):
        model = options.out / f"{kind}-{seed}" / "model"
        arguments = [
            options.fulgur, "eval", "tav", "--json", "--device", options.device, "--model", model, "--clips", rows,
            "--prompts", str(options.prompts), "--batch", str(options.batch),
        ]  # fmt: skip
        answer.write_text(run(arguments, options.out / f"eval-{kind}-{seed}.log"))
    return [json.loads(line) for line in rows.read_text().splitlines()], json.loads(answer.read_text())


def shuffled(rows, draw):
    """The onset error of each picture with the sound of another clip of the same model."""
    order = list(range(len(rows)))
    # A single cycle: nobody keeps their own.
    for i in range(len(order) - 1, 0, -1):
        j = draw.randrange(i)
        order[i], order[j] = order[j], order[i]
    errors = []
    for seen, other in zip(rows, order):
        onset, contact = rows[other]["onset_s"], seen["contact_s"]
        missing = onset is None or contact is None
        errors.append(MISSING_MS if missing else 1000 * abs(onset - contact))
    return errors


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else float("nan")


def interval(pairs, draw):
    """The mean difference of two lists of lists (a list of values of the seeds for each prompt), and 95 % of resamples of prompts."""
    differences = []
    for one, other in pairs:
        both = [a - b for a, b in zip(one, other) if a is not None and b is not None]
        if both:
            differences.append(sum(both) / len(both))
    if not differences:
        return float("nan"), float("nan"), float("nan")
    count = len(differences)
    means = sorted(sum(draw.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    return sum(differences) / count, means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def verdict(low, high, more_is_better):
    if low <= 0 <= high:
        return "no difference seen"
    return "fused better" if (low > 0) == more_is_better else "apart better"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fulgur", default="fulgur")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more settings of both kinds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    losses, rows, answers = {}, {}, {}
    for seed in seeds:
        for kind in KINDS:
            losses[kind, seed] = trained(options, kind, seed)
            rows[kind, seed], answers[kind, seed] = judged(options, kind, seed)
    draw = random.Random(0)
    prompts = min(len(found) for found in rows.values())
    table = []

    def by_prompt(kind, value):
        return [[value(rows[kind, seed][i], kind, seed, i) for seed in seeds] for i in range(prompts)]

    def compare(name, form, more_is_better, one, other, labels):
        difference, low, high = interval(list(zip(one, other)), draw)
        flat = [[value for prompt in side for value in prompt] for side in (one, other)]
        table.append({
            "figure": name, labels[0]: mean(flat[0]), labels[1]: mean(flat[1]), "difference": difference, "low": low, "high": high,
            "cells": [form.format(mean(flat[0])), form.format(mean(flat[1])), form.format(difference),
                      f"{form.format(low)} to {form.format(high)}"],
            "verdict": verdict(low, high, more_is_better).replace("apart", labels[1]).replace("fused", labels[0]),
        })  # fmt: skip

    for name in ("loss", "video", "audio"):
        key = f"validation/{name}"
        per_seed = [[[losses[kind, seed][key]] for seed in seeds] for kind in KINDS]
        # Three seeds are no distribution: their least and largest difference.
        differences = sorted(a[0] - b[0] for a, b in zip(*per_seed))
        form = "{:.4f}"
        sides = [mean(value for seed in side for value in seed) for side in per_seed]
        table.append({
            "figure": f"held-out {name}", "fused": sides[0], "apart": sides[1], "difference": mean(differences),
            "low": differences[0], "high": differences[-1],
            "cells": [*map(form.format, sides), form.format(mean(differences)),
                      f"{form.format(differences[0])} to {form.format(differences[-1])} (seeds)"],
            "verdict": verdict(differences[0], differences[-1], False),
        })  # fmt: skip
    for name, key, form, more_is_better in FIGURES:
        of = lambda row, *_: None if row[key] is None else float(row[key])
        compare(name, form, more_is_better, by_prompt("fused", of), by_prompt("apart", of), ["fused", "apart"])
    mixed = {place: shuffled(found, random.Random(place[1])) for place, found in rows.items()}
    own = lambda row, *_: float(row["onset_error_ms"])
    other = lambda _, kind, seed, i: mixed[kind, seed][i]
    for kind in KINDS:
        labels = [kind, f"{kind}, shuffled"]
        compare(f"onset error of {kind}", "{:.0f} ms", False, by_prompt(kind, own), by_prompt(kind, other), labels)

    lines = ["| figure | fused | apart | difference | 95 % | |", "|---|---|---|---|---|---|"]
    for row in table[: 3 + len(FIGURES)]:
        lines.append(f"| {row['figure']} | {' | '.join(row['cells'])} | {row['verdict']} |")
    lines += ["", "| onset error | own sound | shuffled | difference | 95 % | |", "|---|---|---|---|---|---|"]
    for kind, row in zip(KINDS, table[3 + len(FIGURES):]):
        lines.append(f"| {kind} | {' | '.join(row['cells'])} | {row['verdict']} |")
    (options.out / "fused-apart.md").write_text("\n".join(lines) + "\n")
    document = {"steps": options.steps, "seeds": seeds, "prompts": prompts, "table": table,
                "figures": {f"{kind}-{seed}": answer["generated"] for (kind, seed), answer in answers.items()}}  # fmt: skip
    (options.out / "fused-apart.json").write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
