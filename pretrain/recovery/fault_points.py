"""Named places at which a test can make a process die, hang or fail; free when nobody asked.

    HEADRACE_FAULT="checkpoint: shards written=kill@rank1,hit2" headrace train …

`reach("checkpoint: shards written")` then kills rank 1 with SIGKILL the second time it gets there. What can happen:
`kill` (SIGKILL), `term` (SIGTERM to itself), `stop` (SIGSTOP: a rank that hangs), `full` (OSError: no space left),
`readonly` (OSError: a file system that may not be written to any more), `ioerror` (OSError: storage that fails just
now), `raise` (RuntimeError). Without `@rank…` every rank, without `hit…` the first time.

The points, in the order in which a step and a save meet them, are `POINTS`; tests/pretrain/recovery kills at each. The
variable is read once, at import; a name that is no point is an error.
"""

import errno
import os
import re
import signal
from dataclasses import dataclass

from headrace.errors import ConfigError

VARIABLE = "HEADRACE_FAULT"
POINTS = (
    "run: resumed",
    "step: before the batch",
    "step: batch at hand",
    "step: before the update",
    "step: after the update",
    "step: recorded",
    "checkpoint: begun",
    "checkpoint: state copied",
    "checkpoint: shards written",
    "checkpoint: before its name",
    "checkpoint: has its name",
    "checkpoint: older removed",
    "checkpoint: journaled",
)
ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS, "ioerror": errno.EIO}
_SPEC = re.compile(
    r"^(?P<point>.+?)=(?P<act>kill|term|stop|full|readonly|ioerror|raise)(@rank(?P<rank>\d+))?(,hit(?P<hit>\d+))?$"
)


@dataclass
class _Fault:
    point: str
    act: str
    rank: int | None
    hits_left: int


_fault: _Fault | None = None


def ask(text: str) -> None:
    """Arrange for what `text` says, in the form of the environment variable; "" for nothing. Raises ConfigError."""
    global _fault
    match = _SPEC.match(text)
    if text and (match is None or match["point"] not in POINTS):
        form = "POINT=kill|term|stop|full|readonly|ioerror|raise[@rankN][,hitN]"
        raise ConfigError(f"{VARIABLE}={text}: want {form}, POINT one of: {'; '.join(POINTS)}")
    _fault = None
    if match is not None:
        rank = None if match["rank"] is None else int(match["rank"])
        _fault = _Fault(match["point"], match["act"], rank, int(match["hit"] or 1))


def reach(point: str) -> None:
    """This process is at `point`; whatever was asked for happens here. Raises OSError or RuntimeError when asked to."""
    if _fault is None or _fault.point != point:
        return
    if _fault.rank is not None and _fault.rank != int(os.environ.get("RANK", "0")):
        return
    _fault.hits_left -= 1
    if _fault.hits_left == 0:
        _happen(_fault.act, point)


def _happen(act: str, point: str) -> None:
    if act in ERRORS:
        raise OSError(ERRORS[act], os.strerror(ERRORS[act]))
    if act == "raise":
        raise RuntimeError(f"asked to fail at {point!r}")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}[act])


ask(os.environ.get(VARIABLE, ""))
