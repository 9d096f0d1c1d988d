"""The one door to the device: the only file in the tree that knows whether there is a GPU.

With CUDA this is a thin front of `torch.cuda`. Without it, `install()` makes megatron-core 0.16 run unchanged on CPU
and gloo: megatron needs CUDA for device placement only, in six kinds of call sites (67 lines of 23 files in the runs
we measured), and each kind is redirected below, for callers inside `megatron.core` only. The redirection is refused
where CUDA exists, so a GPU run never sees it.
"""

import contextlib
import functools
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")
_installed = False


def has_gpu() -> bool:
    """True when this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This process's device; on a GPU machine the one that `LOCAL_RANK` names."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu() else CPU


def backend() -> Literal["nccl", "gloo"]:
    """The collective library that belongs to the device."""
    return "nccl" if has_gpu() else "gloo"


def manual_seed(seed: int) -> None:
    """Seed torch's generators of every device of this process."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """States of torch's generators, by device kind; uint8 tensors on the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if has_gpu():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` returned; a state of a device that is not here is left out."""
    torch.set_rng_state(state["cpu"])
    if has_gpu() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def set_deterministic(wanted: bool) -> None:
    """Allow only operators that give the same bits every time, or (False) all again; before the first collective.

    torch then takes an operator's deterministic form, and raises RuntimeError, see `is_nondeterministic`, where there
    is none. cuBLAS needs its workspace fixed for that, NCCL its order of addition; both read the environment once.
    """
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")


def is_deterministic() -> bool:
    """Whether `set_deterministic` is on."""
    return torch.are_deterministic_algorithms_enabled()


def is_nondeterministic(error: BaseException) -> bool:
    """Whether `error` is torch's refusal of an operator that has no deterministic form."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)


def synchronize() -> None:
    """Wait until the device has finished all work given to it; at once on CPU."""
    if has_gpu():
        torch.cuda.synchronize()


def max_memory_allocated() -> int:
    """Peak bytes allocated on the device, or this process's peak resident bytes on CPU."""
    if has_gpu():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe() -> dict[str, str]:
    """What this process computes with, for people: device, backend, memory, threads."""
    if has_gpu():
        properties = torch.cuda.get_device_properties(device())
        return {
            "device": f"{torch.cuda.device_count()} × {properties.name}",
            "backend": "nccl",
            "memory": f"{properties.total_memory / 2**30:.0f} GiB each",
            "capability": f"sm_{properties.major}{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    return {
        "device": f"cpu ({platform.processor() or platform.machine()})",
        "backend": "gloo",
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def install() -> None:
    """Make the device ready for megatron-core; must run before its first import, and does nothing a second time.

    On a GPU: select the device. Without one: redirect megatron's CUDA calls to the CPU. `parallel.engine` calls this.
    """
    global _installed
    if _installed:
        return
    if has_gpu():
        torch.cuda.set_device(device())
    else:
        assert "megatron.core" not in sys.modules, "import megatron-core through parallel.engine, which comes first"
        _redirect_cuda_namespace()
        _redirect_tensor_placement()
    _installed = True


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """Without a GPU, keep megatron's module-level `jit_fuser = torch.compile` from compiling: it costs 15 to 30 s of
    g++ at the first step and gained 3 % in fp32."""
    if has_gpu():
        yield
        return
    compile_ = torch.compile
    torch.compile = _no_compile  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def after_megatron_import() -> None:
    """The last part of the door: megatron's "cuda" RNG state is the CPU generator's, and token counts of experts that
    are on the CPU already become what all_to_all takes."""
    if has_gpu():
        return
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = counts

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # "CPU RNG state changed within GPU RNG context": they are the same generator here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _no_compile(function: Any = None, **_: Any) -> Any:
    return function if function is not None else (lambda inner: inner)


def _called_by_megatron() -> bool:
    """Whether the function that called our wrapper is megatron's."""
    return bool(sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core"))


class _Null:
    """Stands in for streams and events, which have no meaning on a CPU."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Null"]:
        return lambda *args, **kwargs: _Null()


def _redirect_cuda_namespace() -> None:
    """`torch.cuda` functions that megatron calls unconditionally. One function object per name: dynamo's table of
    rules rejects two names for the same object."""
    if has_gpu():
        raise RuntimeError("the CPU door must not be installed where CUDA exists")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU  # megatron only ever passes it on as device=
    cuda.device_count = lambda: int(_called_by_megatron())  # the asynchronous checkpoint worker does rank % count
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.Stream = type("Stream", (_Null,), {})
    cuda.Event = type("Event", (_Null,), {})
    cuda.current_stream = lambda *args, **kwargs: _Null()
    cuda.default_stream = lambda *args, **kwargs: _Null()
    cuda.stream = lambda stream: contextlib.nullcontext()


def _redirect_tensor_placement() -> None:
    """Hard-coded device="cuda", `.cuda()`, pinned memory and comparisons with type names, inside megatron only."""
    _device_constructors()  # cached with the original functions, or `with torch.device("meta")` stops seeing them
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu_for_megatron(getattr(torch, name)))
    tensor: Any = torch.Tensor
    move, type_name = tensor.cuda, tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved: torch.Tensor = self if _called_by_megatron() else move(self, *args, **kwargs)
        return moved

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron's optimizers test `param.type() == "torch.cuda.FloatTensor"`
        result = type_name(self, *args, **kwargs)
        is_name = isinstance(result, str) and _called_by_megatron()
        return result.replace("torch.", "torch.cuda.", 1) if is_name else result

    tensor.cuda = cuda
    tensor.type = type_


def _on_cpu_for_megatron(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        asks_for_cuda = str(kwargs.get("device", "")).startswith("cuda") or kwargs.get("pin_memory")
        if asks_for_cuda and _called_by_megatron():
            kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return wrapper
