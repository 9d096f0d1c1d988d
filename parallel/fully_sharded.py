"""Fully sharded data parallelism (ZeRO-3, arXiv 1910.02054): torch's `fully_shard` around megatron-core's model chunks.

Between steps every rank holds 1/n of the weights, gradients and optimizer state, n being the number of data- times
context-parallel ranks; all numbers are fp32. A weight of 10 rows over 4 ranks lies as rows 3 + 3 + 3 + 1.

    one micro-batch   a layer's weights are gathered (in bf16 under `bf16`), used, and dropped; gathered again for the
                      backward pass, which leaves the layer's whole gradient
    one step          on the last micro-batch each layer's gradient is summed and cut in one reduce-scatter (in fp32);
                      or on every one (`parallel.reduce_gradients`), so that no whole gradient is kept in between

Two torch calls make the sum megatron's schedules expect, which divide by the number of tokens themselves: a divide
factor of 1, and plain sums (gloo has no scaled ones). megatron-core's own FSDP and its wrapper of this one both ask
for CUDA by name (docs/decisions/012-fully-sharded-by-torch.md).

Everything downstream (megatron's finalize_model_grads, gradient norm and clipping, Adam) works on plain tensors: each
shard is offered once more as a parameter that shares its memory, with megatron's attributes and `main_grad`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel import accelerator
from parallel.engine import DataParallelBase, DistributedDataParallelConfig, parallel_state
from parallel.shard_entries import ShardEntries

# torch warns of in-place operations on outputs that are views; there are none on the embedding's or the chunk's.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

GRADIENT_DIVIDE_FACTOR = 1.0
"""Gradients are summed over ranks; megatron divides the sum by the tokens of the global batch."""


@dataclass
class _Shard:
    plain: Any
    """This rank's rows as a plain parameter, the optimizer's."""
    whole: Any
    """The DTensor that torch gathers, over the same memory."""


class FullyShardedDataParallel(DataParallelBase):  # type: ignore[misc]
    """A model chunk whose weights are spread over the data- and context-parallel ranks.

    Takes the place of megatron's DistributedDataParallel: schedules call it like the chunk, and `named_parameters` are
    this rank's shards as plain fp32 tensors, those without a row left out. `compute_dtype` is that of gathered weights
    and of the activations. Weights must be initialised, fp32 and on the device; the chunk holds shards from now on.
    """

    def __init__(self, config: Any, module: Any, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config=config, module=module)
        self.ddp_config = DistributedDataParallelConfig()  # megatron looks into it for its own FSDP, which this is not
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        attributes = {name: dict(vars(parameter)) for name, parameter in module.named_parameters()}
        self._entries = ShardEntries(module, group, compute_dtype)
        _shard(module, DeviceMesh.from_group(group, accelerator.device().type), compute_dtype, config)
        self._shards: dict[str, _Shard] = {}
        for name, whole in module.named_parameters():
            with torch.no_grad():
                plain = torch.nn.Parameter(whole.to_local())
            for attribute, value in attributes[name].items():
                setattr(plain, attribute, value)
                setattr(whole, attribute, value)
            self._shards[name] = _Shard(plain, whole)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The chunk's output."""
        output = self.module(*inputs, **named)
        if not torch.is_grad_enabled():
            # torch waits for a backward pass to drop the weights that the end of the model needs; without one they
            # would be used again after the next change of the weights.
            for part in self._parts():
                part.reshard()
        return output

    def named_parameters(self, prefix: str = "", *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """(name in the chunk, this rank's rows)."""
        for name, shard in self._shards.items():
            if shard.plain.numel():
                yield prefix + name, shard.plain

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here keep whole gradients to themselves; the first one outside reduces all of them."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def zero_grad_buffer(self) -> None:
        """Forget all gradients."""
        for shard in self._shards.values():
            shard.whole.grad = shard.whole.main_grad = shard.plain.main_grad = None

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Offer the reduced gradients as `main_grad`, where megatron looks for them."""
        for name, shard in self._shards.items():
            assert shard.whole.grad is not None, f"{name} has no gradient"
            with torch.no_grad():
                shard.whole.main_grad = shard.plain.main_grad = shard.whole.grad.to_local()

    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply all gradients in place."""
        if gradients := [parameter.main_grad for _, parameter in self.named_parameters()]:
            torch._foreach_mul_(gradients, scaling_factor)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """The chunk's weights as megatron's sharded state dict, with the keys of a chunk that is not sharded."""
        return self._entries.of({name: shard.plain for name, shard in self._shards.items()})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Take over what was loaded through `sharded_state_dict`."""
        for key, name in self._entries.names.items():
            plain = self._shards[name].plain
            if plain.numel():
                plain.copy_(state_dict[key])

    def _parts(self) -> Iterator[FSDPModule]:
        return (module for module in self.module.modules() if isinstance(module, FSDPModule))


def _shard(chunk: Any, mesh: DeviceMesh, compute_dtype: torch.dtype, config: Any) -> None:
    """Wrap every layer, embedding and head of their own, and what is left (the final norm, a tied embedding)."""
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotary angles stay fp32
    )
    shared = chunk.share_embeddings_and_output_weights
    if chunk.pre_process and not shared:
        fully_shard(chunk.embedding, mesh=mesh, mp_policy=policy)
        chunk.embedding.set_unshard_in_backward(False)  # its gradient needs the tokens only
    before: list[Any] = []
    for layer in chunk.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        if config.recompute_granularity is not None:
            # A recomputed forward pass disturbs the order that torch would prefetch by.
            layer.set_modules_to_backward_prefetch(before)
        before = [layer]
    if chunk.post_process and not shared:
        fully_shard(chunk.output_layer, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(chunk, mesh=mesh, mp_policy=policy)
    for part in chunk.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(GRADIENT_DIVIDE_FACTOR)
            part.set_force_sum_reduction_for_comms(True)
