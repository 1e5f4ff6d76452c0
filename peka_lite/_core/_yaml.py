"""Read YAML of received files: plain values only, of limited size and depth."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from peka_lite._core._file_kinds import read_bytes

LARGEST = 2**25  # bytes of a file; a sweep of 100,000 points takes about a third
MOST = 3_000_000  # values, keys and list ends in a file; reading that many takes about 20 seconds
DEEPEST = 32  # nested lists and mappings; a manifest has 5
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Load ``1e-4`` as a number, as YAML 1.2 does, and dates as text; refuse duplicate keys."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one plain value", key.start_mark)
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is there twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Unsupported(ValueError):
    """Report YAML that is valid but not supported."""


class _Dumper(yaml.SafeDumper):
    """Write repeated values in full, since `parse_yaml` reads no aliases."""

    def ignore_aliases(self, data) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":merge"))]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # quote text that would be read as a number


def read_yaml(path: str | os.PathLike, *, largest: int = LARGEST):
    """Read a UTF-8 YAML file of at most `largest` bytes; errors are those of `parse_yaml`, and name the file."""
    content = read_bytes(path := Path(path), longest=largest)
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid YAML: not UTF-8 text ({error}); save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_yaml(text: str):
    """Parse YAML into plain values: text, numbers, booleans, null, lists and mappings.

    Refuse duplicate keys, tags, more than 32 nested levels, and aliases and anchors (``*name``, ``&name``: a few lines
    can expand without limit).
    """
    try:
        depth = 0
        for n, event in enumerate(yaml.parse(text, _Loader)):
            if n > MOST:
                raise _Unsupported(f"it holds more than {MOST:,} values")
            place = f"line {event.start_mark.line + 1}"
            if anchor := getattr(event, "anchor", None):
                sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
                raise _Unsupported(f"{place} has an anchor or alias ('{sign}{anchor}'); write the value out")
            if getattr(event, "tag", None) not in (None, "!"):
                raise _Unsupported(f"{place} has a tag ({event.tag}); give plain values")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise _Unsupported(f"{place} is nested more than {DEEPEST} levels deep")
        return yaml.load(text, _Loader)
    except _Unsupported as error:
        raise ValueError(str(error)) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " at").split())
        raise ValueError(f"invalid YAML: {reason}") from None


def yaml_text(value) -> str:
    """Return plain values as YAML for `parse_yaml`, with keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_line(value) -> bool:
    """Return whether a value is a non-empty line of text, no longer than a path may be."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and not _CONTROL.search(value)
