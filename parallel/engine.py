"""The one door to megatron-core: the only file that imports it, after the device is ready.

Everything the tree uses of megatron-core is named here. The version is pinned because the CPU door and the submodules
in `spec.py` are written against it; `tests/pretrain/test_equivalence.py` (every layout trains as one process does)
is the canary for a new one.
"""
# ruff: noqa: E402, I001  (the imports below must follow install())

import importlib.metadata
import queue
import warnings

from headrace.errors import ConfigError
from parallel import accelerator

MEGATRON_VERSION = "0.16.1"

try:
    version = importlib.metadata.version("megatron-core")
except importlib.metadata.PackageNotFoundError:
    raise ConfigError(f"megatron-core is not installed; pip install 'megatron-core=={MEGATRON_VERSION}'") from None
if version != MEGATRON_VERSION:
    raise ConfigError(
        f"megatron-core {version} is installed, headrace is built for {MEGATRON_VERSION}; "
        f"pip install 'megatron-core=={MEGATRON_VERSION}'"
    )

# megatron says nine times at import that optional packages are missing; `headrace doctor` says it once, on request.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")

# torch 2.13 renames collectives that this megatron calls by their old names.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

# It also loads checkpoints by names that torch is about to drop, which would be seven lines at every resume.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core\.dist_checkpointing")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.checkpoint")

accelerator.install()
with accelerator.importing_megatron():
    pass
accelerator.after_megatron_import()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.data_parallel_base import _BaseDataParallel as DataParallelBase
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import _get_param_groups as get_parameter_groups
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    all_to_all,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

import megatron.core.dist_checkpointing.strategies.filesystem_async as _filesystem_async
import megatron.core.optimizer as _optimizer
import megatron.core.optimizer.distrib_optimizer as _distributed_optimizer
import megatron.core.transformer.moe.moe_utils as _moe_utils


__all__ = [
    "MEGATRON_VERSION",
    "ChainedOptimizer",
    "ColumnParallelLinear",
    "DataParallelBase",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DynamicGradScaler",
    "FP32Optimizer",
    "FileSystemWriterAsync",
    "Float16Module",
    "Float16OptimizerWithFloat16Params",
    "GPTModel",
    "IdentityOp",
    "MegatronModule",
    "MegatronOptimizerConfig",
    "ModuleSpec",
    "PackedSeqParams",
    "ParamKey",
    "ParamWithNamePredicate",
    "RowParallelLinear",
    "SelfAttention",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TopKRouter",
    "TorchCommonSaveStrategy",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "VocabParallelEmbedding",
    "all_to_all",
    "apply_factories",
    "build_module",
    "clip_grad_by_total_norm_fp32",
    "dist_checkpointing",
    "expert_losses",
    "extract_sharded_tensors_and_factories",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_parameter_groups",
    "make_sharded_optimizer_tensor",
    "nested_values",
    "parallel_state",
    "results_queue",
    "serialization",
    "tensor_parallel",
    "uses_own_adam",
]


def uses_own_adam() -> bool:
    """True when neither TransformerEngine nor apex provides a fused Adam, so `parallel.adam` does."""
    return _own_adam


_own_adam = bool(_optimizer.USING_PYTORCH_OPTIMIZER)
if _own_adam:
    from parallel.adam import GroupStepAdam

    _optimizer.Adam, _optimizer.USING_PYTORCH_OPTIMIZER = GroupStepAdam, False
    _distributed_optimizer.Adam = GroupStepAdam
    _distributed_optimizer.HAVE_APEX_OR_TE = _distributed_optimizer.USING_APEX_OPTIMIZER = True

# Without TransformerEngine the router's matrix product asks for this name and fails; with None it uses torch's.
_moe_utils.te_general_gemm = getattr(_moe_utils, "te_general_gemm", None)
# What megatron-core notes of balancing losses, and the groups they were summed over; it forgets neither by itself.
expert_losses = _moe_utils.get_moe_layer_wise_logging_tracker

# Results of a save travel through this queue within one process. megatron's own is a Manager's in a spawned process,
# which imports the whole program again: 3 s on the first save, and a hang where the program has no __main__ guard.
results_queue: "queue.Queue[object]" = queue.Queue()
_filesystem_async._results_queue = results_queue
