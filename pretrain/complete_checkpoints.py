"""Which complete checkpoints a run folder holds, by the names of their folders; loads no torch."""

from pathlib import Path


def complete_steps(run_dir: str | Path) -> list[int]:
    """Steps with a complete checkpoint, ascending."""
    found = (Path(run_dir) / "checkpoints").glob("step-*")
    names = (path.name.removeprefix("step-") for path in found if (path / "meta.json").is_file())
    return sorted(int(name) for name in names if name.isdecimal())
