"""Spaces before punctuation taken out of decoded text, for tokenizers whose files ask for it.  [TK-DECODE-3]

Source: transformers, `clean_up_tokenization`: ten replacements over the whole text, one after another.
"""

from __future__ import annotations

from typing import Final

_REPLACEMENTS: Final = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_JOINING: Final = " '"


def clean_up(text: str) -> str:
    """The text without the spaces that word-based decoders put before punctuation.  Pure."""
    for found, instead in _REPLACEMENTS:
        text = text.replace(found, instead)
    return text


def split_final(text: str) -> tuple[str, str]:
    """The longest head that can be cleaned up on its own whatever follows, and the rest.  Pure.

    Every replacement begins with a space, and only " ' " has a second one.  So no replacement, nor one that another
    has made possible, reaches over a space that stands between two characters that are neither space nor apostrophe.
    """
    for place in range(len(text) - 2, 0, -1):
        if text[place] == " " and text[place - 1] not in _JOINING and text[place + 1] not in _JOINING:
            return text[:place], text[place:]
    return "", text
