"""What can be known to be wrong before any process starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.errors import LayoutError
from launch.request import SlurmRequest
from launch.site import Site
from pretrain.config import RunConfig, load_config
from pretrain.layouts import layouts_ahead
from pretrain.models.vocabulary import padded_vocab_size


def checked_config(path: str | Path, overrides: Sequence[str], world_size: int) -> RunConfig:
    """The configuration, held against a layout of `world_size` processes; raises ConfigError, LayoutError."""
    config = load_config(path, overrides)
    check_layout(config, world_size)
    return config


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raises LayoutError when the run does not fit `world_size` processes."""
    # A vocabulary that comes with the tokenizer is padded later; it is not this check's business.
    layouts_ahead(config, world_size, padded_vocab_size(config, 1))


def usable_node_counts(config: RunConfig, fewest: int, most: int, processes_per_node: int) -> list[int]:
    """Numbers of nodes, from `fewest` to `most`, on which the layout works: 3 nodes do not divide a batch of 8."""
    found = []
    for count in range(fewest, most + 1):
        try:
            check_layout(config, count * processes_per_node)
        except LayoutError:
            continue
        found.append(count)
    return found


def checks_of(configs: Sequence[RunConfig], request: SlurmRequest, site: Site, run_dir: Path) -> dict[str, Any]:
    """What `node_check.py` is to look at on every node, and what `nodes.py` holds its answers against."""
    data = [config.data for config in configs]
    paths = [str(each.tokenizer) for each in data]
    paths += [path for each in data for source in each.sources for path in (*source.paths, *source.val_paths)]
    local = [str(Path(path).absolute()) for path in dict.fromkeys(paths) if "://" not in path]
    return {
        "gpus": request.gpus_per_node,
        "read": local,
        "write": [str(run_dir)],
        **site.preflight.model_dump(include={"min_free_gb", "max_clock_skew_s", "min_allreduce_gb_per_s", "commands"}),
    }
