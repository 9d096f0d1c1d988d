"""Every weight of a model, on one rank of any layout, without building it: names and shapes from arithmetic.

weights(llama of 2 layers, Layout(2, tensor_parallel_size=2), stage 0, chunk 0)
    embedding.word_embeddings.weight                        [vocab / 2, hidden]
    decoder.layers.0.input_layernorm.weight                 [hidden]
    decoder.layers.0.self_attention.linear_proj.weight      [hidden, width / 2]
    …
"""

from collections.abc import Iterator
from typing import NamedTuple

from parallel.layout import Layout
from parallel.parameter_names import BLOCKS, HEADS, INPUT_EMBEDDING, OUTPUT_HEAD
from pretrain.config import ModelConfig
from pretrain.models.sizes import FAMILIES, attention_width, expert_ffn_size, has_qk_norm, head_size, query_groups


class Weight(NamedTuple):
    """A parameter as one rank holds it."""

    name: str
    """As `parallel.parameter_names` has it: layers count over the whole model, experts over the rank's."""
    shape: tuple[int, ...]
    is_expert: bool = False
    """Of an expert, which not every data-parallel rank has."""
    has_own_bucket: bool = False
    """The embedding that two pipeline stages share."""

    @property
    def numel(self) -> int:
        """Numbers in it."""
        rows, *columns = self.shape
        return rows * (columns[0] if columns else 1)


def weight_names(model: ModelConfig, expert_parallel_size: int = 1) -> list[str]:
    """Names of all parameters of the whole model; of experts those that each rank has."""
    layout = Layout(expert_parallel_size, expert_parallel_size=expert_parallel_size)
    return [weight.name for weight in weights(model, 1, layout, 0, 0)]


def weights(model: ModelConfig, vocab_size: int, layout: Layout, stage: int, chunk: int) -> Iterator[Weight]:
    """The weights of one model chunk on one rank of pipeline `stage`, in the order in which the model has them;
    `vocab_size` is the padded one."""
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline_parallel_size - 1 and chunk == layout.model_chunks - 1
    shared = model.tie_embeddings and layout.pipeline_parallel_size > 1
    embedding = vocab_size // layout.tensor_parallel_size, model.hidden_size
    if first:
        yield Weight(INPUT_EMBEDDING, embedding, has_own_bucket=shared)
    layers = model.num_layers // (layout.pipeline_parallel_size * layout.model_chunks)
    begin = (chunk * layout.pipeline_parallel_size + stage) * layers
    for layer in range(begin, begin + layers):
        yield from _block(f"{BLOCKS}{layer}.", model, layout)
    if not last:
        return
    yield from _norm("decoder.final_layernorm", model, model.hidden_size)
    if not model.tie_embeddings:
        yield Weight(OUTPUT_HEAD, embedding)
    elif not first:
        yield Weight(INPUT_EMBEDDING, embedding, has_own_bucket=shared)
    for head in range(model.mtp.depth if model.mtp is not None else 0):
        yield from _block(f"{HEADS}layer_{head}.", model, layout)
        yield from _norm(f"{HEADS}norm_{head}", model, model.hidden_size)


def _block(prefix: str, model: ModelConfig, layout: Layout) -> Iterator[Weight]:
    tp, hidden, biases = layout.tensor_parallel_size, model.hidden_size, FAMILIES[model.family].biases
    width, size = attention_width(model), head_size(model)
    qkv = (width + 2 * query_groups(model) * size) // tp
    attention = f"{prefix}self_attention."
    yield from _norm(f"{prefix}input_layernorm", model, hidden)
    yield from _linear(f"{attention}linear_proj", hidden, width // tp, biases)
    yield from _linear(f"{attention}linear_qkv", qkv, hidden, biases)
    if has_qk_norm(model):
        yield from _norm(f"{attention}q_layernorm", model, size)
        yield from _norm(f"{attention}k_layernorm", model, size)
    yield from _norm(f"{prefix}pre_mlp_layernorm", model, hidden)
    if model.num_experts is None:
        yield from _mlp(f"{prefix}mlp.", model, model.ffn_hidden_size // tp)
        return
    yield Weight(f"{prefix}mlp.router.weight", (model.num_experts, hidden))
    for expert in range(model.num_experts // layout.expert_parallel_size):
        for weight in _mlp(f"{prefix}mlp.experts.local_experts.{expert}.", model, expert_ffn_size(model)):
            yield weight._replace(is_expert=True)
    if model.moe_shared_ffn_hidden_size is not None:
        yield from _mlp(f"{prefix}mlp.shared_experts.", model, model.moe_shared_ffn_hidden_size // tp)


def _mlp(prefix: str, model: ModelConfig, width: int) -> Iterator[Weight]:
    family = FAMILIES[model.family]
    yield from _linear(f"{prefix}linear_fc1", width * (2 if family.gated else 1), model.hidden_size, family.biases)
    yield from _linear(f"{prefix}linear_fc2", model.hidden_size, width, family.biases)


def _linear(name: str, out: int, into: int, bias: bool) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (out, into))
    if bias:
        yield Weight(f"{name}.bias", (out,))


def _norm(name: str, model: ModelConfig, width: int) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (width,))
    if FAMILIES[model.family].normalization == "LayerNorm":
        yield Weight(f"{name}.bias", (width,))
