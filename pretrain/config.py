"""A run's configuration: YAML in, one validated `RunConfig` out.

`load_config("recipes/quickstart.yaml", ["train.steps=20"])` reads the file, applies dotted overrides, and raises
`ConfigError` with the key's path and the nearest valid name when anything does not fit.
"""

import ipaddress
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from data_scheduler.config import DataConfig, Stage, StrictModel, with_stages
from headrace.errors import ConfigError
from headrace.validation import validated
from headrace.yaml_file import dump_yaml, parse_yaml, read_yaml

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class RunSection(StrictModel):
    """Where the run lives."""

    dir: Annotated[str, Field(min_length=1)]
    """Run folder; everything the run writes is under it."""
    name: str = ""
    """Name for trackers; the run folder's name when empty."""


class ModelConfig(StrictModel):
    """The model. `family` fixes the architecture, the numbers its size."""

    family: Literal["wonton", "llama", "qwen3"]
    """`wonton`: LayerNorm, biases, GELU, QK-LayerNorm (Nyonic, arXiv 2404.15702). `llama`: RMSNorm, SwiGLU, GQA, no
    biases. `qwen3`: llama with QK-RMSNorm."""
    num_layers: Positive
    """Transformer blocks."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Query heads."""
    num_query_groups: Positive | None = None
    """Key/value heads (GQA); as many as query heads when not given."""
    ffn_hidden_size: Positive
    """Inner width of the MLP."""
    vocab_size: Positive | None = None
    """Rows of the embedding; the tokenizer's size rounded up to a multiple of 128 when not given."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary embedding's frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every norm."""
    qk_norm: bool | None = None
    """Norm on queries and keys; the family's default (wonton and qwen3: yes, llama: no) when not given."""
    tie_embeddings: bool = False
    """Share the input embedding with the output head."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of weights at the start; output projections of attention and MLP get init_std/√(2·layers)."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of z-loss, c·log²Z (PaLM, arXiv 2204.02311)."""
    max_z_loss: NonNegativeFloat = 0.0
    """Coefficient of max-z loss, c·(max logit)² (Baichuan 2, arXiv 2309.10305)."""


class SelectionConfig(StrictModel):
    """What is trained on among the documents of a batch; which batch comes next never depends on it. A forward pass
    over the whole batch comes first, so a step costs a third more, less what is left out."""

    kind: str
    """`loss_threshold`, `rho1`, or a name in the entry-point group `headrace.selectors`."""
    options: dict[str, Any] = {}
    """Handed to the selector as keyword arguments."""
    from_step: NonNegative = 0
    """First step with a selection; before it everything is trained on."""
    reference: str | None = None
    """Run folder, or folder of one checkpoint, of the model that gives reference losses; for selectors that need it."""


class TrainConfig(StrictModel):
    """The training loop."""

    steps: Positive
    """Optimizer steps of the run."""
    micro_batch_size: Positive = 1
    """Sequences per forward pass and data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` keeps fp32 master weights and gradients."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: none, core attention and MLP only, or every block."""
    seed: int = 1234
    """Seed of the weights."""
    eval_every: NonNegative = 0
    """Evaluate held-out data every so many steps, besides before the first and after the last; 0: only those two."""
    eval_sequences: NonNegative = 16
    """Held-out sequences per source in one evaluation; 0 switches evaluation off."""
    selection: SelectionConfig | None = None
    """Train on a part of each batch only; null: on all of it."""
    threads: NonNegative = 0
    """CPU threads per process; 0 leaves torch's own choice."""


class OptimizerConfig(StrictModel):
    """AdamW and its learning-rate schedule."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 3e-5
    """Learning rate at the end of the decay."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices; norms and biases are not decayed."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient-norm limit; 0 switches clipping off."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after the warm-up; `wsd` holds the peak and decays over the last `decay_steps` steps."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    decay_steps: NonNegative | None = None
    """`cosine`, `linear`: step at which min_lr is reached (default: the run's end). `wsd`: length of the final decay
    (default: a tenth of the run)."""


class ParallelConfig(StrictModel):
    """How the model is spread over processes; what is left over is data parallel."""

    tensor_parallel_size: Positive = 1
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel group along the sequence."""
    pipeline_parallel_size: Positive = 1
    virtual_pipeline_parallel_size: Positive | None = None
    """Model chunks per pipeline rank (interleaved schedule)."""
    context_parallel_size: Positive = 1
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""


class KernelsConfig(StrictModel):
    """Who computes an operator: torch, or the fused kernel of `csrc/`. `auto` takes the fused one where it is built and
    was measured to be faster. The two differ by rounding."""

    swiglu: Literal["auto", "torch", "fused"] = "auto"
    """Activation of the MLP in `llama` and `qwen3`; `fused` is refused where it is not built."""


class CheckpointConfig(StrictModel):
    """When checkpoints are written and how many are kept."""

    every: NonNegative = 100
    """Save every so many steps, and at the end; 0: only at the end."""
    keep_last: NonNegative = 2
    """Checkpoints kept; 0 keeps all."""


class WandbConfig(StrictModel):
    enabled: bool = False
    project: str = "headrace"
    mode: Literal["online", "offline"] = "offline"


class PrometheusConfig(StrictModel):
    enabled: bool = False
    host: str = "127.0.0.1"
    """Address to listen on; any address besides loopback needs `token`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9401
    """0 takes a free port; the port in use is written to `<run>/log/prometheus.port`."""
    token: str = ""
    """Bearer token a scraper must send; empty: none needed (loopback only)."""


