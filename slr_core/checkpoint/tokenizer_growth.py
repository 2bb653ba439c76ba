"""How much longer a tokenizer may make a text: a prompt before it is tokenized, and an answer when it is decoded."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from slr_core.checkpoint.validate import checkpoint_error

MAX_GROWTH = 64
"""Characters that replacements may make of one. The normal forms of Unicode come on top: at most 18 for one."""


def check_growth(path: Path, parts: dict[str, Any]) -> None:
    """Refuse a ``tokenizer.json`` whose replacements make a text much longer.

    Args:
        path: of the file, for the message.
        parts: its content.

    Raises:
        CheckpointError: they do.
    """
    for name in ("normalizer", "decoder"):
        growth = _growth(parts.get(name) or {"type": "none"})
        if growth > MAX_GROWTH:
            raise checkpoint_error(path, f"its {name} may make {growth} characters of one; at most {MAX_GROWTH}")


def _growth(part: dict[str, Any]) -> int:
    match part["type"]:
        case "Sequence":
            product = 1
            for inner in (*part.get("normalizers", ()), *part.get("decoders", ())):
                product *= _growth(inner)
            return product
        case "Replace" if set(part["pattern"]) == {"String"} and part["pattern"]["String"]:
            return max(1, -(-len(part["content"]) // len(part["pattern"]["String"])))
        case "Replace":  # a pattern may match nothing, before every character
            return 1 + len(part["content"])
        case "Precompiled":
            return max(1, _longest_replacement(part["precompiled_charsmap"]))
        case _:
            return 1


def _longest_replacement(charsmap: str | list[int]) -> int:
    """The longest text in SentencePiece's map: the size of a trie (32 bits), the trie, texts that end with a zero."""
    data = base64.b64decode(charsmap) if isinstance(charsmap, str) else bytes(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(len(text.decode(errors="replace")) for text in texts)
