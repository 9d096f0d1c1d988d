"""Runs the project's CUDA kernels without a GPU: `csrc/<family>.cu` compiled by g++ with `csrc/emulator/`.

    swiglu = emulated.load("swiglu")                    # torch.ops.headrace_emulated_<digest>, for CPU tensors
    hidden = swiglu.ops.swiglu_forward(gate_up)         # ran the CUDA kernel, one fiber for each thread
    hidden = emulated.under_every_schedule(swiglu, lambda: swiglu.ops.swiglu_forward(gate_up))

`load` compiles kernels and binding into a library of their own, once for each content of their sources: the library is
kept in `build/tests/` under a digest of all that goes into it, so tests of one run, and runs after each other, share
it. Results under all schedules must agree bit for bit, or a barrier is missing. What is undefined on a GPU, such as a
barrier that not all threads reach, raises RuntimeError with block and source line.
"""

import contextlib
import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from built_once import CACHE, built_once, digest, run

CSRC = Path(__file__).parents[2] / "csrc"
EMULATOR = CSRC / "emulator"
SCHEDULES = ("forward", "reverse", "random", "warp_greedy", "greedy_reverse")
"""In the order of `enum class Schedule` in csrc/emulator/block.h."""
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror")
# What nvcc knows and g++ does not (#pragma unroll); functions for CPU tensors, which an emulated library leaves out.
QUIET = ("-Wno-unknown-pragmas", "-Wno-unused-function")
CANARY = 777.0


def cuda_headers() -> Path | None:
    """The folder with CUDA's headers, which g++ can read; None where there is no CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    folders = [Path(home, "include") for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def missing() -> str:
    """Why nothing can be emulated here; "" when it can."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_headers() is None:
        return "no CUDA headers (cuda_bf16.h); set CUDA_HOME"
    return ""


needs_emulator = pytest.mark.skipif(bool(missing()), reason=f"emulator: {missing()}")


@dataclass(frozen=True)
class Emulated:
    """A family of operators whose CUDA kernels run on the CPU."""

    path: Path
    namespace: str

    @property
    def ops(self) -> Any:
        """The operators, as `torch.ops.headrace` has them; no gradients and no shape rules."""
        return getattr(torch.ops, self.namespace)

    @contextlib.contextmanager
    def schedule(self, name: str, seed: int = 0) -> Iterator[None]:
        """Within it threads take turns by this schedule, one of `SCHEDULES`; `seed` is for `random`."""
        set_schedule = ctypes.CDLL(str(self.path)).headrace_set_schedule
        set_schedule(SCHEDULES.index(name), seed)
        try:
            yield
        finally:
            set_schedule(0, 0)


