"""One rank of several runs, one after another in one process: `train_many.py PORT CONFIG JSON-list-of-overrides`."""

import json
import os
import sys

from trainer.config import load_config
from trainer.errors import RunError
from trainer.loop import train

port, config, runs = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for number, overrides in enumerate(runs):
    os.environ["MASTER_PORT"] = str(port + number)
    try:
        train(load_config(config, overrides))
    except RunError as error:
        sys.exit(f"error: {error}")
