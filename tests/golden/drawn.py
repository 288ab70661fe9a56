"""Random tensors from their names: the generators beside this file draw them, and so do the tests (`fulgur_lightnet::testing`).

Run: pip install numpy && python drawn.py, which prints the values that the test of `fulgur_lightnet::testing` expects

Value i of a tensor is centre + (2 b - 255) 2^exponent, where b is the highest byte of splitmix64's finaliser of h + (i + 1) g: h is
the 64-bit FNV-1a hash of the name, g is 0x9E3779B97F4A7C15. That is few bits, so that f32 holds it exactly, and f16 what has no
centre; the deviation is 148 2^exponent.

FOLDER/drawn.json and NAME.drawn.json say what is drawn, one tensor a line: "name": [shape, exponent, centre, sweeps]; a centre
of 0 and what follows may be missing. "u8" for an exponent: the bytes b themselves; null: the centre alone. A sweep [from, to, step, rise, fade, exponent]
adds s(step k + rise k^2) (fade - k if fade else 1) 2^exponent to the sample from + k below to, while fade - k is positive; s is a sine
of parabolas, a turn of which is 2^32. All sums are exact in f64 before they become f32.
FOLDER/rest.safetensors holds the tensors of a model that are not drawn; NAME.safetensors holds what is not in NAME.drawn.json.
"""

import json
import math

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def hashed(name):
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def bytes_of(name, count):
    z = np.uint64(hashed(name)) + np.arange(1, count + 1, dtype=np.uint64) * GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(56)).astype(np.uint8)


def sine(phase):
    """Of phases of which 2^32 are a turn; from -2^14 to 2^14."""
    half = (phase >> np.uint64(16)).astype(np.int64) & 0x7FFF
    value = half * (0x8000 - half) >> 14
    return np.where(phase >> np.uint64(31) & np.uint64(1), -value, value)


def sweep(count, start, end, step, rise, fade, exponent):
    """Zeros but from start to end."""
    k = np.arange(min(end, count) - start, dtype=np.uint64)
    value = sine(np.uint64(step) * k + np.uint64(rise) * k * k)
    if fade:
        value = value * np.maximum(fade - k.astype(np.int64), 0)
    out = np.zeros(count)
    out[start:start + len(k)] = value * 2.0**exponent
    return out


def draw(name, shape, exponent, centre=0, sweeps=()):
    count = math.prod(shape)
    raw = bytes_of(name, count)
    if exponent == "u8":
        return raw.reshape(shape)
    values = centre + (2 * raw.astype(np.float64) - 255) * (0.0 if exponent is None else 2.0**exponent)
    for one in sweeps:
        values = values + sweep(count, *one)
    return values.astype(np.float32).reshape(shape)


def exponent(deviation):
    """The one whose deviation is nearest."""
    return round(math.log2(deviation / 147.8))


def usual(name, shape, gain=1.0):
    """Exponent and centre for a weight: a deviation of gain / sqrt(inputs) of matrices, of 0.3 of learned places, of 0.15 of biases."""
    if name.endswith("running_var"):
        return [exponent(0.2), 1]
    if len(shape) < 2:
        return [exponent(0.15), 1] if name.endswith("weight") else [exponent(0.15)]
    if shape[0] == 1 or "embed" in name:
        return [exponent(0.3)]
    return [exponent(gain / math.sqrt(math.prod(shape[1:])))]


def plain(name, shape):
    """Exponent and centre for a weight of convolutions and transformers alike: `fulgur_lightnet::testing::plainly` has the same rule, so
    that names and shapes, which a test knows of its own model, are all that both sides need."""
    if len(shape) < 2:
        return [exponent(0.15), 1 if name.endswith(("weight", "scale")) else 0]
    return [exponent(1.2 / math.sqrt(math.prod(shape[1:])))]


def digest(shapes):
    """Of names and shapes: whether two sides mean the same tensors."""
    return f"{hashed(''.join(f'{name} {list(shapes[name])}' + chr(10) for name in sorted(shapes))):016x}"


class Drawn:
    """Tensors that are drawn, by name, and how."""

    def __init__(self):
        self.how = {}

    def __call__(self, name, shape, *how):
        how = list(how)
        while len(how) > 1 and how[-1] == 0:
            how.pop()
        self.how[name] = [list(shape), *how]
        return draw(name, *self.how[name])

    def save(self, path):
        lines = [f"{json.dumps(name)}: {json.dumps(how, separators=(',', ':'))}" for name, how in sorted(self.how.items())]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def fill(module, own, prefix="", how=usual):
    """Draws the parameters and the running statistics of a torch module in place; `own` (a `Drawn`) remembers them."""
    import torch

    parts = dict(module.named_parameters())
    parts |= {name: part for name, part in module.named_buffers() if "running" in name}
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(torch.from_numpy(own(prefix + name, part.shape, *how(name, part.shape))))
    return module


def save_model(model, folder, own, **options):
    """Writes the folder of a model of transformers as the library does, with drawn.json for the weights; an index of shards stays."""
    model.save_pretrained(folder, **options)
    for path in [*folder.glob("*.safetensors"), folder / "generation_config.json"]:
        path.unlink(missing_ok=True)
    own.save(folder / "drawn.json")


def load_model(model, folder):
    """Draws the weights of a model as FOLDER/drawn.json says."""
    import torch

    how = json.loads((folder / "drawn.json").read_text())
    state = {name: torch.from_numpy(draw(name, *one)) for name, one in how.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(model._tied_weights_keys or []), (missing, unexpected)
    return model


if __name__ == "__main__":
    print(draw("a.weight", [2, 5], -9, 1).tolist())
    print(draw("b", [7], "u8").tolist())
    print(draw("wave", [9], -14, 0, [[0, 6, 2**32 // 7, 1000003, 0, -15], [4, 20, 2**31 - 5, 77, 4, -16]]).tolist())
