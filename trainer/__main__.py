"""One rank of a run, for torchrun: `torchrun --nproc_per_node 8 -m trainer CONFIG [field=value ...]`."""

import sys

from data.errors import UserError
from trainer.config.tree import load_config
from trainer.loop import train


def main(arguments: list[str]) -> None:
    """Train with the config and overrides in `arguments`."""
    if not arguments:
        sys.exit(__doc__)
    try:
        train(load_config(arguments[0], arguments[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
