"""The optimizer: which one it is, and a rule for how it treats each parameter.

To add a rule, write a function `rule(name, parameter) -> settings` and give it a line in RULES. Settings, such as
{"weight_decay": 0.0}, replace the optimizer's own in the parameter's group; parameters with equal settings form one
group. The name is the network's; a parameter of a head is called "heads.<head>.<parameter>".

To add an optimizer, write a function `make(groups, optim) -> Optimizer` and give it a line in OPTIMIZERS. The optimizer
must hold the whole state of each parameter, in tensors, when it is returned: memory is allocated before the first step,
and a checkpoint fills these tensors in place. Before each step, the engine sets the learning rate of all groups.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.engines.config import OptimConfig
from trainer.errors import RunError

Settings = dict[str, Any]
Group = dict[str, Any]  # "params": the parameters; and their settings
Rule = Callable[[str, Tensor], Settings]

HEADS = "heads"  # the first word of the names of their parameters, and the part of a checkpoint that holds them
NOT_MATRICES = ("ln", "bias", "norm", "gamma", "emb", "token")  # in the name of a parameter that does not decay


def all_decay(name: str, parameter: Tensor) -> Settings:
    """Decay every parameter."""
    return {}


def matrices_decay(name: str, parameter: Tensor) -> Settings:
    """Decay what has two or more dimensions, unless its name says that it is no matrix of a layer.

    This is the rule of GroupDiff's release, whose list has "embed" and "embedding" where "emb" is here, for JiT's
    `in_context_posemb` too. Capitals matter: `adaLN_modulation` decays. What a head is called says nothing.
    """
    own = name.split(".", 2)[2] if name.startswith(f"{HEADS}.") else name
    exempt = parameter.ndim < 2 or any(word in own for word in NOT_MATRICES)
    return {"weight_decay": 0.0} if exempt else {}


RULES: dict[str, Rule] = {"all": all_decay, "matrices": matrices_decay}


def parameter_groups(parameters: dict[str, Tensor], optim: OptimConfig) -> list[Group]:
    """Sort named parameters by the settings that the configured rule gives them; groups and parameters keep their
    order. Raise RunError if there is a weight decay, and it acts on none of them."""
    rule = RULES[optim.decay]
    groups: list[tuple[Settings, list[Tensor]]] = []
    for name, parameter in parameters.items():
        settings = rule(name, parameter)
        members = next((members for known, members in groups if known == settings), None)
        if members is None:
            groups.append((settings, members := []))
        members.append(parameter)
    if optim.weight_decay and not any(settings.get("weight_decay", 1) for settings, _ in groups):
        raise RunError(
            f"optim.decay={optim.decay}: no parameter decays by this rule; set another, or optim.weight_decay=0"
        )
    return [{"params": members, **settings} for settings, members in groups]


def adamw(groups: list[Group], optim: OptimConfig) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization") with moments of zero."""
    optimizer = stateless_adamw(groups, optim)
    for group in groups:
        init_moments(optimizer, group["params"])
    return optimizer


def stateless_adamw(groups: list[Group], optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW without moments, for an engine that replaces the parameters by other tensors."""
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


@torch.no_grad()
def init_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Give parameters the state that AdamW would create at its first step."""
    for parameter in parameters:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}


OPTIMIZERS: dict[str, Callable[[list[Group], OptimConfig], Optimizer]] = {"adamw": adamw}


def make_optimizer(parameters: dict[str, Tensor], optim: OptimConfig) -> Optimizer:
    """Return the configured optimizer of named parameters, grouped by the configured rule."""
    return OPTIMIZERS[optim.name](parameter_groups(parameters, optim), optim)
