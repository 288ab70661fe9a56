"""What the benchmarks on a GPU share."""
import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def machine():
    """Name, driver and highest clocks of the first GPU."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem"
    done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], stdout=subprocess.PIPE, text=True)
    name, driver, sm, memory = done.stdout.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver, "clock_sm": sm, "clock_memory": memory}


def commit():
    """Of the checkout; empty where this is none."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, stdout=subprocess.PIPE, text=True).stdout.strip()


def write_json(path, data):
    """Whole or not at all."""
    path = pathlib.Path(path)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(fresh, path)
