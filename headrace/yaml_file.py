"""YAML as every configuration file here is read: plain data in, or one line that says what is wrong and where.

PyYAML follows YAML 1.1. Three of its habits would change what a configuration means, so they are switched off, as in
YAML 1.2: `3e-4` is a number, `04:00:00` is no number of seconds, and `2026-01-31` is no date object. And a key that
stands twice in one section is refused; PyYAML would drop the first, with all that is below it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from headrace.errors import ConfigError

Location = tuple[str | int, ...]
"""The way to a value: keys and numbers of list items."""

_FLOAT, _INT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("float", "int", "timestamp"))
_RESOLVERS = {
    first: [(tag, rule) for tag, rule in rules if tag not in (_FLOAT, _INT, _DATE)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT_RULE = re.compile(
    r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
_INT_RULE = re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = dict(_RESOLVERS)  # noqa: RUF012 (PyYAML declares it so)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key.value!r} stands here twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Puts quotes around strings that `_Loader` would read as something else."""

    yaml_implicit_resolvers = dict(_RESOLVERS)  # noqa: RUF012 (PyYAML declares it so)


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Unicode's own line breaks are escaped; PyYAML writes them bare and would read them back as spaces."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)
for _way in (_Loader, _Dumper):
    _way.add_implicit_resolver(_INT, _INT_RULE, list("-+0123456789"))
    _way.add_implicit_resolver(_FLOAT, _FLOAT_RULE, list("-+0123456789."))


class YamlFile(NamedTuple):
    """A file's contents."""

    path: Path
    data: Any
    """Plain data; None for an empty file."""
    root: yaml.Node | None

    def mapping(self, keys: Sequence[str]) -> dict[str, Any]:
        """The contents when they are a mapping; else raises ConfigError that lists `keys`, those it may have."""
        if not isinstance(self.data, dict):
            raise ConfigError(f"{self.path}: expected a mapping with keys of: {', '.join(keys)}")
        return self.data

    def line(self, location: Location) -> int:
        """The line (from 1) of the value at `location`, or of the nearest one around it that is there."""
        node, line = self.root, 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line


def read_yaml(path: str | Path) -> YamlFile:
    """The YAML file at `path`. Raises ConfigError: `run.yaml:12:3: not valid YAML: …`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: file not found") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the YAML file in it") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    try:
        return YamlFile(path, *_parse(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str) -> Any:
    """`text` as plain data. Raises yaml.YAMLError."""
    return _parse(text)[0]


def dump_yaml(data: Any) -> str:
    """Plain data as YAML, keys in their order; `parse_yaml` reads back the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str) -> tuple[Any, yaml.Node | None]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return (None if root is None else loader.construct_document(root)), root
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()
