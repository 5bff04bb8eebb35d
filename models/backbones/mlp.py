"""MLPs of a block: classes constructed from (width, hidden width) that map tokens (B, L, width) to that shape."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.dropout import dropped


class Mlp(nn.Module):
    """Two layers with a tanh-GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """Shazeer's gated layers (arXiv 2002.05202) of width 2/3 `hidden`: as many weights as ungated ones of `hidden`.
    With `keys` of dropout (B, 2), a share `dropout` of the hidden numbers is dropped."""

    dropout: float = 0.0

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = int(hidden * 2 / 3)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        return self.w3(hidden if keys is None else dropped(hidden, self.dropout, keys))


MLPS: dict[str, type[nn.Module]] = {"gelu": Mlp, "swiglu": SwiGLU}
