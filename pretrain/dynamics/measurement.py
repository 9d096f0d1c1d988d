"""One measured step: hooks in, hooks out, and what is recorded of it."""

from collections.abc import Callable, Sequence
from typing import Any, Self

from parallel.layout import Layout
from parallel.parameter_names import is_trainable, parameter_names
from parallel.process_groups import Ranks
from pretrain.dynamics.activations import Activations
from pretrain.dynamics.noise_scale import MicroBatchGradients, NoiseScale, estimate, is_measured
from pretrain.dynamics.totals import Reduced, Totals
from pretrain.dynamics.weights import Weights
from pretrain.microbatch import MicroBatch

Dynamics = dict[str, float | dict[str, float]]
"""Part of a training record; a mapping goes from a part of the model (`"0"`, …, `"embedding"`) to its number."""


class Measurement:
    """Watches the forward and backward passes and the update of one step, while it is open.

    with Measurement(chunks, stored, optimizer, layout, ranks, microbatches, loss_scale) as measurement:
        ...      # the schedule, with measurement.during(forward_step)
        ...      # the update, which calls before_update and after_update
    record |= measurement.values(noise_scale)
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        stored: Sequence[Any],
        optimizer: Any,
        layout: Layout,
        ranks: Ranks,
        microbatches: Sequence[MicroBatch],
        loss_scale: float = 1.0,
        trainable: Sequence[str] | None = None,
    ) -> None:
        """`stored` has the parameters that the optimizer updates: the chunks, or what holds their shards. `trainable`:
        as in `pretrain.trainable`; of what is frozen there is no noise, since the step's gradient lacks it."""
        self._layout = layout
        self._totals = totals = Totals(chunks[0].config.num_layers)
        tokens = [int(microbatch.loss_mask.sum()) for microbatch in microbatches]
        self._activations = Activations(chunks, totals)
        # Of fully sharded weights no rank ever has a micro-batch's gradient.
        whole = {} if layout.fully_sharded else parameter_names(chunks)
        noisy = [each for each, name in whole.items() if is_measured(name) and is_trainable(name, trainable)]
        self._gradients = MicroBatchGradients(noisy, tokens, layout.context_parallel_size, loss_scale, totals)
        self._weights = Weights(stored, optimizer, ranks.tp_rank, totals)
        # All ranks of one model know the same of their micro-batches.
        ranks_of_a_model = layout.world_size // layout.data_parallel_size
        totals.count("noise", sum(tokens) / ranks_of_a_model)
        totals.count("micro_batches", sum(number > 0 for number in tokens) / ranks_of_a_model)

    def __enter__(self) -> Self:
        self._activations.attach()
        self._gradients.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self._activations.detach()
        self._gradients.detach()

    def during(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """The schedule's `forward_step`, watched."""
        return self._activations.during(forward_step)

    def before_update(self) -> None:
        """Gradients are ready, and not clipped yet."""
        self._weights.before_update()

    def after_update(self) -> None:
        """The optimizer has made its step."""
        self._weights.after_update()

    def after_no_update(self) -> None:
        """The optimizer has left everything as it was, since the gradients are not finite."""
        self._weights.after_no_update()

    def values(self, noise_scale: NoiseScale) -> Dynamics:
        """What the step's record says of it, the same on every rank, which all call this; `noise_scale` moves on."""
        totals = self._totals.reduce()
        values: Dynamics = {
            "max_attention_logit": totals.largest(),
            "query_norm": totals.means("query_norm"),
            "key_norm": totals.means("key_norm"),
            "block_output_rms": totals.root_means("block_output"),
            "output_logit_mean": totals.means("output_logit")["output"],
            "mlp_gradient_rms": totals.root_means("mlp_gradient"),
            "weight_rms": totals.root_means("weight"),
            "gradient_rms": totals.root_means("gradient"),
            "update_rms": totals.root_means("update"),
        }
        return values | self._noise(totals, noise_scale)

    def _noise(self, totals: Reduced, noise_scale: NoiseScale) -> Dynamics:
        layout = self._layout
        if layout.fully_sharded:
            return {}
        # What every replica's optimizer holds whole is in the sum as often as there are replicas.
        replicas = 1 if layout.distributed_optimizer else layout.data_parallel_size * layout.context_parallel_size
        found = estimate(
            round(totals.number("micro_batches")),
            totals.number("noise"),
            totals.total("noise"),
            totals.total("matrix_gradient") / replicas,
        )
        if found is None:
            return {}
        values: Dynamics = {"gradient_variance": found.variance, "gradient_signal": found.signal}
        smoothed = noise_scale.update(found)
        return values if smoothed is None else values | {"noise_scale": smoothed}
