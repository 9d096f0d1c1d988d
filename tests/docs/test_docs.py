"""Documentation tells the truth where a machine can tell: commands, keys, links, code, a proof's numbers, pages."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from fractions import Fraction
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_origin

import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel, TypeAdapter

from data_scheduler import Feedback
from data_scheduler.journal import KINDS
from data_scheduler.mixture import ONE, Mixer, quantize
from data_scheduler.objectives.config import Objective
from data_scheduler.prep.config import PrepConfig
from data_scheduler.transforms.config import Transform
from headrace.errors import ExitCode
from launch.site import Site
from pretrain.cli import app
from pretrain.config import RunConfig
from pretrain.config.alerts import AlertsConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# -- pages ----------------------------------------------------------------------------------------------------------


def generator() -> Any:
    spec = spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [
        "configuration.md",
        "metrics.md",
        "preparation.md",
        "data_speed.md",
        "mixing.md",
        "how-to/curriculum-by-bands.md",
        "how-to/gpu.md",
        "parallel.md",
        "kernels.md",
    ],
)
def test_generated_pages_are_up_to_date(page: str) -> None:
    written = (DOCS / page).read_text(encoding="utf-8")
    assert written == generator().PAGES[page](), "run `python docs/generate.py`"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@every_page
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        assert file.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in {slug(title) for title in re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)}, target


def slug(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_page_is_reached_from_the_index() -> None:
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", (DOCS / "index.md").read_text())}
    assert {page for page in DOCS.rglob("*.md") if page.name != "index.md"} <= linked


def test_pictures_are_small() -> None:
    pictures = list((DOCS / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name


# -- commands -------------------------------------------------------------------------------------------------------


def quoted_commands() -> Iterator[tuple[str, str]]:
    """(file, command) of every `headrace …` in pages, recipes and the Makefile."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        code = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
        lines = [line for line in code.splitlines() if re.match(r"\s*headrace\b", line)]
        lines += re.findall(r"`(headrace [^`]+)`", " ".join(prose(page).split()))
        yield from ((name, line) for line in lines)
    for file in [ROOT / "Makefile", *sorted((ROOT / "recipes").glob("*.yaml"))]:
        for line in re.findall(r"(?:\$\(BIN\)/|#\s+)(headrace .*)", file.read_text()):
            yield str(file.relative_to(ROOT)), line


COMMANDS = list(dict.fromkeys(quoted_commands()))


def test_commands_were_found() -> None:
    assert len(COMMANDS) > 30
    assert {"README.md", "Makefile", "docs/tutorial.md", "recipes/quickstart.yaml"} <= {name for name, _ in COMMANDS}


@pytest.mark.parametrize(("file", "line"), COMMANDS, ids=[f"{file}: {line}" for file, line in COMMANDS])
def test_quoted_commands_parse(file: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(app)
    while words and (known := getattr(command, "commands", None)):
        words = without_own(command, words)
        if not words:
            return
        assert words[0] in known, f"{file}: no command {words[0]!r} (known: {', '.join(known)})"
        command = known[words.pop(0)]
    if not words:
        return  # a command, or a group of them, named in a sentence
    if "…" in words or any(
        re.fullmatch(r"[A-Z:]+", word) for word in words
    ):  # placeholders: only the options can be held
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, f"{file}: {line}"
        return
    command.make_context(command.name, [*words])  # refuses unknown options, missing arguments, wrong types
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"[a-z_]+(\.[\w-]+)+", key):
            assert_key(key, file)


def without_own(group: Any, words: list[str]) -> list[str]:
    """The words after a group's own options and arguments: `headrace ctl RUN status` has its run before the command."""
    context = group.make_context(group.name, [*words], resilient_parsing=True)
    own = [parameter for parameter in group.params if parameter.param_type_name == "argument"]
    return [*context._protected_args, *context.args] if own else words


def assert_key(key: str, where: str) -> None:
    """`key` is one of a run's configuration."""
    node: Any = RunConfig
    for part in key.split("."):
        if isinstance(node, type) and issubclass(node, BaseModel):
            assert part in node.model_fields, f"{where}: no key {key!r}"
            node = node.model_fields[part].annotation
            items = [item for item in getattr(node, "__args__", ()) if isinstance(item, type)]
            if items and issubclass(items[0], BaseModel):
                node = {"any name": items[0]} if get_origin(node) is list else items[0]
        else:
            assert isinstance(node, dict), f"{where}: no key {key!r}"
            node = node["any name"]


