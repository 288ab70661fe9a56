"""Writes distances.safetensors: distances of sets of features, and scores of classes and of windows.

Run: pip install numpy scipy safetensors && python distances.py (a second)
Reference: numpy and scipy.linalg in f64. The root of a product of covariances is scipy.linalg.sqrtm where both have full rank, else the
sum of the singular values of the product of their factors; kernels are matrices written out.

case.NAME.generated, .reference [n, d]; case.NAME.answer: frechet, kvd
logits.generated, logits.reference [n, classes]; classes.answer: IS and its deviation over 3 splits in order, KL(reference || generated)
javis.frames.W [N, d], javis.sounds [W, d]; javis.answer: one value a window, then the mean
"""

import pathlib

import numpy as np
import scipy.linalg
from safetensors.numpy import save_file

rng = np.random.default_rng(6)
tensors = {}


def frechet(x, y):
    m = np.sum((x.mean(0) - y.mean(0)) ** 2)
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    s, t = np.atleast_2d(s), np.atleast_2d(t)
    if len(x) > x.shape[1] and len(y) > y.shape[1]:
        root = np.trace(scipy.linalg.sqrtm(s @ t)).real
    else:
        a = (x - x.mean(0)) / np.sqrt(len(x) - 1)
        b = (y - y.mean(0)) / np.sqrt(len(y) - 1)
        root = scipy.linalg.svdvals(a @ b.T).sum()
    return m + np.trace(s) + np.trace(t) - 2 * root


def kvd(x, y):
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    m, n = len(x), len(y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return within - 2 * xy.mean()


for name, (m, n, d, moved) in {
    "tall": (90, 70, 12, 0.4), "narrow": (40, 30, 1, 1.0), "flat": (9, 14, 40, 0.2), "mixed": (8, 60, 20, 0.5), "same": (30, 30, 6, 0.0),
    "square": (20, 20, 20, 0.1),
}.items():
    x = rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d) + moved
    if name == "same":
        y = x.copy()
    tensors[f"case.{name}.generated"], tensors[f"case.{name}.reference"] = x, y
    tensors[f"case.{name}.answer"] = np.array([frechet(x, y), kvd(x, y)])
    print(name, tensors[f"case.{name}.answer"])

logits = {side: 3 * rng.normal(size=(17, 9)) for side in ("generated", "reference")}
softmax = lambda x: np.exp(x - x.max(1, keepdims=True)) / np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)
p, q = softmax(logits["generated"]), softmax(logits["reference"])
scores = []
for i in range(3):
    part = p[i * len(p) // 3:(i + 1) * len(p) // 3]
    scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), 1))))
tensors |= {f"logits.{side}": value for side, value in logits.items()}
tensors["classes.answer"] = np.array([np.mean(scores), np.std(scores), np.mean(np.sum(q * (np.log(q) - np.log(p)), 1))])

sounds = rng.normal(size=(3, 5))
values = []
for w, count in enumerate([10, 1, 7]):
    frames = rng.normal(size=(count, 5))
    cosines = frames @ sounds[w] / np.linalg.norm(frames, axis=1) / np.linalg.norm(sounds[w])
    values.append(np.sort(cosines)[:max(int(0.4 * count), 1)].mean())
    tensors[f"javis.frames.{w}"] = frames
tensors["javis.sounds"] = sounds
tensors["javis.answer"] = np.array(values + [np.mean(values)])
save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, pathlib.Path(__file__).with_suffix(".safetensors"))
