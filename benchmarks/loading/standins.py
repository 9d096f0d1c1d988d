"""An empty `torchvision` where none loads: mosaicml-streaming imports it for image classes that no arm uses, and the
wheel of the package index is built for CUDA and does not load beside a CPU build of torch."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def install() -> None:
    """Put the stand-ins into `sys.modules` if the real package cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        for name in names:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
            sys.modules[name].__path__ = []
        sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]  # type: ignore[attr-defined]
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
