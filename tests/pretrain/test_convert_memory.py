"""Conversion streams: in a process of its own it needs a few times the largest tensor, however large the model is."""

import json
import os
import subprocess
import sys
from pathlib import Path

MEASURE = """
import json, sys
from pathlib import Path
import torch
from pretrain.config import ModelConfig
from pretrain.convert import new_run, from_hf, to_hf
from pretrain.convert.tensors import native_tensors

def memory(key):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def measured(act):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = memory("VmRSS")
    act()
    return memory("VmHWM") - before

def convert(folder, width, tokenizer):
    model = ModelConfig(family="wonton", num_layers=3, hidden_size=128, num_attention_heads=4,
                        ffn_hidden_size=width, vocab_size=width, init_std=0.02)
    natives = list(native_tensors(model, width))
    make = lambda native: torch.zeros(native.shape)
    new_run.new_run(folder / "run", model, natives, torch.float32, make, 64, tokenizer)
    return {
        "largest": max(torch.Size(native.shape).numel() for native in natives) * 4,
        "whole": sum(torch.Size(native.shape).numel() for native in natives) * 4,
        "to_hf": measured(lambda: to_hf.to_hf(folder / "run", None, folder / "hf")),
        "from_hf": measured(lambda: from_hf.from_hf(folder / "hf", folder / "back")),
    }

root = Path(sys.argv[1])
convert(root / "small", 256, root / "tokenizer")  # what is imported and cached once does not count
print(json.dumps(convert(root / "large", 32768, root / "tokenizer")))
"""


def test_peak_memory_is_a_few_times_the_largest_tensor(tmp_path: Path) -> None:
    from converted_runs import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    # What is freed goes back at once; else memory that was kept from before hides what is needed.
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=exact)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] > 7 * found["largest"]  # what was held as a whole would show
    assert found["to_hf"] <= 2.1 * found["largest"], found
    assert found["from_hf"] <= 4.1 * found["largest"], found
