"""What `benchmarks/kernels.py` measures: one file for each family of operators, whose `cases()` yields `Case`s.

Open `swiglu.py` for an example. A new file is found by itself.
"""
