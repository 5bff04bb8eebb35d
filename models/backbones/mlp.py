"""MLPs of a block: classes constructed from (width, hidden width) that map tokens (B, L, width) to that shape."""

import torch.nn.functional as F
from torch import Tensor, nn


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
    """Shazeer's gated layers (arXiv 2002.05202) of width 2/3 `hidden`: as many weights as ungated ones of `hidden`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = int(hidden * 2 / 3)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


MLPS: dict[str, type[nn.Module]] = {"gelu": Mlp, "swiglu": SwiGLU}
