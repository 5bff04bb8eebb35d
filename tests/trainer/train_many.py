"""One rank of several runs, one after another in one process: `train_many.py CONFIG OVERRIDES PORTS`, lists in JSON."""

import json
import os
import sys

from trainer.config import load_config
from trainer.errors import RunError
from trainer.loop import train

if __name__ == "__main__":
    config, runs, ports = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    for overrides, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            train(load_config(config, overrides))
        except RunError as error:
            sys.exit(f"error: {error}")
