"""What nvcc makes of every kernel in csrc/, held against rules that decide its speed. No GPU is needed.

The rules, for every instance of every kernel on sm_80 and sm_90; `gates.toml` lists the exceptions with their reasons:

* no warning, no stack frame, no spilled register;
* at most 64 registers, so that an SM holds 1,024 threads (`registers`);
* at least one load of 16 bytes from global memory, and of none less than 4 (`narrow_loads`);
* no generic load, store or atomic, whose address could be in any memory (`generic`).

An exception for a kernel that is not there, or that keeps the rule, fails too.
"""

import re
import shutil
import tomllib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import machine_code
import pytest
from machine_code import CSRC, Compiled

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))
EXCEPTIONS: dict[str, dict[str, dict[str, Any]]] = tomllib.loads((Path(__file__).parent / "gates.toml").read_text())
MOST_REGISTERS = 64
STATE_SPACES = ("global", "shared", "local", "param", "const")


def width(instruction: str) -> int:
    """Bytes of a PTX load: 16 for ld.global.nc.v4.f32."""
    parts = instruction.split(".")
    vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
    return vector * int(re.sub(r"\D", "", parts[-1])) // 8


def loads(kernel: Compiled) -> list[int]:
    """Bytes of each kind of load from global memory."""
    return [width(name) for name in kernel.ptx if name.startswith("ld.global")]


def narrow(kernel: Compiled) -> bool:
    sizes = loads(kernel)
    return max(sizes, default=0) < 16 or min(sizes) < 4


def generic(kernel: Compiled) -> bool:
    return any(not set(name.split(".")) & set(STATE_SPACES) for name in kernel.ptx)


RULES: dict[str, Callable[[Compiled], bool]] = {
    "registers": lambda kernel: kernel.registers > MOST_REGISTERS,
    "narrow_loads": narrow,
    "generic": generic,
}
"""Name in gates.toml → whether a kernel breaks the rule."""


def exceptions(kernel: Compiled) -> dict[str, Any]:
    """Rule → reason, of all entries that name this kernel."""
    listed = EXCEPTIONS.get(kernel.source, {})
    return {
        rule: why for name, rules in listed.items() if fnmatchcase(kernel.name, name) for rule, why in rules.items()
    }


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_keeps_the_rules(source: str) -> None:
    kernels = machine_code.compiled(CSRC / source)
    assert {kernel.arch for kernel in kernels} == set(machine_code.ARCHITECTURES)
    broken = []
    for kernel in kernels:
        where = f"{source} {kernel.name} on sm_{kernel.arch}: {kernel.registers} registers, {kernel.ptx}"
        assert (kernel.stack, kernel.spills) == (0, 0), where
        assert not any("local" in name.split(".") for name in kernel.ptx), where
        allowed = exceptions(kernel)
        broken += [f"{rule}: {where}" for rule, breaks in RULES.items() if breaks(kernel) and rule not in allowed]
        if "registers" in allowed:
            assert kernel.registers <= allowed["registers"]["most"], where
    assert not broken, "\n".join(broken)


@needs_nvcc
@pytest.mark.parametrize("source", sorted(EXCEPTIONS))
def test_every_exception_is_needed_and_has_a_reason(source: str) -> None:
    assert source in SOURCES, f"gates.toml has exceptions for {source}, which is not there"
    kernels = machine_code.compiled(CSRC / source)
    for name, rules in EXCEPTIONS[source].items():
        named = [kernel for kernel in kernels if fnmatchcase(kernel.name, name)]
        assert named, f"gates.toml: {source} has no kernel {name}; it has {sorted({each.name for each in kernels})}"
        for rule, why in rules.items():
            assert rule in RULES, f"gates.toml: {rule} is none of {', '.join(RULES)}"
            assert any(RULES[rule](kernel) for kernel in named), f"gates.toml: {source} {name} keeps the rule {rule}"
            reason = why["reason"] if rule == "registers" else why
            assert len(reason.split()) > 3, f"gates.toml: {source} {name} {rule}: say why"


@needs_nvcc
@pytest.mark.skipif(machine_code.sass_tool() is None, reason="no nvdisasm: not in the CUDA toolkit, and no triton")
@pytest.mark.parametrize("source", SOURCES)
def test_the_machine_code_is_what_ptx_promised(source: str) -> None:
    """ptxas splits no wide load, and adds no generic or local access."""
    for kernel in machine_code.compiled(CSRC / source):
        assert kernel.sass is not None
        where = f"{source} {kernel.name} on sm_{kernel.arch}: {kernel.sass}"
        kinds = {name.split(".")[0] for name in kernel.sass}
        assert not kinds & {"LDL", "STL"}, where
        if not generic(kernel):
            assert not kinds & {"LD", "ST", "ATOM"}, where
        if 16 in loads(kernel):
            assert any(name.startswith("LDG") and ".128" in name for name in kernel.sass), where


@needs_nvcc
def test_kernels_that_break_the_rules_are_seen() -> None:
    found = {kernel.name: kernel for kernel in machine_code.compiled(Path(__file__).parent / "gate_bugs.cu")}
    assert {name for name, kernel in found.items() if kernel.stack} == {"stack_frame"}
    assert {name for name, kernel in found.items() if generic(kernel)} == {"generic_access"}
    assert {name for name, kernel in found.items() if RULES["registers"](kernel)} == {"many_registers"}
    assert not narrow(found["wide"])
    assert narrow(found["narrow"])
    assert width("ld.global.nc.v4.u32") == 16
    assert width("ld.global.u16") == 2
