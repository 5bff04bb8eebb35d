"""What a run minimises: a weighted sum of loss terms over one forward pass."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.objectives.registry import MAIN, TERMS
from models.objectives.term import NoisyImages, Term, TermConfig, forward_pass
from models.paths.base import NoisePath


class Objective:
    """The loss terms of a run, with their weights. `heads` holds the modules of terms that have any, by the terms'
    names; `extra` the names of the extra tensors that the terms need."""

    def __init__(self, terms: Mapping[str, tuple[float, Term]], network: nn.Module) -> None:
        self._terms = dict(terms)
        made = [term for _, term in self._terms.values()]
        self.heads = nn.ModuleDict({n: t.modules for n, (_, t) in self._terms.items() if t.modules is not None})
        self.extra = tuple(sorted({name for term in made for name in term.extra}))
        self._drop = getattr(network, "takes_keys", False)
        self._hidden = _HiddenStates(network, sorted({number for term in made for number in term.hidden}))

    def __call__(
        self,
        network: Callable[..., Tensor],
        path: NoisePath,
        batch: NoisyImages,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> dict[str, Tensor]:
        """Return the losses of each image, (B,) each, fp32: `loss` is the sum, and if there is more than the main term,
        `loss/NAME` is each term before it is weighted. `network` is the engine of the network that the objective was
        made for; terms with modules are computed in `autocast`."""
        forward = replace(forward_pass(network, path, batch, self._drop), hidden=self._hidden.take())
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        for name, (weight, term) in self._terms.items():
            with autocast() if term.modules is not None else nullcontext():
                loss = term(forward, batch, path)
            parts[f"loss/{name}"] = loss.detach()
            weighted = loss if weight == 1 else weight * loss
            total = weighted if total is None else total + weighted
        assert total is not None  # there is a term
        return {"loss": total} if self._terms.keys() == {MAIN} else {"loss": total, **parts}


class _HiddenStates:
    """Keep the outputs of some blocks of a network in forward passes that compute gradients."""

    def __init__(self, network: nn.Module, blocks: Iterable[int]) -> None:
        self._found: dict[int, Tensor] = {}
        modules = list(network.get_submodule("blocks").children())
        for number in blocks:
            modules[number].register_forward_hook(self._keep(number))

    def _keep(self, number: int) -> Callable[..., None]:
        found = self._found

        def hook(block: nn.Module, inputs: object, output: Tensor) -> None:
            if torch.is_grad_enabled():  # not while sampling
                found[number] = output

        return hook

    def take(self) -> dict[int, Tensor]:
        """Return the outputs of the last pass, and keep no reference to them."""
        taken = dict(self._found)
        self._found.clear()
        return taken


def make_objective(
    losses: Mapping[str, TermConfig], network: nn.Module, extra: Mapping[str, tuple[int, ...]], seed: int
) -> Objective:
    """Return the objective of a run, given the `loss` of its config, its network before it is distributed over the
    ranks, and the shapes of the extra tensors that its images declare. Raise ValueError (`NAME...: what is wrong`) if a
    term does not fit these, or if no term has a weight."""
    terms = {
        name: (config.weight, _make_term(name, config, network, extra, seed))
        for name, config in losses.items()
        if config.weight
    }
    if not terms:
        raise ValueError("denoising.weight=0: no other term has a weight; set one above 0")
    return Objective(terms, network)


def _make_term(
    name: str, config: TermConfig, network: nn.Module, extra: Mapping[str, tuple[int, ...]], seed: int
) -> Term:
    _check_extra(name, TERMS[name].extra, extra)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{name} {seed}".encode()))  # its own random stream: the network uses the seed's
        try:
            term = TERMS[name](config, network, extra)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    _check_extra(name, term.extra, extra)
    blocks = len(list(network.get_submodule("blocks").children()))
    for number in term.hidden:
        if not 0 <= number < blocks:
            raise ValueError(f"{name}: asks for block {number}; blocks are 0 to {blocks - 1}")
    return term


def _check_extra(name: str, wanted: tuple[str, ...], extra: Mapping[str, tuple[int, ...]]) -> None:
    for each in wanted:
        if each not in extra:
            found = f"they have {', '.join(extra)}" if extra else "they have none"
            raise ValueError(f"{name}: needs {each} of each image, which the images do not offer; {found}")
