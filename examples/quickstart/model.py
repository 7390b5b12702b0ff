"""The model's forward pass and loss in JAX, and AdamW with a schedule by fraction of the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from architecture import NORM_EPSILON, ROPE_BASE, Config, ngram_rows

PEAK_RATE: Final = 5e-3  # at width 96; a wider model takes smaller steps
WARM_UP: Final = 0.03
BETA_1: Final = 0.9
BETA_2: Final = 0.95
WEIGHT_DECAY: Final = 0.1

Weights = dict[str, jax.Array]
Spread = Callable[[jax.Array], jax.Array]


def loss(weights: Weights, windows: jax.Array, config: Config, spread: Spread) -> jax.Array:
    """Mean cross-entropy in nats per token. Shapes: windows (rows, context + 1).

    ``spread`` lays out the looked-up input over the devices, each of which goes on with its share of the rows.
    """
    scores = logits(weights, windows[:, :-1], config, spread)
    target = jnp.take_along_axis(scores, windows[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - target)


def logits(weights: Weights, tokens: jax.Array, config: Config, spread: Spread) -> jax.Array:
    """Scores of the next byte at every position. Shapes: tokens (rows, time) -> (rows, time, 256)."""
    rows, time = tokens.shape
    head_width = config.width // config.heads
    causal = jnp.tril(jnp.ones((time, time), bool))
    x = weights["embed"][tokens]
    for length in config.ngrams:
        x += weights[f"ngram.{length}"][ngram_rows([_delay(tokens, by) for by in range(length)], config.ngram_bits)]
    x = _norm(spread(x))
    for layer in range(config.depth):
        block = f"block.{layer}"
        qkv = (_norm(x) @ weights[f"{block}.qkv"]).reshape(rows, time, 3 * config.heads, head_width)
        q, k, v = jnp.split(qkv, 3, axis=2)
        affinity = jnp.einsum("bqhd,bkhd->bhqk", _rotate(q), _rotate(k)) / math.sqrt(head_width)
        attention = jax.nn.softmax(jnp.where(causal, affinity, -1e9), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(rows, time, config.width)
        x += mixed @ weights[f"{block}.out"]
        x += jnp.square(jax.nn.relu(_norm(x) @ weights[f"{block}.up"])) @ weights[f"{block}.down"]
    return _norm(x) @ weights["embed"].T


def adamw(
    weights: Weights, first: Weights, second: Weights, gradient: Weights, step: jax.Array, fraction: jax.Array
) -> tuple[Weights, Weights, Weights]:
    """New weights and moments. Only the matrices of the blocks decay. Source: Loshchilov and Hutter 2019."""
    rate = learning_rate(fraction, weights["embed"].shape[1])
    first = {name: BETA_1 * first[name] + (1 - BETA_1) * g for name, g in gradient.items()}
    second = {name: BETA_2 * second[name] + (1 - BETA_2) * g * g for name, g in gradient.items()}
    bias_1, bias_2 = 1 - BETA_1 ** (step + 1), 1 - BETA_2 ** (step + 1)

    def moved(name: str) -> jax.Array:
        decay = WEIGHT_DECAY if name.startswith("block") else 0.0
        direction = first[name] / bias_1 / (jnp.sqrt(second[name] / bias_2) + 1e-8)
        return weights[name] - rate * (direction + decay * weights[name])

    return {name: moved(name) for name in weights}, first, second


def learning_rate(fraction: jax.Array, width: int) -> jax.Array:
    """Linear warm-up, then a cosine to zero when the whole budget (``fraction`` 1) is spent."""
    peak = PEAK_RATE * 96 / width
    return peak * jnp.minimum(1, (fraction + 1e-3) / WARM_UP) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))


def _delay(tokens: jax.Array, by: int) -> jax.Array:
    return jnp.pad(tokens, ((0, 0), (by, 0)))[:, : tokens.shape[1]]


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions. Shapes: (rows, time, heads, head_width). Source: Su et al. 2021, halves paired."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * ROPE_BASE ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