class MetricsConfig(StrictModel):
    """Where metrics go besides `metrics.jsonl`, which is always written."""

    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = False
    prometheus: PrometheusConfig = PrometheusConfig()
    progress: bool = True
    """Progress bar on a terminal, plain lines elsewhere."""


class ControlConfig(StrictModel):
    """How a live run takes commands over HTTP; command files in the run folder are always taken."""

    http: bool = False
    """Listen for commands on rank 0; the address in use is written to `<run>/control/endpoint.json`."""
    address: str = "127.0.0.1"
    """Address to listen on; any address besides loopback needs `token_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0 takes a free port."""
    token_file: str | None = None
    """File with the token that commands must send, readable by its owner only; on loopback a token is made when none is
    given."""
    tls_cert: str | None = None
    """Certificate chain in PEM; with `tls_key` the endpoint speaks HTTPS."""
    tls_key: str | None = None
    """Private key of `tls_cert`, in PEM."""

    @model_validator(mode="after")
    def _others_need_a_token(self) -> "ControlConfig":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or none")
        if self.http and self.token_file is None and not _is_loopback(self.address):
            raise ValueError(
                f"address {self.address!r} can be reached from other machines; set token_file, or listen on 127.0.0.1"
            )
        return self


def _is_loopback(address: str) -> bool:
    """Whether an address is a loopback one without asking anybody; other names could resolve to anything."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class RunStage(Stage):
    """A stretch of the run, up to where the next stage begins. What it does not name stays as it was before; before the
    first stage that is what the other sections say."""

    rope_base: PositiveFloat | None = None
    """`model.rope_base` from here on."""
    micro_batch_size: Positive | None = None
    """`train.micro_batch_size` from here on: fewer sequences at once, where they are longer."""
    lr_scale: PositiveFloat | None = None
    """Factor of the learning rate from here on."""


class RunConfig(StrictModel):
    """The whole configuration of a run; `headrace config schema` prints it as JSON schema."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    stages: Annotated[list[RunStage], Field(default_factory=list)]
    """What changes over the run, and where."""
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    control: ControlConfig = ControlConfig()

    @model_validator(mode="before")
    @classmethod
    def _data_has_its_stages(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or not isinstance(raw.get("data"), Mapping) or not raw.get("stages"):
            return raw
        try:
            _STAGES.validate_python(raw["stages"])
        except ValidationError:
            return raw  # to be named once, under `stages`
        return {**raw, "data": with_stages(raw)}


_STAGES = TypeAdapter(list[RunStage])


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration of `path` with `key.path=value` overrides applied.

    Values are read as YAML (`true`, `3e-4`, `[a, b]`); list items are addressed by number or, for sources, by name
    (`data.sources.code.weight=2`). Raises ConfigError.
    """
    return validate_config(_read(path, overrides), str(path))


def load_data_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DataConfig, int | None]:
    """(the `data` section, `train.steps`) of a run's configuration, or of a file with a `data` section only, which has
    no steps. Otherwise as `load_config`."""
    raw = _read(path, overrides)
    if set(raw) != {"data"}:
        config = validate_config(raw, str(path))
        return config.data, config.train.steps
    return validated(_DataFile, raw, str(path)).data, None


class _DataFile(StrictModel):
    data: DataConfig


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    raw = read_yaml(path).mapping(list(RunConfig.model_fields))
    for override in overrides:
        _apply_override(raw, override)
    return raw


def validate_config(raw: dict[str, Any], where: str) -> RunConfig:
    """`raw` as a RunConfig; raises ConfigError naming `where`, the key's path and the nearest valid name."""
    return validated(RunConfig, raw, where)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it back gives an equal object."""
    return dump_yaml(config.model_dump(mode="json", exclude={"data": {"stages"}} if config.stages else None))


def config_schema() -> str:
    """JSON schema of a run's configuration."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: write key.path=value")
    try:
        value = parse_yaml(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            index = names.index(part) if part in names else int(part) if part.isdecimal() else -1
            if not 0 <= index < len(node):
                known = ", ".join(str(name) for name in names if name) or f"0 to {len(node) - 1}"
                raise ConfigError(
                    f"override {override!r}: no item {part!r} in {'.'.join(parts[:depth])}; it has {known}"
                )
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(parts[:depth])} is a single value, not a section")
