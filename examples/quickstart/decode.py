"""Generate bytes with the trained model, in NumPy: ready as soon as the weights are read, nothing to compile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from architecture import NORM_EPSILON, ROPE_BASE, Config, ngram_rows
from checkpoint import read_archive
from tokens import BOUNDARY, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next byte is drawn. ``temperature`` zero: the likeliest byte. ``seed`` None: different every time."""

    temperature: float = 0.6
    top_p: float = 0.9
    seed: int | None = None


class Model:
    """Weights in memory, shared by all requests; each request has its own ``_Session``."""

    def __init__(self, config: Config, weights: dict[str, np.ndarray]) -> None:
        self.config, self.weights = config, weights

    def generate(self, prompt: bytes, sampling: Sampling) -> Iterator[int]:
        """Tokens that go on from ``prompt`` without end, except where the model ends the file.

        Only the last ``context`` tokens of the prompt are read; after that the window slides.
        """
        rng = np.random.default_rng(sampling.seed)
        session = _Session(self.config, self.weights)
        scores = session.extend((bytes([BOUNDARY]) + encode(prompt))[-self.config.context :])
        while (byte := draw(scores, sampling, rng)) != BOUNDARY:
            yield byte
            scores = session.extend(bytes([byte]))


def load_model(folder: Path) -> Model:
    """The model that ``train.py`` left in ``folder``. Raises: OSError, ValueError, CheckpointDamagedError."""
    config = Config.from_json(json.loads((folder / "config.json").read_text()))
    return Model(config, read_archive(folder / "weights.npz")[1])


def draw(scores: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """One byte from the smallest set of likeliest bytes that holds ``top_p`` of the probability."""
    if sampling.temperature < 1e-4:
        return int(scores.argmax())
    odds = np.exp((scores - scores.max()) / sampling.temperature)
    order = np.argsort(-odds, kind="stable")
    mass = np.cumsum(odds[order])
    kept = int(np.searchsorted(mass, sampling.top_p * mass[-1])) + 1
    mass = mass[:kept]
    place = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return int(order[min(place, len(mass) - 1)])


class _Session:
    """The keys and values of one text, for the last ``context`` positions."""

    def __init__(self, config: Config, weights: dict[str, np.ndarray]) -> None:
        self._config, self._weights = config, weights
        empty = np.zeros((config.heads, 0, config.width // config.heads), np.float32)
        self._cache = [(empty, empty)] * config.depth
        self._tail = np.zeros(3, np.int64)
        self._position = 0

    def extend(self, text: bytes) -> np.ndarray:
        """Scores of the byte after ``text``, which goes on from what was given before. Shapes: (256,)."""
        config, weights = self._config, self._weights
        x = _norm(self._embed(np.frombuffer(text, np.uint8).astype(np.int64)))
        turn = _turn(np.arange(self._position, self._position + len(text)), config)
        for layer in range(config.depth):
            block = f"block.{layer}"
            qkv = (_norm(x) @ weights[f"{block}.qkv"]).reshape(len(text), 3, config.heads, -1).transpose(1, 2, 0, 3)
            keys = np.concatenate([self._cache[layer][0], _rotate(qkv[1], turn)], axis=1)
            values = np.concatenate([self._cache[layer][1], qkv[2]], axis=1)
            mixed = _attend(_rotate(qkv[0], turn), keys, values, config.context)
            self._cache[layer] = keys[:, 1 - config.context :], values[:, 1 - config.context :]
            x = x + mixed.transpose(1, 0, 2).reshape(len(text), -1) @ weights[f"{block}.out"]
            x = x + np.square(np.maximum(_norm(x) @ weights[f"{block}.up"], 0)) @ weights[f"{block}.down"]
        self._position += len(text)
        return _norm(x[-1]) @ weights["embed"].T

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        config = self._config
        line = np.concatenate([self._tail, tokens])
        self._tail = line[-3:]
        x = self._weights["embed"][tokens]
        for length in config.ngrams:
            newest_first = [line[3 - back : len(line) - back] for back in range(length)]
            x = x + self._weights[f"ngram.{length}"][ngram_rows(newest_first, config.ngram_bits)]
        return x


def _attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, context: int) -> np.ndarray:
    """Causal attention over at most ``context`` positions. Shapes: (heads, time, head_width)."""
    affinity = queries @ keys.transpose(0, 2, 1) / np.sqrt(queries.shape[-1], dtype=np.float32)
    time, total = affinity.shape[1:]
    if time > 1:
        distance = np.arange(total - time, total)[:, None] - np.arange(total)
        affinity = np.where((distance >= 0) & (distance < context), affinity, np.float32(-1e9))
    affinity = np.exp(affinity - affinity.max(axis=-1, keepdims=True))
    return affinity / affinity.sum(axis=-1, keepdims=True) @ values


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(NORM_EPSILON))


def _turn(positions: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    half = config.width // config.heads // 2
    angle = positions[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _rotate(x: np.ndarray, turn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    cos, sin = turn
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
