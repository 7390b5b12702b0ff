"""all-MiniLM-L6-v2 in NumPy: text to vectors of length one, which point the same way when texts mean the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

LONGEST = 256
"""Tokens of a text that are read, as the model was trained."""
_GELU = np.sqrt(2.0 / np.pi)


class Encoder:
    """The model in a folder as Hugging Face lays them out. Thread-safe: nothing changes once it is loaded."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self._weights = load_file(folder / "model.safetensors")
        self._layers, self._heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        self._epsilon = float(config["layer_norm_eps"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(LONGEST)
        self._tokenizer.enable_padding()

    def encode(self, texts: list[str]) -> tuple[NDArray[np.float32], int]:
        """A vector for each text, shape (N, 384), and how many tokens they have together."""
        found = self._tokenizer.encode_batch(texts)
        ids = np.array([one.ids for one in found])
        mask = np.array([one.attention_mask for one in found], dtype=np.float32)
        hidden = self._embed(ids)
        bias = np.where(mask, 0.0, -1e9).astype(np.float32)[:, None, None, :]
        for layer in range(self._layers):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, bias)
        pooled = (hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True), int(mask.sum())

    def _embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        words = self._weights["embeddings.word_embeddings.weight"][ids]
        places = self._weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
        kind = self._weights["embeddings.token_type_embeddings.weight"][0]
        return self._normed("embeddings.LayerNorm", words + places + kind)

    def _layer(self, name: str, hidden: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
        many, length, width = hidden.shape

        def split(what: str) -> NDArray[np.float32]:
            projected = self._linear(f"{name}.attention.self.{what}", hidden)
            return projected.reshape(many, length, self._heads, -1).transpose(0, 2, 1, 3)

        query, key, value = split("query"), split("key"), split("value")
        scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(width // self._heads) + bias
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        seen = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        seen = self._linear(f"{name}.attention.output.dense", seen.transpose(0, 2, 1, 3).reshape(hidden.shape))
        hidden = self._normed(f"{name}.attention.output.LayerNorm", seen + hidden)
        inner = self._linear(f"{name}.intermediate.dense", hidden)
        inner = 0.5 * inner * (1.0 + np.tanh(_GELU * (inner + 0.044715 * inner**3)))
        return self._normed(f"{name}.output.LayerNorm", self._linear(f"{name}.output.dense", inner) + hidden)

    def _linear(self, name: str, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        return hidden @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _normed(self, name: str, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        centred = hidden - hidden.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._epsilon)
        return scaled * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
