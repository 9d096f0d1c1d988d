"""Builds what is compiled: `csrc/` to the kernels in `parallel/kernels/_C.abi3.so`, and `csrc/loader/` to the inner
loops of the data scheduler in `data_scheduler/_sequences.abi3.so`. Other metadata is in pyproject.toml.

The loops need a C compiler and Python's headers, nothing else; without them the data scheduler uses numpy.

The kernels use torch's stable ABI only: one file serves torch 2.11 and newer, with and without CUDA, and every Python.

* CPU operators: whenever the Python that builds can import torch, and a C++ compiler is there; 5 s of compiling.
  `pip install .` builds in an empty environment, where there is no torch: use `pip install --no-build-isolation .`
* CUDA operators: when nvcc is there and torch is a CUDA build. A torch for CPUs could not call them, and nvcc takes
  seconds for each file and architecture, which laptops and CI need not wait for. `HEADRACE_CUDA=1` builds them anyway
  (nvcc is needed, a GPU is not), `HEADRACE_CUDA=0` never. `HEADRACE_CUDA_ARCHS="9.0"` names the GPUs; if it is not
  given they are "8.0;9.0;10.0", as far as nvcc knows them.

Where they cannot be built the package installs all the same and computes with torch; `headrace doctor` says so.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LOOPS = "data_scheduler._sequences"
CSRC = Path("csrc")  # setuptools wants paths relative to this file
HEADERS = sorted(map(str, [*CSRC.glob("*.h"), *CSRC.glob("*.cuh")]))
OLDEST_TORCH = (2, 11)
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, as torch's headers spell it
# The last two let the compiler turn `a > b ? a : b` into vector instructions; results stay IEEE's.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
DEFAULT_ARCHS = "8.0;9.0;10.0"


class BuildExtensions(build_ext):
    """Compiles the .cu files with nvcc first; a failure costs what is compiled, not the installation."""

    def build_extension(self, extension):
        if extension.name == LOOPS:
            try:
                super().build_extension(extension)
            except Exception as error:
                say(f"the loops of csrc/loader/ could not be built, so the data scheduler uses numpy: {error}")
                raise CompileError(str(error)) from error
            return
        if nvcc is not None:
            try:
                self._add_cuda(extension)
            except (OSError, subprocess.CalledProcessError) as error:
                if forced:
                    raise
                say(f"the CUDA kernels could not be built, so on GPUs torch's are used: {error}")
        built_for = Path(self.build_temp, "kernels.txt")
        wanted = repr((extension.define_macros, extension.extra_objects))
        if not (built_for.exists() and built_for.read_text() == wanted):
            self.force = True  # compiled with or without CUDA before, which changes none of the files looked at
        try:
            super().build_extension(extension)
            built_for.parent.mkdir(parents=True, exist_ok=True)
            built_for.write_text(wanted)
        except Exception as error:  # setuptools' compilers raise what is in no public family
            say(f"the kernels of csrc/ could not be built, so torch's are used: {error}")
            raise CompileError(str(error)) from error  # goes no further when the extension is optional

    def _add_cuda(self, extension):
        home = nvcc.parents[1]
        folder = Path(self.build_temp, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", *architecture_flags()]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(
                pool.map(lambda source: self._compile_cuda(source, folder, flags), sorted(CSRC.glob("*.cu")))
            )
        runtime = next(iter(sorted(home.glob("lib*/libcudart_static.a"))), None)
        if runtime is None:
            raise FileNotFoundError(f"no libcudart_static.a in {home}/lib64")
        extension.extra_objects += objects
        extension.define_macros.append(("HEADRACE_CUDA", None))
        extension.include_dirs.append(str(home / "include"))
        extension.extra_link_args += [f"-L{runtime.parent}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    def _compile_cuda(self, source, folder, flags):
        """The object file of a .cu file; the one that is there if nothing it was made of has changed."""
        compiled, recipe = folder / f"{source.stem}.o", folder / f"{source.stem}.txt"
        command = [str(nvcc), *flags, "-c", str(source), "-o", str(compiled)]
        inputs = [*map(Path, HEADERS), source]
        made_of = hashlib.sha256(repr((command, [path.read_bytes() for path in inputs])).encode()).hexdigest()
        if not (compiled.exists() and recipe.exists() and recipe.read_text() == made_of):
            self.announce(" ".join(command), level=2)
            subprocess.check_call(command)
            recipe.write_text(made_of)
        return str(compiled)


def say(line):
    """One line for the person who installs (pip shows it with -v). Returns None, so that a search can end with it."""
    print(f"headrace: {line}", file=sys.stderr)


def architecture_flags():
    """Machine code for every architecture asked for, and PTX of the newest for GPUs that come after it."""
    asked = os.environ.get("HEADRACE_CUDA_ARCHS")
    known = re.findall(r"sm_(\d+)", subprocess.check_output([str(nvcc), "--list-gpu-code"], text=True))
    numbers = [arch.strip().replace(".", "") for arch in (asked or DEFAULT_ARCHS).split(";") if arch.strip()]
    unknown = [number for number in numbers if number not in known]
    if asked and unknown:
        raise SystemExit(
            f"HEADRACE_CUDA_ARCHS={asked}: {nvcc} does not know sm_{unknown[0]}; it knows {', '.join(known)}"
        )
    numbers = sorted((number for number in numbers if number in known), key=int)
    if not numbers:
        raise SystemExit(f"HEADRACE_CUDA_ARCHS={asked or DEFAULT_ARCHS}: nothing there that {nvcc} can build for")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*codes, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def find_torch():
    """torch, or None with a line that says why the kernels are not built."""
    if sys.platform != "linux":
        return say("kernels of csrc/ are built on Linux only, torch's are used instead")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and shutil.which("g++") is None:
        return say("no C++ compiler, so torch's kernels are used; install g++ for those of csrc/")
    try:
        import torch
    except Exception as error:  # also a torch that is there and broken
        return say(
            f"torch cannot be imported here ({error}), so its kernels will be used; "
            "for those of csrc/: pip install --no-build-isolation ."
        )
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        return say(f"torch {torch.__version__} is too old for the kernels of csrc/, which need 2.11")
    return torch


def find_nvcc(torch):
    """The nvcc to build CUDA operators with, or None for a library with CPU operators only."""
    wanted = os.environ.get("HEADRACE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"HEADRACE_CUDA={wanted}: it is 0 or 1")
    if wanted == "0" or (wanted == "" and torch.version.cuda is None):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in [*homes, "/usr/local/cuda"]]
    if on_path:
        candidates.insert(len(homes), Path(on_path).resolve())
    for candidate in candidates:
        # A wrapper script on the PATH has no include folder beside it.
        if candidate.exists() and (candidate.parents[1] / "include" / "cuda_runtime.h").exists():
            return candidate
    if forced:
        raise SystemExit("HEADRACE_CUDA=1, but there is no nvcc; set CUDA_HOME to the CUDA toolkit")
    return say("torch is a CUDA build but there is no nvcc, so on GPUs torch's kernels are used; set CUDA_HOME")


def kernels(torch):
    root = Path(torch.__file__).parent
    return Extension(
        "parallel.kernels._C",
        sources=sorted(map(str, CSRC.glob("*.cpp"))),
        depends=["setup.py", *HEADERS, *map(str, CSRC.glob("*.cu"))],
        language="c++",
        py_limited_api=True,
        optional=not forced,
        extra_compile_args=[*CXX_FLAGS, TARGET_VERSION, "-isystem", str(root / "include")],
        # torch is loaded before this library, so its libraries are found without a path; they must be named all the
        # same, since `libtorch` is what brings CUDA's part into scope.
        extra_link_args=[f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"],
    )


def loops():
    return Extension(
        LOOPS,
        sources=[str(CSRC / "loader" / "sequences.c")],
        depends=["setup.py"],
        define_macros=[("Py_LIMITED_API", "0x030b0000")],
        py_limited_api=True,
        optional=True,
        extra_compile_args=["-std=c11", "-O3", "-g0", "-fvisibility=hidden"] if sys.platform != "win32" else [],
    )


forced = os.environ.get("HEADRACE_CUDA") == "1"
torch = find_torch()
if torch is None and forced:
    raise SystemExit("HEADRACE_CUDA=1, but the kernels cannot be built; see the line above")
nvcc = find_nvcc(torch) if torch else None
setup(
    ext_modules=[loops(), *([kernels(torch)] if torch else [])],
    cmdclass={"build_ext": BuildExtensions},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
