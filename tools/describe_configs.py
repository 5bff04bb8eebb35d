"""Write configs/README.md and the JSON schemas for editors from config fields: `python tools/describe_configs.py`."""

from pathlib import Path

from slurm.options import ClusterOptions
from trainer.config.documents import readme, schema
from trainer.config.tree import Config


def documents() -> dict[Path, str]:
    """Return the text of each file."""
    return {
        Path("configs/README.md"): readme(),
        Path("configs/schema.json"): schema(Config),
        Path("configs/cluster/schema.json"): schema(ClusterOptions, bases=False),
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
