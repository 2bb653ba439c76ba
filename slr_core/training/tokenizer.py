"""A word-level tokenizer for ProsQA: few tokens per fact, and every sentence can be written back exactly.

"Every wumpus is a rorpus." is two tokens, ``Every wumpus`` and `` is a rorpus.``; a graph of ten nodes is
some twenty tokens instead of sixty. Each token is a template around one word, and tokens that share the
word start from related embeddings (:func:`start_embeddings`).
"""

from __future__ import annotations

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from slr_core.tasks.prosqa import CONCEPTS, NAMES

_SPECIAL = ("<pad>", "<eos>", "<unk>")
_NAME_TEMPLATES = ("{}", "Is {}")
_CONCEPT_TEMPLATES = ("Every {}", " is a {}.", " a {}", " or {}?")


def prosqa_tokenizer(*, chain_of_thought: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer; what it does not know becomes ``<unk>``. A chain of thought needs one token more, ``#``."""
    words = [t.format(name) for t in _NAME_TEMPLATES for name in NAMES]
    words += [t.format(concept) for t in _CONCEPT_TEMPLATES for concept in CONCEPTS]
    words += ["#"] if chain_of_thought else []
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # The blank between two sentences carries nothing: it is dropped here and put back when decoding.
    blanks = [normalizers.Replace(Regex(r"(?<=\.)\s+"), ""), normalizers.Replace(Regex(r"\s*#\s*"), "#")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), *blanks[: 1 + chain_of_thought]])
    pieces = r"Every \w+|Is \w+| is a \w+\.| a \w+| or \w+\?|\w+" + ("|#" if chain_of_thought else "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    spaced = [decoders.Replace(Regex(r"\.(?=\w)"), ". "), decoders.Replace(Regex("#"), " # ")]
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), *spaced[: 1 + chain_of_thought]])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def start_embeddings(tokenizer: PreTrainedTokenizerFast, hidden_size: int, generator: torch.Generator) -> Tensor:
    """An embedding table ``[V, d]`` in which a token starts as its word's vector plus its template's.

    ``Every wumpus`` and `` is a wumpus.`` mean the same node; without this start the model must first
    learn so for every concept from data.
    """
    vocabulary = tokenizer.get_vocab()
    symbols = re.compile(r"\b(" + "|".join((*NAMES, *CONCEPTS)) + r")\b")
    vectors: dict[str, Tensor] = {}

    def vector(key: str, std: float) -> Tensor:
        if key not in vectors:
            vectors[key] = std * torch.randn(hidden_size, generator=generator)
        return vectors[key]

    table = torch.zeros(len(vocabulary), hidden_size)
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        match = symbols.search(token)
        if match is None:
            table[index] = vector(token, 0.05)
        else:
            table[index] = vector(match.group(), 0.05) + vector(symbols.sub("{}", token), 0.035)
    return table
