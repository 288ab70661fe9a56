"""Writes checkpoint/*.pth and checkpoint.safetensors: files of torch.save and the tensors that are in them.

Run: pip install torch==2.15.0 numpy safetensors && python checkpoint.py (a second)
Reference: torch itself.

plain.pth: tensors of all types, views of one storage, transposed, expanded and empty ones, a parameter, a scalar
training.pth: a training checkpoint with the state of an optimiser, numbers of NumPy and a module's state_dict
protocol.pth: as plain.pth, but with pickle protocol 4
older.pth: the form before PyTorch 1.6
lightning.ckpt: a training checkpoint whose callbacks and settings are objects of other libraries, as the first releases of latent
diffusion are
FILE.NAME: the tensors
"""

import argparse
import collections
import pathlib
import sys
import types

import numpy as np
import torch
from safetensors.torch import save_file

torch.manual_seed(17)
HERE = pathlib.Path(__file__).parent
folder = HERE / "checkpoint"
folder.mkdir(exist_ok=True)
base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
plain = {
    "base": base, "row": base[2], "column": base[:, 3], "transposed": base.t(), "part": base[1:3, 2:5],
    "steps": base.flatten()[1::5], "expanded": torch.tensor([1.5, -2.0]).expand(3, 2), "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5), "permuted": torch.randn(2, 3, 4).permute(2, 0, 1), "f64": torch.randn(3, dtype=torch.float64),
    "f16": torch.randn(5).half(), "bf16": torch.randn(5).bfloat16(), "i64": torch.tensor([1, -(2**40)]),
    "i32": torch.tensor([3, -7], dtype=torch.int32), "i16": torch.tensor([300, -300], dtype=torch.int16),
    "i8": torch.tensor([5, -128], dtype=torch.int8), "u8": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]), "parameter": torch.nn.Parameter(torch.randn(2, 2)),
}
torch.save(plain, folder / "plain.pth")
torch.save(plain, folder / "protocol.pth", pickle_protocol=4)
torch.save(plain, folder / "older.pth", _use_new_zipfile_serialization=False)
module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
module(torch.randn(4, 3)).sum().backward()
optimiser.step()
torch.save({
    "epoch": 7, "best": np.float64(0.25), "array": np.arange(5), "names": ["a", ("b", None)], "state_dict": module.state_dict(),
    "optimizer": optimiser.state_dict(), "size": torch.Size([1, 2]), "type": torch.float16, "big": 2**70, "flag": True,
}, folder / "training.pth")


class ModelCheckpoint:
    """Stands for the class of a library that need not be there."""

    def __init__(self, best):
        self.best = best


library = "pytorch_lightning.callbacks.model_checkpoint"
for name in ("pytorch_lightning", "pytorch_lightning.callbacks", library):
    sys.modules[name] = types.ModuleType(name)
sys.modules[library].ModelCheckpoint = ModelCheckpoint
ModelCheckpoint.__module__ = library
counts = collections.defaultdict(int)
counts["seen"] = 3
torch.save({
    "epoch": 2, "callbacks": {ModelCheckpoint: {"best": np.float64(1.5)}}, "hyper_parameters": argparse.Namespace(lr=0.1),
    "objects": [ModelCheckpoint(torch.zeros(2))], "counts": counts, "place": pathlib.PurePosixPath("a/b"),
    "state_dict": module.state_dict(),
}, folder / "lightning.ckpt")


def kept(t):
    t = t.detach()
    if t.dtype in (torch.int32, torch.int16, torch.int8):
        t = t.long()
    if t.dtype == torch.bool:
        t = t.byte()
    return t.clone().contiguous()


tensors = {f"plain.{k}": kept(v) for k, v in plain.items()}
tensors |= {f"training.{k}": kept(v) for k, v in module.state_dict().items()}
save_file(tensors, HERE / "checkpoint.safetensors")
