"""Mistakes in a preparation's file are named in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("datatrove")

from planted import page

from data_scheduler.prep.load import load_prep_config
from data_scheduler.prep.run import prepare
from headrace.errors import ConfigError

ROOT = Path(__file__).parents[2]

CONFIG = """\
input:
  paths: [PATHS]
steps:
  - kind: gopher_quality
    min_doc_words: 20
  - kind: length
out: OUT
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gopher_quality", "gopher_qualty"), r"prep.yaml:4: steps.0: no kind 'gopher_qualty' \(did you mean 'goph"),
        (("min_doc_words", "min_doc_word"), r"prep.yaml:5: unknown key steps.0.min_doc_word \(did you mean 'min_"),
        (("20", "many"), r"prep.yaml:5: steps.0.min_doc_words: .*integer, got 'many'"),
        (("input:", "inputs:"), r"prep.yaml:1: input is required|unknown key inputs \(did you mean 'input'"),
        (("  - kind: length", "  - length"), r"prep.yaml:6: steps.1"),
        (("kind: length", "kind: length\n  - kind: length"), r"steps.2 \(length\) gives 'chars', which is steps.1's"),
        (("out: OUT", "out: OUT\nexecutor: {kind: slurm, partition: x}"), r"prep.yaml:8: executor.time is required"),
        (("out: OUT", "out: OUT\nexecutor: {kind: slumr}"), r"prep.yaml:8: executor: no kind 'slumr' \(did you mean"),
        (("out: OUT", "out: s3://bucket"), r"out must be a folder, not a URL"),
        (("out: OUT", "out: [OUT"), r"prep.yaml:8:1: not valid YAML"),
        (("out: OUT", "out: OUT\nwords: qq"), r"words: 'qq' is not `plain` and no language code"),
        (("out: OUT", "out: OUT\nwords: en"), r"words: 'en': Please install `spacy`"),
        (("PATHS", "nowhere/*.jsonl"), r"input.paths: no file at nowhere/\*.jsonl"),
        (("length", "language\n    model: no.bin"), r"steps.1.model: no.bin: No such file or directory; download"),
        (("length", "language\n    model: prep.yaml"), r"steps.1.model: prep.yaml is not a fastText model"),
        (("length", "tokens\n    tokenizer: none"), r"tokenizer none: no such file or folder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(
    change: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({"text": page(0)}) + "\n")
    assert change[0] in CONFIG
    text = CONFIG.replace(*change).replace("PATHS", "a.jsonl").replace("OUT", "out")
    Path("prep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(load_prep_config("prep.yaml"))
    assert "\n" not in str(caught.value)


def test_without_the_extra_one_line_says_what_to_install(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "prep.yaml"
    path.write_text(yaml.safe_dump(settings))
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'datatrove': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from pretrain.cli import main; main()\n"
    )
    command = [sys.executable, "-c", block, "data", "prep", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "headrace: error: preparing data needs datatrove: pip install 'headrace[prep]'\n"
    )  # fmt: skip
