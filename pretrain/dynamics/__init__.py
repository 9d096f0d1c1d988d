"""What goes on inside the model: numbers by layer that show trouble before the loss does.

In: a training step that is to be measured (`metrics.dynamics.every`). Out: part of its record, the same numbers under
every layout, layers counted from 0 over the whole model:

    {"max_attention_logit": {"0": 6.1, "1": 9.8}, "query_norm": {"0": 3.9, "1": 4.4}, "output_logit_mean": -0.2,
     "gradient_rms": {"0": 2e-5, "1": 1e-5, "embedding": 3e-6, ...}, "noise_scale": 81920.0, ...}

A step that is not measured has no hook installed and does nothing more than before. A measured one looks at

    attention.py     queries and keys of every block: the largest logit, norms
    activations.py   forward passes: what blocks and the output layer give
    weights.py       the update: weights, gradients before clipping, the difference that the optimizer made
    noise_scale.py   backward passes: how much the micro-batches' gradients differ

and adds all up over ranks once, at its end. Open `measurement.py` first: it ties them together.
"""

from pretrain.dynamics.measurement import Dynamics, Measurement
from pretrain.dynamics.noise_scale import NoiseScale

__all__ = ["Dynamics", "Measurement", "NoiseScale"]
