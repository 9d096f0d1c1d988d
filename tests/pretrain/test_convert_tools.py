"""`headrace convert verify`, `average`, `inspect`, and the one line for each thing wrong with their input."""

import gc
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from converted_runs import MODELS, Trained, native_weights, train
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from headrace.errors import ExitCode
from pretrain.checkpoint import Checkpoints, read_meta
from pretrain.cli import main
from pretrain.convert.average import average, weights
from pretrain.convert.inspect import inspect
from pretrain.convert.native import StoredTensors
from pretrain.convert.verify import verify
from pretrain.models.sizes import count_parameters


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("llama"), MODELS["tied GQA"])


@pytest.fixture(scope="module")
def wonton(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("wonton"), MODELS["wonton"])


@pytest.fixture(scope="module", autouse=True)
def no_groups_left_over() -> Iterator[None]:
    """Closed groups live on in cycles; collected in a later test's forked child they would hang it (see run_ranks)."""
    yield
    gc.collect()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `headrace convert ...` as the shell does; (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["headrace", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    return run


def test_a_registered_wonton_needs_no_code_of_the_folder(wonton: Trained, tmp_path: Path) -> None:
    import pretrain.convert.wonton

    shutil.copytree(wonton.hf, tmp_path / "hf", ignore=shutil.ignore_patterns("*.py"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is pretrain.convert.wonton.WontonForCausalLM
    with torch.no_grad():
        logits = model(wonton.tokens[None]).logits[0]
    assert (logits - wonton.logits["one document"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llama", "wonton"])
def test_a_run_and_its_export_compute_the_same(
    name: str, request: pytest.FixtureRequest, command: Callable[..., tuple[int, str, str]]
) -> None:
    trained = request.getfixturevalue(name)
    assert verify(trained.run_dir, trained.hf).difference <= 1e-5
    code, out, _ = command("verify", trained.run_dir, trained.hf)
    assert code == 0
    assert "within 0.0001" in out


def test_another_model_is_beyond_the_tolerance(
    llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(llama.hf, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][5] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = command("verify", llama.run_dir, folder)
    assert code == 1
    assert "beyond 0.0001" in out
    code, out, _ = command("verify", llama.run_dir, folder, "--tolerance", 1000)
    assert code == 0


def test_models_with_other_tokenizers_are_not_compared(
    llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(llama.hf, folder)
    file = folder / "tokenizer.json"
    definition = json.loads(file.read_text("utf-8"))
    vocab = definition["model"]["vocab"]
    vocab["e"], vocab["d"] = vocab["d"], vocab["e"]
    file.write_text(json.dumps(definition), "utf-8")
    code, _, err = command("verify", llama.run_dir, folder)
    assert code == ExitCode.USER_ERROR
    assert "differ on this text, from token 0 on" in err


def test_the_mean_of_checkpoints(llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    run = tmp_path / "run"
    shutil.copytree(llama.run_dir, run)
    for step, factor in ((4, 3.0), (6, 5.0)):
        _scaled(Checkpoints(run), step, factor)
    code, out, err = command("average", run, "--out", tmp_path / "mean", "--last", 3)
    assert code == 0
    assert out.startswith("model:\n")
    assert "steps 2, 4, 6" in err
    average(run, tmp_path / "ema", 3, 0.5)
    original = native_weights(Checkpoints(run).path(2))
    for folder, factor in (("mean", 3.0), ("ema", 0.25 + 0.25 * 3 + 0.5 * 5)):
        for name, tensor in native_weights(Checkpoints(tmp_path / folder).path(0)).items():
            torch.testing.assert_close(tensor, original[name] * factor, rtol=1e-6, atol=1e-7)
    code, _, err = command("average", run, "--out", tmp_path / "more", "--last", 4)
    assert code == ExitCode.USER_ERROR
    assert "has 3 checkpoints, not 4; there are 2, 4, 6" in err


def test_models_with_mup_are_averaged_and_those_with_experts_are_not(
    llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(llama.run_dir, run)
    _scaled(Checkpoints(run), 4, 3.0)
    for key, changes in (("mup", {"mup": True}), ("experts", {"mup": False, "num_experts": 4})):
        for step in (2, 4):
            file = Checkpoints(run).path(step) / "meta.json"
            meta = json.loads(file.read_text("utf-8"))
            for section in (meta["config"]["model"], meta["model"]):
                section.update(changes)
            file.write_text(json.dumps(meta), "utf-8")
        code, out, err = command("average", run, "--out", tmp_path / key, "--last", 2)
        if key == "mup":
            assert code == 0
            assert "mup: true" in out
            assert read_meta(Checkpoints(tmp_path / key).path(0))["model"]["mup"]
        else:
            assert code == ExitCode.USER_ERROR
            assert "model.num_experts: models with experts cannot be averaged" in err
            assert len(err.splitlines()) == 1


def _scaled(checkpoints: Checkpoints, step: int, factor: float) -> None:
    """A checkpoint of `step` whose weights are those of step 2 times `factor`, written as files that torch reads."""
    from pretrain.convert.native import NativeReader, write_weights
    from pretrain.convert.stored_model import find_model
    from pretrain.convert.tensors import native_tensors

    stored = find_model(checkpoints.run_dir, 2)
    natives = list(native_tensors(stored.model, stored.vocab_size))
    reader = NativeReader(stored.checkpoint, natives)
    path = checkpoints.path(step)
    path.mkdir()
    write_weights(path, natives, torch.float32, lambda native: reader.read(native) * factor)
    shutil.copyfile(stored.checkpoint / "meta.json", path / "meta.json")


def test_the_shares_of_a_moving_average_sum_to_one() -> None:
    for count in (1, 2, 7):
        for decay in (None, 0.0, 0.9, 1.0):
            assert sum(weights(count, decay)) == pytest.approx(1.0)


def test_what_is_in_a_checkpoint(llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    parameters = f"{count_parameters(llama.config.model, 128):,} parameters, 0 NaN"
    for path in (llama.run_dir, llama.hf, Checkpoints(llama.run_dir).path(2)):
        code, out, _ = command("inspect", path)
        assert code == 0
        assert parameters in out
    assert "lm_head" not in out
    damaged = _with_nan(llama.hf, tmp_path / "hf")
    code, out, _ = command("inspect", damaged)
    assert code == 0
    assert ", 2 NaN or infinite values" in out
    (line,) = (line for line in out.splitlines() if line.startswith("model.layers.1.mlp.up_proj.weight "))
    assert line.split()[1:] == ["128", "x", "64", "float32", "2"]


OTHER_TYPES = {
    "I64": torch.arange(3),
    "BOOL": torch.tensor([True, False]),
    "U16": torch.arange(4).to(torch.uint16),
    "F8_E4M3": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn),
    "F8_E5M2": torch.tensor([1.0, float("inf")]).to(torch.float8_e5m2),
    "F8_E8M0": torch.tensor([1.0, 2.0]).to(torch.float8_e8m0fnu),
    "F64": torch.tensor(1.0, dtype=torch.float64),
}
"""What quantized folders hold besides weights of 16 and 32 bits."""


def test_a_quantized_folder_is_listed(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    save_file(OTHER_TYPES, tmp_path / "model.safetensors")
    code, out, err = command("inspect", tmp_path)
    assert (code, err) == (0, "")
    found = {line.split()[0]: line.split()[-2:] for line in out.splitlines()[:-1]}
    assert found == {
        name: [str(tensor.dtype).removeprefix("torch."), "1" if name in ("F8_E4M3", "F8_E5M2") else "-"]
        for name, tensor in OTHER_TYPES.items()
    }


def test_a_type_that_torch_lacks_is_one_line(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    header = b'{"weight":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    code, _, err = command("inspect", tmp_path)
    assert code == ExitCode.USER_ERROR
    assert len(err.splitlines()) == 1
    assert "F6_E2M3" in err


def test_a_matrix_of_one_layer_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows it would be read, whole, as often as it has rows; a stack of all layers is read layer by layer."""
    weights = {name: torch.ones(6, 4) for name in ("decoder.layers.3.mlp.weight", "decoder.layers.mlp.weight")}
    torch.distributed.checkpoint.save(weights, checkpoint_id=tmp_path, no_dist=True)
    reads: list[str] = []
    read = StoredTensors.read

    def counted(self: StoredTensors, key: str, row: int | None = None) -> torch.Tensor:
        reads.append(key)
        return read(self, key, row)

    monkeypatch.setattr(StoredTensors, "read", counted)
    facts = list(inspect(tmp_path))
    assert [(each.name, each.shape, each.not_finite) for each in facts] == [(name, (6, 4), 0) for name in weights]
    assert [reads.count(name) for name in weights] == [1, 6]


def _with_nan(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _change_config(folder: Path, old: str, new: str) -> None:
    file = folder / "config.json"
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "wrong shape": (lambda f: _change_config(f, '"intermediate_size": 128', '"intermediate_size": 96'), "has shape"),
    "unknown architecture": (
        lambda f: _change_config(f, "LlamaForCausalLM", "MambaForCausalLM"),
        "cannot be converted",
    ),
    "NaN": (lambda f: f.rename(f.with_name("old")) and _with_nan(f.with_name("old"), f), "2 NaN or infinite of 8192"),
    "tokenizer mismatch": (lambda f: _change_tokenizer(f), "has 137 tokens, the model only 128"),
    "other weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "not a whole safetensors file"),
}


def _change_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{n}>" for n in range(40)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_one_line_and_exit_2(
    problem: str, llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(llama.hf, folder)
    change, message = BAD[problem]
    change(folder)
    for arguments in (("from-hf", folder, "--out", tmp_path / "run"), ("verify", folder, llama.hf)):
        code, out, err = command(*arguments)
        assert (code, out) == (ExitCode.USER_ERROR, ""), err
        (line,) = err.splitlines()
        assert line.startswith("headrace: error: ")
        assert message in line
        assert str(folder) in line
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_is_one_line_and_exit_2(
    llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(llama.run_dir, run)
    for file in Checkpoints(run).path(2).glob("*.distcp"):
        file.unlink()
    code, _, err = command("to-hf", run, "--out", tmp_path / "hf")
    assert code == ExitCode.USER_ERROR
    assert ".distcp is missing" in err
    assert len(err.splitlines()) == 1
    (Checkpoints(run).path(2) / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /nowhere'\ntR.")
    code, _, err = command("inspect", run)
    assert code == ExitCode.USER_ERROR
    assert "it names os.system, which no checkpoint needs" in err


def test_a_run_that_diverged_is_one_line_and_exit_2(
    llama: Trained, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(llama.run_dir, run)
    _scaled(Checkpoints(run), 4, float("nan"))
    code, _, err = command("to-hf", run, "--out", tmp_path / "hf")
    assert code == ExitCode.USER_ERROR
    assert "embedding.word_embeddings.weight holds 8192 NaN or infinite of 8192 values" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "hf").exists()


def test_only_run_folders_are_averaged(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = command("average", tmp_path / "nothing", "--out", tmp_path / "out")
    assert code == ExitCode.USER_ERROR
    assert "no such run folder" in err
