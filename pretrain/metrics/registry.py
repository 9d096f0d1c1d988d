"""The one list of metrics: every name that may stand in a record, what it means, and what it is called elsewhere.

Three kinds of record exist; the second has `val_loss`, the third `eval`:

    {"step": 7, "tokens": 32768, "loss": 5.31, ..., "source_loss": {"code": 4.9, "prose": 5.6}}     training
    {"step": 8, "val_loss": {"code": 4.8, "prose": 5.5}, "val_bits_per_byte": {...}}                evaluation
    {"step": 8, "eval": {"winogrande/acc": 0.52, "winogrande/...": 0.5}}                            scores of tasks

A training record's `step` counts from 0 and names the optimizer step it describes; its loss was computed before that
step's update. An evaluation's `step` is the number of optimizer steps done. So both at the same `step` saw the same
weights, and both can share one axis. Scores of tasks (`headrace eval`) count steps like an evaluation; they come later,
in the order in which they were asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

Record = dict[str, Any]
Kind = Literal["counter", "gauge", "sum", "text"]


@dataclass(frozen=True)
class Metric:
    """One entry of the list."""

    name: str
    """Key in a record."""
    kind: Kind
    """`counter`: only grows over a run. `gauge`: a value of this moment. `sum`: an amount of this step; Prometheus gets
    the total since the process started. `text`: not a number, `metrics.jsonl` only."""
    unit: str
    meaning: str
    exported: str = ""
    """Name in Prometheus, without the `_total` that counters get; empty: not exported."""
    label: str = ""
    """The value is a mapping from this to number: `source`, `layer` (`"0"`, …, `"embedding"`, `"output"`) or `rank`."""
    made_by: str = "pretrain.step_record"
    """Module that measures it."""
    of_machine: bool = False
    """Says something about this machine and this attempt, so that the same run has another value elsewhere."""


METRICS: Final = (
    Metric("step", "gauge", "steps", "optimizer step, from 0", "headrace_step"),
    Metric(
        "tokens", "counter", "tokens", "target tokens of all batches so far, this step's included", "headrace_tokens"
    ),
    Metric(
        "input_tokens",
        "counter",
        "tokens",
        "tokens the model was given so far, this step's included: seq_len · global_batch_size of every step",
        "headrace_input_tokens",
    ),
    Metric("seq_len", "gauge", "tokens", "tokens of each of the step's sequences", "headrace_seq_len"),
    Metric("global_batch_size", "gauge", "sequences", "sequences of the step", "headrace_global_batch_size"),
    Metric("loss", "gauge", "nats/token", "mean loss over the step's target tokens", "headrace_loss"),
    Metric(
        "mtp_loss",
        "gauge",
        "nats/token",
        "mean loss of the multi-token heads, where there are some",
        "headrace_mtp_loss",
    ),
    Metric("grad_norm", "gauge", "1", "global gradient norm before clipping", "headrace_grad_norm"),
    Metric(
        "loss_scale",
        "gauge",
        "1",
        "with `train.precision: fp16`: factor of the loss in the step's backward pass",
        "headrace_loss_scale",
    ),
    Metric("lr", "gauge", "1", "learning rate of the step's update", "headrace_learning_rate"),
    Metric(
        "tokens_per_s",
        "gauge",
        "tokens/s",
        "global throughput of the step",
        "headrace_tokens_per_second",
        of_machine=True,
    ),
    Metric(
        "step_s",
        "gauge",
        "s",
        "time of the whole step, waiting for data included",
        "headrace_step_seconds",
        of_machine=True,
    ),
    Metric(
        "data_wait_s", "gauge", "s", "time the step waited for its batch", "headrace_data_wait_seconds", of_machine=True
    ),
    Metric(
        "passes_s",
        "gauge",
        "s",
        "time of the forward and backward passes, sums of gradients over replicas included; the rank that took longest",
        "headrace_passes_seconds",
        of_machine=True,
    ),
    Metric(
        "update_s",
        "gauge",
        "s",
        "time of clipping and the update; the rank that took longest",
        "headrace_update_seconds",
        of_machine=True,
    ),
    Metric(
        "model_flops_per_s",
        "gauge",
        "FLOP/s",
        "operations that the model needs, attention in full, by second and device; not with `train.selection`",
        "headrace_model_flops_per_second",
        made_by="pretrain.utilisation",
        of_machine=True,
    ),
    Metric(
        "mfu",
        "gauge",
        "1",
        "`model_flops_per_s` as a share of `metrics.peak_flops`, where that is given or the GPU is known",
        "headrace_mfu",
        made_by="pretrain.utilisation",
        of_machine=True,
    ),
    Metric(
        "mfu_causal",
        "gauge",
        "1",
        "likewise with the causal half of attention only",
        "headrace_mfu_causal",
        made_by="pretrain.utilisation",
        of_machine=True,
    ),
    Metric(
        "peak_memory_bytes",
        "gauge",
        "bytes",
        "largest device memory of a rank",
        "headrace_peak_memory_bytes",
        of_machine=True,
    ),
    Metric(
        "slowest_rank",
        "gauge",
        "rank",
        "rank that computes longest before it meets the others",
        "headrace_slowest_rank",
        made_by="pretrain.recovery.stragglers",
        of_machine=True,
    ),
    Metric(
        "slowest_rank_ratio",
        "gauge",
        "1",
        "its time over the median of ranks that do the same work; every `recovery.stragglers_every` steps",
        "headrace_slowest_rank_ratio",
        made_by="pretrain.recovery.stragglers",
        of_machine=True,
    ),
    Metric("batch_sha256", "text", "", "SHA-256 of the step's global batch, the same for every layout"),
    Metric("source_loss", "gauge", "nats/token", "mean loss of each source", "headrace_source_loss", "source"),
    Metric("source_tokens", "sum", "tokens", "the step's target tokens by source", "headrace_source_tokens", "source"),
    Metric(
        "trained_tokens",
        "sum",
        "tokens",
        "with `train.selection`: those of `source_tokens` whose loss was minimised",
        "headrace_trained_tokens",
        "source",
        made_by="pretrain.selection",
    ),
    Metric(
        "batch_documents",
        "sum",
        "documents",
        "with `train.selection`: documents of the step's batch, one that is cut once a sequence",
        "headrace_batch_documents",
        "source",
        made_by="pretrain.selection",
    ),
    Metric(
        "trained_documents",
        "sum",
        "documents",
        "with `train.selection`: those of `batch_documents` that were trained on",
        "headrace_trained_documents",
        "source",
        made_by="pretrain.selection",
    ),
    Metric(
        "max_attention_logit",
        "gauge",
        "1",
        "largest q·k/√d of the block's attention, over all heads and every pair of tokens that attend",
        "headrace_max_attention_logit",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "query_norm",
        "gauge",
        "1",
        "mean length of a head's query vector",
        "headrace_query_norm",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "key_norm",
        "gauge",
        "1",
        "mean length of a head's key vector",
        "headrace_key_norm",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "block_output_rms",
        "gauge",
        "1",
        "RMS of the residual stream after it",
        "headrace_block_output_rms",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "output_logit_mean",
        "gauge",
        "1",
        "mean of the output logits, over all tokens and the whole (padded) vocabulary",
        "headrace_output_logit_mean",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "mlp_gradient_rms",
        "gauge",
        "1",
        "RMS of the gradient of the weight of the MLP's first layer, before clipping",
        "headrace_mlp_gradient_rms",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "weight_rms",
        "gauge",
        "1",
        "RMS of the weights before the update",
        "headrace_weight_rms",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "gradient_rms",
        "gauge",
        "1",
        "RMS of the gradient before clipping",
        "headrace_gradient_rms",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "update_rms",
        "gauge",
        "1",
        "RMS of what the update adds to the weights",
        "headrace_update_rms",
        "layer",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "gradient_variance",
        "gauge",
        "1",
        "estimate of tr Σ, the noise in one token's gradient, of the blocks' matrices",
        "headrace_gradient_variance",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "gradient_signal",
        "gauge",
        "1",
        "estimate of the squared norm of the true gradient, of the same; may be below 0",
        "headrace_gradient_signal",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "noise_scale",
        "gauge",
        "tokens",
        "gradient-noise scale: the ratio of moving averages of the two",
        "headrace_noise_scale",
        made_by="pretrain.dynamics",
    ),
    Metric(
        "not_finite",
        "sum",
        "steps",
        "1 when the step's loss or gradient norm is NaN or infinite, else 0",
        "headrace_not_finite_steps",
    ),
    Metric(
        "time",
        "gauge",
        "s",
        "Unix time at the end of the step",
        "headrace_last_step_timestamp_seconds",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "checkpoint_age_s",
        "gauge",
        "s",
        "time since the newest checkpoint was complete; before the first one since the run began",
        "headrace_checkpoint_age_seconds",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "disk_free_bytes",
        "gauge",
        "bytes",
        "free space where the run folder is",
        "headrace_disk_free_bytes",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "rejects",
        "counter",
        "records",
        "records of each source left out so far",
        "headrace_rejects",
        "source",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "restarts",
        "counter",
        "restarts",
        "times the run went on from a checkpoint so far: after a restart, a rollback or a change of layout",
        "headrace_restarts",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "anomalies",
        "counter",
        "anomalies",
        "anomalies the loss guard has found so far",
        "headrace_anomalies",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "rollbacks",
        "counter",
        "rollbacks",
        "times the run went back to a checkpoint so far",
        "headrace_rollbacks",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "rank_data_wait_s",
        "gauge",
        "s",
        "time each rank waited for its part of the batch",
        "headrace_rank_data_wait_seconds",
        "rank",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "rank_peak_memory_bytes",
        "gauge",
        "bytes",
        "largest device memory of each rank so far",
        "headrace_rank_peak_memory_bytes",
        "rank",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "rank_host_memory_bytes",
        "gauge",
        "bytes",
        "host memory of each rank's process",
        "headrace_rank_host_memory_bytes",
        "rank",
        made_by="pretrain.metrics.vitals",
        of_machine=True,
    ),
    Metric(
        "val_loss",
        "gauge",
        "nats/token",
        "mean loss on each source's held-out text",
        "headrace_val_loss",
        "source",
        made_by="pretrain.evaluate",
    ),
    Metric(
        "val_bits_per_byte",
        "gauge",
        "bits/byte",
        "the same losses, summed over all target tokens (ends of documents too), over the UTF-8 bytes of the text that "
        "these tokens stand for (special tokens: none); comparable between tokenizers",
        "headrace_val_bits_per_byte",
        "source",
        made_by="pretrain.evaluate",
    ),
    Metric(
        "eval",
        "gauge",
        "the metric's",
        "what `headrace eval` found, as `task/metric`; of the checkpoint of this step",
        label="task",
        made_by="pretrain.evaluation.results",
    ),
)

OF_MACHINE: Final = frozenset(metric.name for metric in METRICS if metric.of_machine)
"""What no two attempts at a run have in common; the rest of a record is the same bits for the same run."""
_PER_RANK: Final = frozenset(metric.name for metric in METRICS if metric.label == "rank")


def is_evaluation(record: Record) -> bool:
    """Whether `record` has held-out losses, which a run writes between steps."""
    return "val_loss" in record


def has_scores(record: Record) -> bool:
    """Whether `record` has a checkpoint's scores of tasks, added by `headrace eval`."""
    return "eval" in record


def tracker_name(name: str) -> str:
    """What a key of a record is called in trackers and exported tables: `train/loss`, `val/loss`, `eval`."""
    if name == "eval":
        return name
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """`record`'s numbers under tracker names: `train/loss`, `train/source_loss/code`, `val/loss/code`.

    Names that are not in the list (a policy's or an experiment's own) are passed on too; text is left out, and so are
    values per rank: a chart for each of a thousand ranks helps nobody.
    """
    for name, value in record.items():
        if name == "step" or name in _PER_RANK:
            continue
        tag = tracker_name(name)
        for suffix, number in value.items() if isinstance(value, dict) else (("", value),):
            if not isinstance(number, str | bytes | list | type(None)):
                yield (f"{tag}/{suffix}" if suffix else tag), float(number)
