"""The packers by name."""

from collections.abc import Callable

from data_scheduler.best_fit import BestFitPacker
from data_scheduler.lane import LaneStream
from data_scheduler.packing import Carry, Packer, SplitPacker

PACKERS: dict[str, Callable[[LaneStream, Carry], Packer]] = {"split": SplitPacker, "best_fit": BestFitPacker}
