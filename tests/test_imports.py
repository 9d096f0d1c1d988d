"""Import rules that import-linter cannot state: it knows packages, not parts of other people's."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FORBIDDEN = {
    "data_scheduler": ("torch.distributed", "megatron"),  # usable alone
    "pretrain": ("torch.distributed", "megatron"),  # process groups belong to `parallel`
    "launch": ("torch", "megatron"),  # runs on login nodes
}
ALLOWED = {
    "pretrain/loss.py": ("torch.distributed",),  # the vocabulary-parallel loss is a collective
    "pretrain/checkpoint.py": ("torch.distributed.checkpoint",),  # the file format, no processes
    "pretrain/checkpoint_saving.py": ("torch.distributed.checkpoint",),
    "pretrain/convert/native.py": ("torch.distributed.checkpoint",),
    "pretrain/convert/stored_metadata.py": ("torch.distributed.checkpoint",),
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_keep_to_their_side(package: str) -> None:
    for path in sorted(Path(package).rglob("*.py")):
        allowed = ALLOWED.get(str(path), ())
        for name in imports(path):
            if any(name == good or name.startswith(good + ".") for good in allowed):
                continue
            bad = [root for root in FORBIDDEN[package] if name == root or name.startswith(root + ".")]
            assert not bad, f"{path} imports {name}"


def test_only_the_accelerator_says_cuda() -> None:
    for package in ("data_scheduler", "parallel", "pretrain", "launch"):
        for path in sorted(Path(package).rglob("*.py")):
            if path != Path("parallel/accelerator.py"):
                assert "torch.cuda" not in path.read_text(), path


def test_a_dry_run_starts_without_torch() -> None:
    loaded = "import sys, pretrain.dry_run; sys.exit('torch' in sys.modules or 'megatron.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], check=True)