@functools.cache
def load(family: str, defines: tuple[str, ...] = (), source: str | None = None, folder: Path = CSRC) -> Emulated:
    """The operators of `<family>_binding.cpp` with the kernels of `<family>.cu`, compiled for the CPU.

    Both are in `folder`. `defines` are macros for the kernels ("HEADRACE_PACKS_PER_LAUNCH=96"); `source` is compiled
    instead of the .cu file, for tests that plant a bug in it. Raises RuntimeError, with the compiler's words, if that
    fails.
    """
    kernels = _kernels(family, defines, source, folder)
    binding = folder / f"{family}_binding.cpp"
    namespace = f"headrace_emulated_{digest(str(kernels), binding.read_text(), torch.__version__)}"
    torch_root = Path(torch.__file__).parent
    macros = ("-DHEADRACE_EMULATED", "-DHEADRACE_CUDA", f"-DHEADRACE_LIBRARY={namespace}")
    stable = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_root / "include"), f"-I{folder}")
    registration = _compiled(f"{family}_binding", binding.read_text(), (*macros, *stable))
    link = ("-Wl,--no-as-needed", f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu")
    path = _linked(family, [kernels, registration, *_emulator()], link)
    torch.ops.load_library(path)
    return Emulated(path, namespace)


def launchers(
    family: str, defines: tuple[str, ...] = (), source: str | None = None, folder: Path = CSRC, asan: bool = False
) -> Path:
    """A library with the launchers of `<family>.cu` alone, for ctypes; it needs no torch, and compiles faster.

    A launcher that returns 719 (cudaErrorLaunchFailure) leaves its reason in `headrace_failure()`. With `asan` it is
    compiled for AddressSanitizer, whose library must then be loaded before all others (LD_PRELOAD).
    """
    extra = ("-fsanitize=address", "-fno-omit-frame-pointer") if asan else ()
    kernels = _kernels(family, defines, source, folder, (*extra, "-fvisibility=default"))
    return _linked(f"{family}_launchers", [kernels, *_emulator(extra)], extra)


def _kernels(
    family: str, defines: tuple[str, ...], source: str | None, folder: Path, extra: tuple[str, ...] = ()
) -> Path:
    text = (folder / f"{family}.cu").read_text() if source is None else source
    return _compiled("kernels", text, (f"-I{folder}", *extra, *(f"-D{define}" for define in defines)))


def _emulator(extra: tuple[str, ...] = ()) -> list[Path]:
    return [_compiled(path.stem, path.read_text(), extra) for path in sorted(EMULATOR.glob("*.cpp"))]


def _compiled(name: str, text: str, flags: tuple[str, ...]) -> Path:
    """`<name>.o` made of `text`, a C++ or CUDA source, in a folder of its own under `CACHE`."""
    headers = [*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *EMULATOR.glob("*.h"), *Path(__file__).parent.glob("*.h")]
    words = [path.read_text() for path in sorted(headers)] if name not in ("fiber", "block") else []
    emulator = [path.read_text() for path in sorted(EMULATOR.glob("*.h"))]
    path = CACHE / digest(name, text, flags, FLAGS, QUIET, words, emulator) / f"{name}.o"
    with built_once(path) as target:
        if target is not None:
            source = target.with_name(f"{name}.cu" if name == "kernels" else f"{name}.cpp")
            source.write_text(text)
            includes = ("-I", str(CSRC), "-I", str(EMULATOR), "-isystem", str(cuda_headers()))
            run(["g++", *FLAGS, *QUIET, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)])
    return path


def _linked(name: str, objects: list[Path], flags: tuple[str, ...]) -> Path:
    script = EMULATOR / "shared.ld"
    path = CACHE / f"{name}-{digest(*map(str, objects), flags, script.read_text())}.so"
    with built_once(path) as target:
        if target is not None:
            files = [str(each) for each in objects]
            run(["g++", "-shared", *files, f"-Wl,-T,{script}", "-Wl,-z,defs", *flags, "-o", str(target)])
    return path


def under_every_schedule(emulated: Emulated, call: Callable[[], Any], seeds: int = 3) -> Any:
    """What `call` returns (a tensor, or a tuple, list or dict of some); AssertionError if a schedule changes one bit.

    `call` must compute from copies of what it changes in place.
    """
    with emulated.schedule("forward"):
        first = call()
    for name, seed in [*((name, 0) for name in SCHEDULES[1:]), *(("random", seed) for seed in range(1, seeds))]:
        with emulated.schedule(name, seed):
            again = call()
        for where, (one, other) in enumerate(zip(_tensors(first), _tensors(again), strict=True)):
            same = torch.equal(_bits(one), _bits(other))
            assert same, f"result {where} under schedule {name} (seed {seed}) differs from schedule forward"
    return first


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    return [] if result is None else [tensor for each in result for tensor in _tensors(each)]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN of the same bits."""
    return tensor.detach().contiguous().view(torch.uint8) if tensor.numel() else tensor


def guarded(shape: tuple[int, ...] | list[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """A contiguous tensor of NaN (of -1 for integers) that begins `offset` numbers past a 16-byte boundary, between
    canaries; see `check_canaries`."""
    numbers, per_pack = torch.Size(shape).numel(), max(1, 16 // dtype.itemsize)
    buffer = torch.full((numbers + 64 + 2 * per_pack,), CANARY if dtype.is_floating_point else 77, dtype=dtype)
    start = (-(buffer.data_ptr() // dtype.itemsize)) % per_pack + 32 + offset
    inner = buffer[start : start + numbers]
    inner.fill_(float("nan") if dtype.is_floating_point else -1)
    return inner.view(shape)


def check_canaries(*tensors: torch.Tensor) -> None:
    """AssertionError if something was written around a tensor that `guarded` made."""
    for tensor in tensors:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        canary = CANARY if tensor.dtype.is_floating_point else 77
        start = tensor.storage_offset()
        before, after = whole[:start], whole[start + tensor.numel() :]
        assert bool((before == canary).all()), "written before the beginning of a tensor"
        assert bool((after == canary).all()), "written past the end of a tensor"
