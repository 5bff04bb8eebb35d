"""The sample embedding in weights by name: Group Diffusion's networks have a row for each slot, plain ones none."""

import torch
from torch import Tensor

Weights = dict[str, Tensor]

CLASSES, SLOTS = "y_embedder.embedding_table.weight", "sample_embedder.embedding_table.weight"
CONTEXT = "in_context_posemb"  # JiT's: what is added to the class embedding in its class tokens


def fold(weights: Weights) -> Weights:
    """Return the weights of a network without a sample embedding that computes the same, up to rounding, as one whose
    sample embedding has one row: the row is added to all rows of the class embedding. JiT's class tokens have the class
    embedding but not the row, so it is taken out of what is added there."""
    folded = {name: tensor for name, tensor in weights.items() if name != SLOTS}
    folded[CLASSES] = weights[CLASSES] + weights[SLOTS]
    if CONTEXT in weights:
        folded[CONTEXT] = weights[CONTEXT] - weights[SLOTS]
    return folded


def fits(weights: Weights, own: Weights) -> bool:
    """Return whether `fit` can give these weights, otherwise of the same network, the sample embedding of `own`."""
    if SLOTS in weights and SLOTS in own:
        return weights[SLOTS].shape[1:] == own[SLOTS].shape[1:]
    return SLOTS not in weights or (CLASSES in weights and weights[SLOTS].shape == weights[CLASSES][:1].shape)


def fit(weights: Weights, own: Weights) -> Weights:
    """Return the weights with a sample embedding as long as that of `own`, a network's weights.

    Weights of plain diffusion stay the same network at every slot: without a sample embedding, the rows are zeros; a
    single row is repeated, or folded where `own` has none. Of more rows, those that both have are taken; further ones
    are `own`'s.
    """
    if SLOTS not in own:
        return fold(weights) if SLOTS in weights else weights
    table = own[SLOTS].clone()
    rows = weights.get(SLOTS, torch.zeros(1, table.shape[1]))
    table[: len(table) if len(rows) == 1 else len(rows)] = rows[: len(table)]
    return weights | {SLOTS: table}
