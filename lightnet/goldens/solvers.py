"""Writes solvers.safetensors: ways from noise to data on the published schedule, for a network that is a formula.

Run: pip install torch diffusers safetensors && python solvers.py
Reference: DDIMScheduler, DPMSolverMultistepScheduler and EulerDiscreteScheduler of diffusers; versions in the metadata.

Tensors: noise [2, 5]; and for each METHOD.SPACING.BETAS.PREDICTION [steps, 11], where the method `clipped` is DDIM that cuts data to [-0.8, 0.8]: the step of training that was visited, and the latents
after it with unit power (Euler steps keep them divided by the root of the signal's power).
"""

import pathlib

import diffusers
import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent


def network(x, t):
    return (torch.roll(x, -3, dims=1) * 0.7 + torch.cos(torch.as_tensor(t, dtype=torch.float64) / 150)).float().tanh() * 0.9 + x * 0.2


def way(kind, settings, steps, noise):
    scheduler = kind(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, steps_offset=1, **settings)
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    euler = isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    rows = []
    for k, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, float(t)), t, x).prev_sample
        power = 1 / (1 + scheduler.sigmas[k + 1] ** 2) if euler else torch.tensor(1.0)
        rows.append(torch.cat([torch.tensor([float(t)]), (x * power.sqrt()).flatten().float()]))
    return torch.stack(rows).contiguous()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(11)
    noise = torch.randn(2, 5)
    tensors = {"noise": noise}
    kinds = {
        "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
        "clipped": (diffusers.DDIMScheduler, {"clip_sample": True, "clip_sample_range": 0.8, "set_alpha_to_one": False}),
        "dpm": (diffusers.DPMSolverMultistepScheduler, {}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
    }
    for name, (kind, more) in kinds.items():
        if name == "clipped":
            settings = {"beta_schedule": "linear", "timestep_spacing": "leading", "prediction_type": "epsilon", **more}
            tensors["clipped.leading.linear.epsilon"] = way(kind, settings, 11, noise)
            continue
        for spacing in ["leading", "trailing", "linspace"]:
            for betas, prediction in [("linear", "epsilon"), ("scaled_linear", "v_prediction")]:
                settings = {"beta_schedule": betas, "timestep_spacing": spacing, "prediction_type": prediction, **more}
                tensors[f"{name}.{spacing}.{betas}.{prediction}"] = way(kind, settings, 11, noise)
        for steps, betas, prediction in [(40, "linear", "epsilon"), (20, "scaled_linear", "epsilon")]:
            settings = {"beta_schedule": betas, "timestep_spacing": "leading", "prediction_type": prediction, **more}
            key = f"{name}.leading.{betas}.{prediction}"
            tensors[key] = way(kind, settings, steps, noise)
    versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    path = FOLDER / "solvers.safetensors"
    save_file(tensors, path, metadata={"versions": versions})
    path.chmod(0o644)
    print(len(tensors) - 1)


if __name__ == "__main__":
    main()
