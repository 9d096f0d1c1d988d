"""The wonton as a model of transformers: importing this makes the `Auto` classes know it.

    import pretrain.convert.wonton
    model = AutoModelForCausalLM.from_pretrained("model")                       # no code of the folder is run

Where Headrace is not installed, the two files here, which exported folders hold, do the same:

    model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
"""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pretrain.convert.wonton.configuration_wonton import WontonConfig
from pretrain.convert.wonton.modeling_wonton import WontonForCausalLM, WontonModel

FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_wonton.py", "modeling_wonton.py"))
"""What an exported folder holds besides weights and configuration."""

AutoConfig.register("wonton", WontonConfig, exist_ok=True)
AutoModel.register(WontonConfig, WontonModel, exist_ok=True)
AutoModelForCausalLM.register(WontonConfig, WontonForCausalLM, exist_ok=True)