# -- configuration in pages -----------------------------------------------------------------------------------------

YAML_BLOCKS = [(name, text) for name, page in zip(NAMES, PAGES, strict=True) for text in blocks(page, "yaml")]


@pytest.mark.parametrize(("file", "text"), YAML_BLOCKS, ids=[name for name, _ in YAML_BLOCKS])
def test_yaml_in_pages_has_valid_keys(file: str, text: str) -> None:
    content = yaml.safe_load(text)
    for whole in (Site, PrepConfig):
        if set(content) <= set(whole.model_fields):
            whole.model_validate(content)
            return
    for key in dotted_keys(content):
        assert_key(key, file)
    for source in content.get("data", {}).get("sources", []):
        TypeAdapter(list[Transform]).validate_python(source.get("transforms", []))
        TypeAdapter(list[Objective]).validate_python(source.get("objectives", []))
    TypeAdapter(list[Objective]).validate_python(content.get("data", {}).get("objectives", []))
    AlertsConfig.model_validate(content.get("alerts", {}))


def dotted_keys(node: Any, path: str = "") -> Iterator[str]:
    """Every key of a configuration; free mappings (options of a policy or selector, `weights`) are not looked into."""
    for key, value in node.items():
        here = f"{path}{key}"
        yield here
        if here in ("data.policy.options", "train.selection.options") or key == "weights":
            continue
        if isinstance(value, dict):
            yield from dotted_keys(value, f"{here}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, dict) and key not in (
                    "transforms",
                    "objectives",
                    "hooks",
                ):  # of kinds with keys of their own: checked below
                    yield from dotted_keys(item, f"{here}.{item.get('name', number)}.")


# -- lists that must be whole ---------------------------------------------------------------------------------------


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {re.split(r"[^\w.-]", requirement)[0] for group in groups for requirement in group}
    listed = dict(re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", (DOCS / "dependencies.md").read_text(), re.MULTILINE))
    assert set(listed) == wanted
    assert all(reason.strip() for reason in listed.values())


def test_every_event_and_exit_code_is_explained() -> None:
    page = (DOCS / "run_folder.md").read_text()
    for kind in KINDS:
        assert re.search(rf"^\|[^|]*`{kind}`", page, re.MULTILINE), kind
    codes = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE))
    assert codes == {str(int(code)): code.name for code in ExitCode}


# -- code and proofs ------------------------------------------------------------------------------------------------


def test_code_of_the_page_on_the_scheduler_alone_runs(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sample").mkdir(parents=True)
    (tmp_path / "data" / "tokenizer").symlink_to(corpus)
    for source, folder in (("code", "a"), ("prose", "b")):
        target = tmp_path / "data" / "sample" / source
        target.mkdir()
        for file in (corpus / folder).iterdir():
            (target / f"train-{file.name}").symlink_to(file)
    scope: dict[str, Any] = {}
    for block in blocks(DOCS / "how-to" / "use-the-scheduler-alone.md", "python"):
        exec(compile(block, "use-the-scheduler-alone.md", "exec"), scope)
    assert scope["batch"]["tokens"].shape == (24, 257)
    assert scope["state"]["step"] == 3
    assert (tmp_path / "runs" / "mine" / "journal.jsonl").exists()
    assert scope["alone"].state_dict()["step"] == 1
    policy = scope["Harder"]({"code": 0.7, "prose": 0.3})
    policy.load_state_dict({})
    assert policy.weights(9, [Feedback(0, {"code": 3.0, "prose": 4.0})]) == {"code": 0.7, "prose": 0.6}


@pytest.mark.parametrize("sources", [4, 10, 50])
def test_the_lower_bound_of_decision_001_is_met_exactly(sources: int) -> None:
    names = [str(number) for number in range(sources)]
    mixer, drawn, worst = Mixer(sources), np.zeros(sources, dtype=np.int64), 0
    for left in range(sources, 1, -1):
        undrawn = [names[number] for number in np.flatnonzero(drawn == 0)][:left]
        drawn += mixer.counts(quantize(dict.fromkeys(undrawn, 1.0), names), 1)
        worst = max(worst, int(np.abs(mixer.owed).max()))
    bound = sum(Fraction(1, left) for left in range(2, sources + 1))
    assert abs(Fraction(worst, ONE) - bound) < Fraction(1, 10**9)
    assert f"{float(bound):.2f} for {sources}" in (DOCS / "decisions" / "001-mixture-bound.md").read_text()
