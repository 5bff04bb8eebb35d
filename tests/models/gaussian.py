"""Gaussian data in closed form, by formulas of its own: nothing here comes from models/.

Data x ~ N(mean, std^2) and noise e ~ N(0, 1) on a path x_t = alpha x + sigma e are jointly Gaussian, so with
    Var x_t = alpha^2 std^2 + sigma^2,    z = (x_t - alpha mean) / Var x_t,
    E[x | x_t] = mean + alpha std^2 z,    E[e | x_t] = sigma z,    score = -z,
and dx_t/dt = alpha' E[x | x_t] + sigma' E[e | x_t] has the solution x_t = alpha mean + sqrt(Var x_t) constant.
"""

from dataclasses import dataclass

import numpy as np
import torch

BETA = np.linspace(1e-4, 0.02, 1000)  # of ddpm's steps 0 to 999
FLOWS = ("linear", "gvp", "vp", "jit")
ENDS = {"linear": (0, 1), "gvp": (0, 1), "vp": (0, 0.999), "jit": (0, 1), "ddpm": (999, -1)}  # noisiest, cleanest


def mixture(name, t):
    """alpha and sigma of a path at times t, real or complex."""
    t = np.asarray(t)
    if name in ("linear", "jit"):
        return t, 1 - t
    if name == "gvp":
        return np.sin(np.pi / 2 * t), np.cos(np.pi / 2 * t)
    if name == "vp":
        integral = 0.1 * (1 - t) + 19.9 * (1 - t) ** 2 / 2  # of beta, from the data on
        return np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))
    alpha_bar = np.append(np.cumprod(1 - BETA), 1.0)[t.astype(int)]  # the last one is at -1
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def slopes(name, t):
    """alpha' and sigma', to the last digits: by a complex step."""
    return tuple(part.imag / 1e-30 for part in mixture(name, np.asarray(t) + 1e-30j))


def factors(parts):
    """Numbers, or numbers of each image (B,), as factors of images."""
    return tuple(torch.from_numpy(np.asarray(part, np.float64)).view(-1, 1, 1, 1) for part in parts)


@dataclass(frozen=True)
class Gaussian:
    mean: float
    std: float

    def marginal(self, name, t):
        """Mean and standard deviation of x_t."""
        alpha, sigma = mixture(name, t)
        return alpha * self.mean, np.sqrt(alpha**2 * self.std**2 + sigma**2)

    def best(self, name, x_t, t):
        """The best prediction of data, noise, velocity and score. ddpm's velocity is by the angle."""
        t = np.asarray(t, np.float64)
        alpha, sigma = factors(mixture(name, t))
        d_alpha, d_sigma = (-sigma, alpha) if name == "ddpm" else factors(slopes(name, t))
        z = (x_t - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        x, noise = self.mean + alpha * self.std**2 * z, sigma * z
        return {"data": x, "noise": noise, "velocity": d_alpha * x + d_sigma * noise, "score": -z}

    def prediction(self, name, x_t, t):
        """What the best network on a path says."""
        return self.best(name, x_t, t)[{"jit": "data", "ddpm": "noise"}.get(name, "velocity")]

    def denoise(self, name):
        """The best network, as samplers call it."""
        return lambda x, t: self.prediction(name, x, t).to(x.dtype)

    def transport(self, name, x, start, end):
        """Where the exact flow takes x from one time to another."""
        (mean, std), (end_mean, end_std) = self.marginal(name, start), self.marginal(name, end)
        return end_mean + end_std / std * (x - mean)


GAUSSIANS = (Gaussian(0.0, 0.5), Gaussian(1.5, 0.3), Gaussian(-2.0, 2.0), Gaussian(0.7, 0.9))


def normal(number, seed=0, dtype=torch.float64):
    """`number` standard normal numbers, as two images."""
    return torch.randn(2, 1, 1, number // 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)
