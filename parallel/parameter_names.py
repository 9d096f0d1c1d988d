"""What a parameter is called, the same under every layout.

    decoder.layers.7.mlp.linear_fc1.weight

is the first matrix of the eighth block's MLP, whichever pipeline stage holds it and wherever in that stage it stands.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names alone are asked for where torch is not loaded, which takes 2 s
    import torch

INPUT_EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_HEAD = "output_layer.weight"
BLOCKS = "decoder.layers."
HEADS = "multi_token_heads."
"""Each of them a transformer block of its own."""


def parameter_names(chunks: Sequence[Any]) -> "dict[torch.nn.Parameter, str]":
    """Names of all parameters of this process's model `chunks`, with layers counted over the whole model.

    Of fully sharded chunks the parameters are this rank's shards, those without a row left out.
    With tied embeddings the last pipeline stage holds a copy of the input embedding; it has the embedding's name.
    """
    names = {}
    for holder in chunks:
        chunk = getattr(holder, "module", holder)
        for name, parameter in holder.named_parameters():
            if name.startswith(BLOCKS):
                local, rest = name.removeprefix(BLOCKS).split(".", 1)
                names[parameter] = f"{BLOCKS}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
            elif name == OUTPUT_HEAD and chunk.share_embeddings_and_output_weights:
                names[parameter] = INPUT_EMBEDDING
            else:
                names[parameter] = name
    return names


def is_block_matrix(name: str, parameter: "torch.Tensor") -> bool:
    """Whether this is one of the blocks' matrices, the weights that grow with the width in both directions; those of
    multi-token heads are blocks too."""
    return name.startswith((BLOCKS, HEADS)) and parameter.dim() == 2


def is_trainable(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a parameter of this name is updated where those that match one of `patterns` are; None: all are."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
