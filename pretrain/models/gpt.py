"""Builds the model chunks of this process: a `ModelConfig` and a `Layout` in, megatron-core `GPTModel`s out."""

from typing import Any, Literal

import torch

from parallel import accelerator
from parallel.activations import set_activation
from parallel.embedding import use_sorted_gradient
from parallel.engine import GPTModel, TransformerConfig, parallel_state
from parallel.layout import Layout
from parallel.residual_layer import link
from parallel.spec import block_spec, dispatchers, mark_experts
from pretrain.config import KernelsConfig, ModelConfig
from pretrain.loss import LossInputs, vocab_parallel_cross_entropy
from pretrain.models.fused import (
    activation_is_fused,
    embedding_is_fused,
    norms_are_fused,
    qk_norm_rope_is_fused,
)
from pretrain.models.head import fuse_head, head_is_fused, summed_losses, token_losses
from pretrain.models.initialize import initialize_weights
from pretrain.models.multi_token import MultiTokenHeads
from pretrain.models.mup import attention_scale, scale_logits
from pretrain.models.sizes import FAMILIES, activation, expert_ffn_size, has_qk_norm, head_size, query_groups

Precision = Literal["fp32", "bf16", "fp16"]
Recompute = Literal["none", "selective", "full"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class LanguageModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose `forward(..., labels=...)` gives two losses for every token, (reported, minimised).

    Both float32[1, tokens]; they differ by the z-loss terms (see `pretrain.loss`). Given labels int64[1 + depth,
    tokens] it gives the same two of the multi-token heads besides, float32[depth, tokens] each.
    """

    z_loss: float
    max_z_loss: float
    multi_token_heads: MultiTokenHeads | None
    fused_head: bool
    """The output layer is here and gives losses: see `pretrain.models.head`."""
    dispatchers: list[Any]
    """Of its layers of experts."""

    def _postprocess(self, **inputs: Any) -> Any:
        labels, heads = inputs["labels"], self.multi_token_heads
        if self.fused_head and labels is not None:
            if isinstance(inputs["loss_mask"], LossInputs):
                return summed_losses(self, inputs, inputs["loss_mask"])
            if not torch.is_grad_enabled():
                return token_losses(self, inputs)
        if heads is None or labels is None or labels.size(0) == 1:
            return super()._postprocess(**inputs)
        losses = super()._postprocess(**{**inputs, "labels": labels[:1]})
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        ahead = [
            self.compute_language_model_loss(own[None], self.output_layer(hidden, weight=weight)[0])
            for own, hidden in zip(labels[1:], heads(inputs["hidden_states"], inputs["packed_seq_params"]), strict=True)
        ]
        return (*losses, *(torch.cat(each) for each in zip(*ahead, strict=True)))

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`labels` int64[1, tokens], `logits` [tokens, 1, vocab / tp]."""
        reported, minimised = vocab_parallel_cross_entropy(
            logits.squeeze(1), labels.squeeze(0), self.pg_collection.tp, self.z_loss, self.max_z_loss
        )
        return reported.unsqueeze(0), minimised.unsqueeze(0)


def transformer_config(
    config: ModelConfig,
    layout: Layout,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    kernels: KernelsConfig | None = None,
) -> Any:
    """megatron-core's `TransformerConfig` for `config` under `layout`; raises ConfigError for kernels not to be had."""
    family, dtype = FAMILIES[config.family], DTYPES[precision]
    virtual, kernels = layout.virtual_pipeline_parallel_size, kernels or KernelsConfig()
    megatron = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=query_groups(config),
        kv_channels=head_size(config),
        ffn_hidden_size=config.ffn_hidden_size,
        normalization=family.normalization,
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=has_qk_norm(config),
        add_bias_linear=family.biases,
        gated_linear_unit=family.gated,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        # Weights come from initialize_weights; megatron's own initialization must still run, since it marks which
        # weights are split over tensor-parallel ranks (the gradient norm else counts those of the first rank only).
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # Shards are fp32, and become bf16 when they are gathered.
        params_dtype=torch.float32 if layout.fully_sharded else dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tensor_model_parallel_size=layout.tensor_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=layout.context_parallel_size,
        softmax_scale=attention_scale(config),
        calculate_per_token_loss=True,
        deterministic_mode=accelerator.is_deterministic(),
        # megatron's batched p2p gives wrong losses (off by 8e-2, no error) with two interleaved stages; one by one is
        # right. Outputs must not be freed on gloo, which may still be sending them.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        deallocate_pipeline_outputs=accelerator.backend() == "nccl",
        **_mixture_of_experts(config, layout),
        **_recompute(config, recompute),
    )
    megatron.fused_qk_norm_rope = qk_norm_rope_is_fused(kernels, dtype)  # megatron has no such field; for block_spec
    set_activation(megatron, activation(config), activation_is_fused(config, kernels, dtype))
    return megatron


