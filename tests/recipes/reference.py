"""The training step of the published codes, written out in float64: noise, loss, gradient, clipping, decay, AdamW and
averages. Nothing here comes from models/, data/ or trainer/.

Sources: facebookresearch/DiT (train.py, diffusion/gaussian_diffusion.py), willisma/SiT (transport), LTH14/JiT
(denoiser.py); GroupDiff (arXiv 2512.10954) and its code; Loshchilov & Hutter 2019 for AdamW.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Predict = Callable[..., Tensor]  # (weights, x_t, t, class, slot, group size) -> prediction


@dataclass(frozen=True)
class Images:
    """The plain numbers of a micro-batch; `label` is the last class but one where there is none."""

    x: Tensor
    noise: Tensor
    u: Tensor
    label: Tensor
    slot: Tensor
    group: int


@dataclass(frozen=True)
class Recipe:
    """What a published code sets its optimizer to. `decays` says by name and weight what decays."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    decays: Callable[[str, Tensor], bool] = lambda name, weight: True
    clip: float | None = None
    averages: tuple[float, ...] = (0.9999,)
    warmup: int = 0  # images


EXCLUDED = ("ln", "bias", "embedding", "norm", "gamma", "embed", "token")


def release_decays(name: str, weight: Tensor) -> bool:
    """GroupDiff's rule: matrices alone, and none whose name has one of these in it."""
    return weight.dim() >= 2 and not any(part in name for part in EXCLUDED)


@dataclass
class State:
    """Weights, the two moments of their gradient, and averages that start at the weights."""

    weights: Weights
    averages: list[Weights]
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)
    steps: int = 0


def begin(weights: Weights, recipe: Recipe) -> State:
    """A state before the first step."""
    weights = {name: weight.detach().double().clone() for name, weight in weights.items()}
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    return State(weights, [dict(weights) for _ in recipe.averages], zeros, dict(zeros))


def gradient(weights: Weights, predict: Predict, loss: Callable, images: list[Images]) -> tuple[float, Weights]:
    """The mean of the images' losses, and its gradient."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    total = sum(loss(lambda *inputs: predict(leaves, *inputs), each).sum() for each in images)
    mean = total / sum(len(each.x) for each in images)
    return mean.item(), dict(zip(leaves, torch.autograd.grad(mean, list(leaves.values())), strict=True))


def accumulate(state: State, recipe: Recipe, grads: Weights) -> float:
    """Begin a step: clip the gradient and add it to the moments. Its norm before clipping."""
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    factor = 1.0 if recipe.clip is None else min(1.0, recipe.clip / (norm + 1e-6))
    one, two = recipe.betas
    state.steps += 1
    for name, grad in grads.items():
        state.first[name] = one * state.first[name] + (1 - one) * factor * grad
        state.second[name] = two * state.second[name] + (1 - two) * (factor * grad) ** 2
    return norm


def move(state: State, recipe: Recipe, lr: float) -> None:
    """End a step: decay the weights, move them by the moments, and average them."""
    one, two = (1 - beta**state.steps for beta in recipe.betas)
    for name, weight in state.weights.items():
        decay = recipe.decay if recipe.decays(name, weight) else 0.0
        size = (state.second[name] / two).sqrt() + 1e-8
        state.weights[name] = weight - lr * decay * weight - lr * (state.first[name] / one) / size
    for average, decay in zip(state.averages, recipe.averages, strict=True):
        for name, weight in state.weights.items():
            average[name] = decay * average[name] + (1 - decay) * weight


def mean_of_image(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = torch.cumprod(1 - BETA, dim=0)
BEFORE = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BAR[:-1]])
VARIANCE = BETA * (1 - BEFORE) / (1 - ALPHA_BAR)  # of q(x_{t-1} | x, x_t)
LOG_VARIANCE = torch.cat([VARIANCE[1:2], VARIANCE[1:]]).log()  # that of the first step would be -inf


def dit_loss(predict: Predict, images: Images) -> Tensor:
    """DiT's: squared error of the noise, plus the variational bound of the variance, in bits."""
    x, noise, t = images.x, images.noise, (images.u * 1000).long()
    bar, before = column(ALPHA_BAR[t]), column(BEFORE[t])
    x_t = bar.sqrt() * x + (1 - bar).sqrt() * noise
    predicted, share = predict(x_t, t.double(), images.label, images.slot, images.group).chunk(2, dim=1)
    simple = mean_of_image((noise - predicted) ** 2)

    of_data = column(BETA[t]) * before.sqrt() / (1 - bar)
    of_noisy = (1 - before) * (1 - column(BETA[t])).sqrt() / (1 - bar)
    data = (1 / bar).sqrt() * x_t - (1 / bar - 1).sqrt() * predicted.detach()
    mean, true_mean = (of_data * clean + of_noisy * x_t for clean in (data, x))
    true_log_variance, log_beta = column(LOG_VARIANCE[t]), column(BETA[t].log())
    log_variance = (share + 1) / 2 * log_beta + (1 - share) / 2 * true_log_variance
    ratio = true_log_variance - log_variance
    kl = (-1 - ratio + ratio.exp() + (true_mean - mean) ** 2 * (-log_variance).exp()) / 2
    bits = torch.where(t == 0, -mean_of_image(log_likelihood(x, mean, log_variance / 2)), mean_of_image(kl))
    return simple + bits / math.log(2)


def log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of 256 bins on [-1, 1], by the tanh approximation of the normal distribution function."""

    def cdf(value: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))) / 2

    upper, lower = (cdf((-log_scale).exp() * (x - mean + sign / 255)) for sign in (1, -1))
    below, above, inside = (part.clamp(min=1e-12).log() for part in (upper, 1 - lower, upper - lower))
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


def sit_loss(predict: Predict, images: Images) -> Tensor:
    """SiT's: squared error of the velocity on the linear path, t = 1 being data."""
    x, noise, t = images.x, images.noise, images.u
    x_t = column(t) * x + (1 - column(t)) * noise
    predicted = predict(x_t, t, images.label, images.slot, images.group)
    return mean_of_image((predicted - (x - noise)) ** 2)


def jit_loss(predict: Predict, images: Images) -> Tensor:
    """JiT's: the data predicted, velocities compared, t logit-normal and 1 - t at least 0.05."""
    normal = torch.tensor([NormalDist().inv_cdf(u) for u in images.u.tolist()], dtype=torch.float64)
    t = torch.sigmoid(0.8 * normal - 0.8)
    x_t = column(t) * images.x + (1 - column(t)) * images.noise
    predicted = predict(x_t, t, images.label, images.slot, images.group)
    left = (1 - column(t)).clamp(min=0.05)
    return mean_of_image(((images.x - x_t) / left - (predicted - x_t) / left) ** 2)
