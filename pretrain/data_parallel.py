"""Model chunks, wrapped for data parallelism: replicated, with sharded optimizer state (ZeRO-1), or fully sharded."""

from collections.abc import Sequence
from typing import Any

from parallel.engine import DistributedDataParallel, DistributedDataParallelConfig, Float16Module
from parallel.fully_sharded import FullyShardedDataParallel
from parallel.layout import Layout
from pretrain.models.gpt import DTYPES, LanguageModel, Precision


def wrap(chunks: Sequence[LanguageModel], layout: Layout, precision: Precision, sharded: bool) -> list[Any]:
    """`chunks`, wrapped; gradients are accumulated and reduced in fp32. `sharded`: each rank gets the sum of a part of
    the gradients only, for megatron's distributed optimizer."""
    megatron = chunks[0].config
    if layout.fully_sharded:
        return [FullyShardedDataParallel(megatron, chunk, DTYPES[precision]) for chunk in chunks]
    reduce_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=sharded,
        overlap_grad_reduce=layout.overlap_grad_reduce,
        overlap_param_gather=layout.overlap_param_gather,
    )
    return [
        DistributedDataParallel(
            config=megatron,
            ddp_config=reduce_config,
            module=chunk if precision == "fp32" else Float16Module(megatron, chunk),
            disable_bucketing=number > 0,  # as megatron does: only the first chunk's gradients are finished early
        )
        for number, chunk in enumerate(chunks)
    ]


def gather_weights(wrapped: Sequence[Any]) -> None:
    """Make the weights of `wrapped` whole on every rank; all ranks call this before anything reads them between steps.

    With `overlap_param_gather` a rank otherwise has the new values of its own part only until the next forward pass.
    Chunks that are not wrapped, those of a model that is not trained, are whole.
    """
    for chunk in wrapped:
        if hasattr(chunk, "ddp_config") and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