def _mixture_of_experts(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    if config.num_experts is None:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.moe_top_k,
        "moe_ffn_hidden_size": expert_ffn_size(config),
        "moe_shared_expert_intermediate_size": config.moe_shared_ffn_hidden_size,
        "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss else "none",
        "moe_aux_loss_coeff": config.moe_aux_loss,
        "moe_router_dtype": "fp32",  # near ties between experts flip with bf16's rounding
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.expert_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def _recompute(config: ModelConfig, recompute: Recompute) -> dict[str, Any]:
    options = dict(RECOMPUTE[recompute])
    if recompute == "selective" and config.num_experts is not None:
        options["recompute_modules"] = ["core_attn", "moe"]
    return options


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_model(
    config: ModelConfig,
    layout: Layout,
    seq_len: int,
    vocab_size: int,
    precision: Precision = "fp32",
    recompute: Recompute = "none",
    seed: int = 1234,
    kernels: KernelsConfig | None = None,
) -> list[LanguageModel]:
    """This process's model chunks (one, or `virtual_pipeline_parallel_size`), initialised, on the device.

    `vocab_size` is padded already and divisible by the tensor-parallel size; process groups must be initialised. The
    weights depend on `seed` and their place in the model only, not on the layout.
    """
    megatron = transformer_config(config, layout, precision, recompute, kernels)
    kernels = kernels or KernelsConfig()
    fused_head = head_is_fused(kernels, DTYPES[precision], layout)
    fused_norms = norms_are_fused(kernels, DTYPES[precision])
    chunks = []
    for stage in range(layout.model_chunks):
        vp_stage = stage if layout.virtual_pipeline_parallel_size else None
        chunk = LanguageModel(
            config=megatron,
            transformer_layer_spec=block_spec(megatron, vp_stage, fused_norms),
            vocab_size=vocab_size,
            max_sequence_length=seq_len,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="none",  # our core attention rotates queries and keys itself
            vp_stage=vp_stage,
        )
        chunk.z_loss, chunk.max_z_loss = config.z_loss, config.max_z_loss
        chunk.fused_head = fused_head and chunk.post_process
        if chunk.fused_head:
            fuse_head(chunk, layout)
        if chunk.post_process:
            scale_logits(chunk.output_layer, config)
        chunk.multi_token_heads = None
        if config.mtp is not None and chunk.post_process:
            chunk.multi_token_heads = MultiTokenHeads(
                megatron, config.mtp.depth, chunk.pg_collection, vp_stage, fused_norms
            )
        if chunk.pre_process and embedding_is_fused(kernels, DTYPES[precision]):
            use_sorted_gradient(chunk, layout.overlap_grad_reduce)
        if fused_norms and not layout.fully_sharded:
            link(chunk)
        mark_experts(chunk)
        chunk.dispatchers = dispatchers(chunk)
        chunks.append(chunk.to(accelerator.device()))
    initialize_weights(chunks, config, seed)
    return chunks
