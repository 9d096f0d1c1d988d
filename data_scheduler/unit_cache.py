"""The units read last: parts of one unit belong to many lanes, and each would read it again."""

from collections import OrderedDict
from collections.abc import Callable

from data_scheduler.formats.records import Records, Unit


class UnitCache:
    """The last units read, up to `budget` bytes of text: parts of one unit are read by many lanes."""

    def __init__(self, budget: int = 256 << 20) -> None:
        self._budget = budget
        self._held = 0
        self._records: OrderedDict[tuple[str, Unit], Records] = OrderedDict()

    def get(self, source: str, unit: Unit, read: Callable[[], Records]) -> tuple[Records, bool]:
        """The unit's records, and whether they had to be read."""
        key = (source, unit)
        if key in self._records:
            self._records.move_to_end(key)
            return self._records[key], False
        records = read()
        self._records[key] = records
        self._held += records.size
        while self._held > self._budget and len(self._records) > 1:
            _, dropped = self._records.popitem(last=False)
            self._held -= dropped.size
        return records, True
