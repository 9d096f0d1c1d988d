"""A pattern that no parameter has is refused, by a dry run as by the run itself."""

from typing import Any

import pytest
from tiny_run import tiny_config

from headrace.errors import ConfigError
from pretrain.config import validate_config
from pretrain.dry_run import describe


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "groups",
            r"optimizer\.groups\.1\.match: no parameter is called 'embeding\.\*'; "
            r"the nearest are embedding\.word_embeddings\.weight, ",
        ),
        (
            "trainable",
            r"stages\.0\.trainable: no parameter is called 'decoder\.layers\.\*\.mlp\.fc1\*'; "
            r"the nearest are decoder\.layers\.0\.mlp\.linear_fc1\.weight, ",
        ),
    ],
)
def test_a_dry_run_names_the_pattern_and_the_nearest_names(key: str, said: str) -> None:
    raw: dict[str, Any] = tiny_config(vocab_size=128).model_dump()
    raw["data"].pop("stages")
    good, bad = ("*norm.weight", "embeding.*") if key == "groups" else ("embedding*", "decoder.layers.*.mlp.fc1*")
    if key == "groups":
        raw["optimizer"]["groups"] = [{"match": good}, {"match": bad}]
    else:
        raw["stages"] = [{"from_step": 1, "trainable": [good, bad]}]
    with pytest.raises(ConfigError, match=said) as caught:
        describe(validate_config(raw, "test"), 1)
    assert "\n" not in str(caught.value)
