"""YAML 1.2 where PyYAML differs: ``1e-3`` is a number, not a text, and a key must not be given twice."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here merge keys (<<) are not expanded yet: what they bring in may be given again.
        node = super().compose_mapping_node(anchor)
        given = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in given:
                    raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
                given.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        yaml.YAMLError: it is not YAML, nested too deeply, or a mapping has a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # of PyYAML's own: an impossible date, a number of too many digits
        raise yaml.YAMLError(str(error)) from error
