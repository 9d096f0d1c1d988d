"""The models: a `ModelConfig` becomes megatron-core `GPTModel` chunks on this process.

`sizes.py` counts parameters and operations without building anything; `gpt.py` builds; `initialize.py` fills in the
weights, the same for every layout; `presets.py` has the published sizes.
"""
