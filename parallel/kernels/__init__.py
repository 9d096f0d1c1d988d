"""Our own kernels: operators that torch leaves on the table, each in two forms that agree.

One file for each operator, with its torch reference (any device, float64 too), the fused operator `headrace::*` of
`csrc/` with gradient and shape rule, and where it was measured to be the faster one. `extension.py` loads the library
that `setup.py` built; without it everything computes with torch.

Example: `kernels: {swiglu: auto}` in a run's config. `swiglu.choose("auto", "cpu")` looks whether the library is there,
has kernels for the device, and was measured to be faster there, and answers `("fused", "faster than torch on cpu")`;
`parallel/spec.py` then puts `swiglu.fused` into each MLP.

`available(device)` tells people what is in use and why; `headrace doctor` prints it. Open `swiglu.py` first.
"""

from typing import Literal

Choice = Literal["auto", "torch", "fused"]
Implementation = Literal["torch", "fused"]


def available(device: str) -> dict[str, str]:
    """For each operator what `auto` uses on `device` ("cpu", "cuda") and why.

    For example `{"swiglu": "fused: faster than torch on cpu"}`.
    """
    from parallel.kernels import swiglu

    return {"swiglu": ": ".join(swiglu.choose("auto", device))}
