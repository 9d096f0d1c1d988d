"""What nvcc makes of a .cu file: for each kernel and architecture its registers and the loads and stores it contains.

    [found] = [each for each in compiled(CSRC / "swiglu.cu") if each.name == "forward<float, 4>" and each.arch == 90]
    found.registers                    # 18
    found.ptx["ld.global.nc.v4.f32"]   # 2

PTX is what nvcc says for a family of GPUs, SASS what ptxas makes of it for one. Both show how memory is reached; PTX
needs nvcc alone, SASS a disassembler (`sass_tool`).
"""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from built_once import CACHE, built_once, digest, run

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = (80, 90)
STRICT = ("-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror")


@dataclass(frozen=True)
class Compiled:
    """One instance of a kernel for one architecture."""

    source: str
    """`swiglu.cu`"""
    name: str
    """`forward<float, 4>`, as c++filt writes it, without namespaces and arguments."""
    arch: int
    registers: int
    stack: int
    """Bytes."""
    spills: int
    """Bytes, stores and loads."""
    ptx: dict[str, int]
    """Instruction (`ld.global.nc.v4.f32`, loads, stores and atomics only) → how often."""
    sass: dict[str, int] | None
    """The same in SASS (`LDG.E.128.CONSTANT`); None where there is no disassembler."""


def sass_tool() -> Path | None:
    """nvdisasm: of the CUDA toolkit, or the one that the package triton carries; None if there is neither."""
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    on_path, nvcc, triton = shutil.which("nvdisasm"), shutil.which("nvcc"), find_spec("triton")
    if on_path:
        return Path(on_path)
    if nvcc:
        folders.append(Path(nvcc).resolve().parent)
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / "nvdisasm" for folder in folders if (folder / "nvdisasm").exists()), None)


def compiled(source: Path) -> list[Compiled]:
    """Every kernel of `source`, for each of `ARCHITECTURES`; RuntimeError with nvcc's words for errors and warnings."""
    headers = sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *source.parent.glob("*.h")])
    content = [path.read_text() for path in (source, *headers, Path(__file__))]
    path = CACHE / f"{source.stem}-{digest(content, str(sass_tool()), shutil.which('nvcc'))}.json"
    with built_once(path) as target:
        if target is not None:
            target.write_text(json.dumps([vars(each) for each in _compile(source, target.parent)]))
    return [Compiled(**each) for each in json.loads(path.read_text())]


def _compile(source: Path, folder: Path) -> list[Compiled]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    output = ["--keep", "--keep-dir", str(folder), "-c", str(source), "-o", str(folder / "kernels.o")]
    command = ["nvcc", "-std=c++17", "-O3", "--threads", "2", *codes, *STRICT, "-I", str(CSRC), "-Xptxas", "-v"]
    said = run([*command, *output])
    entry = r"Compiling entry function '(\w+)' for 'sm_(\d+)'"
    size = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    kernels = re.findall(rf"{entry}.*?{size}.*?Used (\d+) registers", said, re.DOTALL)
    names = dict(zip((kernel[0] for kernel in kernels), _plain_names([each[0] for each in kernels]), strict=True))
    ptx = {arch: _ptx((folder / f"{source.stem}.compute_{arch}.ptx").read_text()) for arch in ARCHITECTURES}
    tool = sass_tool()
    sass = {
        arch: _sass(run([str(tool), "--print-code", str(folder / f"{source.stem}.compute_{arch}.cubin")]))
        for arch in (ARCHITECTURES if tool else ())
    }
    return [
        Compiled(
            source=source.name,
            name=names[symbol],
            arch=int(arch),
            registers=int(registers),
            stack=int(stack),
            spills=int(stores) + int(loads),
            ptx=ptx[int(arch)][symbol],
            sass=sass[int(arch)][symbol] if tool else None,
        )
        for symbol, arch, stack, stores, loads, registers in kernels
    ]


def _plain_names(symbols: list[str]) -> list[str]:
    """`forward<float, 4>` for _ZN8headrace..."""
    lines = run(["c++filt", *symbols]).splitlines()
    plain = (line.removeprefix("void ").replace("(anonymous namespace)::", "") for line in lines)
    return [_without_arguments(line.replace("headrace::", "")) for line in plain]


def _without_arguments(signature: str) -> str:
    depth = 0
    for at, letter in enumerate(signature):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return signature[:at]
    return signature


def _ptx(text: str) -> dict[str, dict[str, int]]:
    """Kernel → its loads, stores and atomics, but not those of arguments (ld.param)."""
    bodies = re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", text, re.DOTALL)
    memory = re.compile(r"^\s*(?:@!?%\w+\s+)?((?:ld|st|atom|red)\.[\w.:]+)", re.MULTILINE)
    return {
        name: dict(Counter(each for each in memory.findall(body) if not each.startswith("ld.param")))
        for name, body in bodies
    }


def _sass(text: str) -> dict[str, dict[str, int]]:
    """Kernel → its loads, stores and atomics, but not those of constants (LDC)."""
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)
    memory = re.compile(r"\b((?:LDG|STG|LDL|STL|LD|ST|LDS|STS|ATOM\w*|RED)(?:\.[\w.]+)?)\s")
    return {name: dict(Counter(memory.findall(body))) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
