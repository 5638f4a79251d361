"""A configuration from a file: YAML, of which JSON is a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenprune.errors import InputError
from tokenprune.utils.files import absent, path_given, reason


def read_mapping(path: str | Path, keys: Iterable[str]) -> Mapping[str, Any]:
    """The keys and values of a file.

    Args:
        path: of it.
        keys: that are expected, for messages.

    Raises:
        InputError: the file cannot be read, is not YAML, holds something else, or has a key twice.
    """
    name = f"configuration {str(path)!r}"
    try:
        given = _loaded(path_given("config", path).read_text(encoding="utf-8"), name)
    except FileNotFoundError:
        raise InputError(f"configuration {absent(path)}") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read ({reason(error)}); give a YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{name}, line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    if not isinstance(given, Mapping):
        raise InputError(f"{name} holds {type(given).__name__}, expected keys and values: {', '.join(keys)}")
    return given


def _loaded(text: str, name: str) -> Any:
    """The value of a YAML document. Raises InputError for what is not YAML, and for a key that occurs twice, of which
    YAML takes the last."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Which sees every key."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise InputError(f"{name}, line {line}: key {key.value!r} is there twice; leave one out")
                    seen.add(key.value)
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    try:
        return yaml.load(text, Loader)
    except yaml.reader.ReaderError as error:
        line, problem = text[: error.position].count("\n") + 1, f"{error.reason}: {text[error.position]!a}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line + 1 if mark else 1, " ".join(filter(None, (error.problem, error.context)))
    raise InputError(f"{name}, line {line}: not YAML ({problem}); correct it")
