"""What every room of the house shares: the version, the one exception family, and how configuration files are read.

The rooms are top-level packages: `data_scheduler` (what comes next), `parallel` (where it runs), `pretrain` (what a run
does), `launch` (how it gets to a cluster). This package imports none of them.
"""

from headrace.errors import CheckpointError, ConfigError, DataError, HeadraceError, LayoutError
from headrace.version import __version__

__all__ = ["CheckpointError", "ConfigError", "DataError", "HeadraceError", "LayoutError", "__version__"]
