"""`EmbeddingModel` over the BERT encoder, and texts to vectors with a tokenizer in front of it.

Clauses: FM-EMBED-1..5, FM-TEXT-1..4 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, UnsupportedError
from ferrum_ref.interfaces.families import EmbeddingModel
from ferrum_ref.interfaces.families_data import Embedding
from ferrum_ref.interfaces.tokenizer import Tokenizer
from ferrum_ref.models.bert import BertEncoder
from ferrum_ref.models.bert_pooling import SentenceSettings, normalized, pool

Embeddings = npt.NDArray[np.float32]
"""Vectors `[B, E]`."""


class BertEmbeddingModel(EmbeddingModel):
    """Ids to vectors. Stateless, safe to share between threads.  [FM-EMBED-1..5]"""

    def __init__(self, encoder: BertEncoder, settings: SentenceSettings | None = None) -> None:
        """Without settings: the mean of the token vectors, not normalised."""
        self.encoder = encoder
        self.settings = settings or SentenceSettings(encoder.config.max_position_embeddings)

    @property
    def embedding_dim(self) -> int:
        """E, the length of a vector."""
        return self.encoder.config.hidden_size

    def embed(self, tokens: Sequence[int]) -> Embedding:
        """See EmbeddingModel.embed; pooled and normalised as the settings say.  [FM-EMBED-1..3]"""
        (vector,) = self.embed_batch([tokens])
        return np.asarray(vector)

    def embed_batch(self, sequences: Sequence[Sequence[int]], *, normalize: bool | None = None) -> Embeddings:
        """`[B, E]`, one row for each sequence, as `embed` gives it.  [FM-EMBED-4..5]

        `normalize` overrides the settings. No sequence: `[0, E]`. Pure. Raises as `embed` does, for the whole batch.
        """
        if not len(sequences):
            return np.empty((0, self.embedding_dim), dtype=np.float32)
        backend = self.encoder.backend
        hidden = self.encoder.forward(sequences)
        rows = backend.tensor_ops().concat([pool(each, self.settings.pooling, backend) for each in hidden], 0)
        if self.settings.normalize if normalize is None else normalize:
            rows = normalized(rows, backend)
        return np.array(rows.to_numpy(), dtype=np.float32)


class SentenceEmbedder:
    """Texts to vectors: tokenizer, truncation, model, in batches.  [FM-TEXT-1..4]"""

    def __init__(self, model: BertEmbeddingModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def token_ids(self, text: str) -> list[int]:
        """The ids that are embedded: with special tokens, the text's own cut to fit max_tokens.  Pure.  [FM-TEXT-1..2]

        Raises UnsupportedError if the tokenizer puts special tokens inside a text that has to be cut, or the limit
        leaves no room for any; TokenizerError (text).
        """
        settings = self.model.settings
        text = text.lower() if settings.lower_case else text
        whole = self.tokenizer.encode(text, True)
        excess = len(whole) - settings.max_tokens
        if excess <= 0:
            return whole
        own = self.tokenizer.encode(text, False)
        first = next((i for i in range(len(whole) - len(own) + 1) if whole[i : i + len(own)] == own), None)
        if first is None or excess > len(own):
            raise UnsupportedError(
                f"embed text: {len(whole)} tokens cannot be cut to {settings.max_tokens}: special tokens are in the way"
            )
        end = first + len(own)
        return whole[: end - excess] + whole[end:]

    def embed_texts(self, texts: Sequence[str], *, normalize: bool | None = None, batch_size: int = 32) -> Embeddings:
        """`[B, E]`, one row for each text.  Pure.  [FM-TEXT-3..4]

        Texts run in batches of that many; how they are grouped changes the last bits at most.
        Raises InvalidParameterError (batch_size), TokenizerError (text).
        """
        if batch_size < 1:
            raise InvalidParameterError(f"embed_texts: batch_size must be >= 1, got {batch_size}")
        sequences = [self.token_ids(text) for text in texts]
        parts = [
            self.model.embed_batch(sequences[start : start + batch_size], normalize=normalize)
            for start in range(0, max(len(sequences), 1), batch_size)
        ]
        return np.concatenate(parts)
