"""Our own kernels: operators that torch leaves on the table, each in two forms that agree.

One file for each operator, with its torch reference (any device, float64 too), the fused operator `headrace::*` of
`csrc/` with gradient and shape rule, and a `Kernel` that says where it was measured to be the faster one.
`extension.py` loads the library that `setup.py` built; without it everything computes with torch.

Example: `kernels: {swiglu: auto}` in a run's config. `choice.choose(swiglu.KERNEL, "auto", "cpu")` looks whether the
library is there, has kernels for the device, and was measured to be faster there, and answers `("fused", "faster than
torch on cpu")`; `parallel/spec.py` then puts `swiglu.fused` into each MLP.

`choice.available(device)` tells people what is in use and why; `headrace doctor` prints it. Open `swiglu.py` first.
"""
