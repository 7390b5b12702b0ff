"""Train the quickstart model over a gang of workers, within a budget of seconds; resumable at any step.

Every worker holds the whole model and computes its share of each batch; XLA adds the all-reduce because the rows
are sharded and the loss is a mean over all of them. What the workers must agree on travels the same way: with each
batch go two *votes*, the fraction of the budget that is spent (rank 0's clock) and whether this worker was told to
stop. Their sums come back equal everywhere, so that all use one learning rate and leave after the same step.

Settings from the environment: TRAIN_SECONDS (45), MAX_STEPS (none), and the worker's variables RANK, WORLD_SIZE,
JAX_COORDINATOR_ADDRESS, TIDEMILL_CHECKPOINT_DIR, TIDEMILL_OUTPUT_DIR, XDG_CACHE_HOME.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import checkpoint
import jax
import jax.numpy as jnp
import model
import numpy as np
from architecture import Config, init_weights
from data import Corpus, read_corpus, train_batch, val_batch
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SEED: Final = 2026
EVALUATIONS: Final = 6
CHECKPOINT_EVERY_S: Final = 10.0
REPORT_EVERY_S: Final = 1.0
EXIT_STOPPED: Final = 128 + signal.SIGTERM
CPU_CONFIG: Final = Config()
GPU_CONFIG: Final = Config(width=512, depth=6, heads=8, context=256, ngram_bits=16)

State = dict[str, model.Weights]  # "weights" and the "first" and "second" moments of AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says. ``max_steps`` zero: the clock alone decides."""

    rank: int
    world_size: int
    coordinator: str
    seconds: float
    max_steps: int
    checkpoints: Path
    output: Path
    cache: Path

    @classmethod
    def from_environment(cls) -> Settings:
        env = os.environ
        address = f"{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29500')}"
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")),
            coordinator=env.get("JAX_COORDINATOR_ADDRESS", address),
            seconds=float(env.get("TRAIN_SECONDS", "45")),
            max_steps=int(env.get("MAX_STEPS", "0")),
            checkpoints=Path(env.get("TIDEMILL_CHECKPOINT_DIR", "checkpoints")),
            output=Path(env.get("TIDEMILL_OUTPUT_DIR", "output")),
            cache=Path(env.get("XDG_CACHE_HOME", "~/.cache")).expanduser(),
        )


@dataclass(slots=True)
class Progress:
    """How far the run is. Everything but the parameters that a resumed run needs to go on as if not stopped."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    fraction: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Fleet:
    """The devices of all workers as one mesh, and how arrays are laid out on it."""

    def __init__(self, settings: Settings) -> None:
        self.rank, self.world_size = settings.rank, settings.world_size
        self._mesh = Mesh(np.array(jax.devices()), ("data",))
        self.everywhere = NamedSharding(self._mesh, PartitionSpec())
        self.by_row = NamedSharding(self._mesh, PartitionSpec("data"))
        self.platform = jax.devices()[0].platform

    def replicate(self, tree: Any) -> Any:
        """The same values on every device; rank 0's are the ones that count."""
        if self.world_size > 1:
            tree = multihost_utils.broadcast_one_to_all(tree)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(self.everywhere, leaf), tree)

    def spread(self, looked_up: jax.Array) -> jax.Array:
        """Each device's rows of what every device has looked up for the whole batch.

        The detour matters on the way back: the gradient at the input (a megabyte) is gathered and every worker
        adds up the n-gram tables' gradient itself, instead of all-reducing those tables (15 megabytes a step).
        """
        everywhere = jax.lax.with_sharding_constraint(looked_up, self.everywhere)
        return jax.lax.with_sharding_constraint(everywhere, self.by_row)

    def share(self, rows: np.ndarray) -> jax.Array:
        """This worker's rows as part of the global array."""
        return jax.make_array_from_process_local_data(self.by_row, rows)


def main() -> int:
    settings = Settings.from_environment()
    start_jax(settings)
    stop_requested: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _frame: stop_requested.append(signum))
    fleet = Fleet(settings)
    config = CPU_CONFIG if fleet.platform == "cpu" else GPU_CONFIG
    corpus = read_corpus()
    say = partial(print, flush=True) if fleet.rank == 0 else _say_nothing
    state, progress = restore_or_begin(fleet, config, settings.checkpoints, say)
    parameters = sum(leaf.size for leaf in state["weights"].values())
    amount = f"{corpus.files} files  {corpus.size / 1e6:.1f} MB  {corpus.tokens / 1e6:.1f}M tokens"
    say(f"data  {amount}  Python source under {corpus.root}")
    say(f"model  {parameters / 1e6:.2f}M parameters  device {fleet.platform} {jax.devices()[0].device_kind}")
    say(f"gang  world size {fleet.world_size}  devices {jax.device_count()}  budget {settings.seconds:.0f}s")

    state = train(fleet, config, corpus, state, progress, settings, lambda: bool(stop_requested), say)
    if fleet.rank == 0:
        save(settings.checkpoints, config, state, progress)
    finished = progress.fraction >= 1
    if finished:
        finish(fleet, config, corpus, state, progress, settings.output, say)
    else:
        say(f"stopped  step {progress.step}: checkpoint saved, the next attempt goes on from here")
    if fleet.world_size > 1:
        jax.distributed.shutdown()
    return 0 if finished else EXIT_STOPPED


def start_jax(settings: Settings) -> None:
    """Join the gang and keep compiled programs for the next run (JAX writes and finds those of rank 0 only)."""
    os.environ.setdefault("NPROC", os.environ.get("OMP_NUM_THREADS", "1"))  # XLA's threads: what was granted
    jax.config.update("jax_compilation_cache_dir", str(settings.cache / "tidemill-quickstart-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if settings.world_size > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            settings.coordinator, settings.world_size, settings.rank, heartbeat_timeout_seconds=20
        )


def restore_or_begin(fleet: Fleet, config: Config, folder: Path, say: Callable[..., None]) -> tuple[State, Progress]:
    """The newest whole checkpoint that fits the model, as rank 0 finds it, or a fresh start."""
    weights = init_weights(config, seed=SEED)
    zeros = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    state: dict[str, checkpoint.Arrays] = {"weights": weights, "first": zeros, "second": dict(zeros)}
    progress = Progress()
    if fleet.rank == 0:
        saved, damaged = checkpoint.restore(folder)
        for path in damaged:
            say(f"resume  {path.name} is damaged: passed over")
        if saved and saved.header["config"] != config.to_json():
            say(f"resume  {saved.path.name} is of another model: starting from the beginning")
        elif saved:
            state = {part: {name: saved.arrays[f"{part}/{name}"] for name in leaves} for part, leaves in state.items()}
            progress = Progress(**saved.header["progress"])
            say(f"resume  {saved.path.name}  step {progress.step}  elapsed {progress.elapsed:.1f}s")
    counts = np.array([progress.step, progress.tokens, progress.elapsed, progress.fraction], np.float32)
    if fleet.world_size > 1:
        counts = multihost_utils.broadcast_one_to_all(counts)
        progress.step, progress.fraction = int(counts[0]), float(counts[3])
    return fleet.replicate(state), progress


def train(
    fleet: Fleet,
    config: Config,
    corpus: Corpus,
    state: State,
    progress: Progress,
    settings: Settings,
    stop_requested: Callable[[], bool],
    say: Callable[..., None],
) -> State:
    """The state when the budget is spent or a worker was told to stop; ``progress`` is brought up to date."""
    rows = (8 if fleet.platform == "cpu" else 64) * jax.device_count()
    tokens_per_step = rows * config.context
    advance = jax.jit(
        partial(_advance, config=config, spread=fleet.spread), donate_argnums=0, out_shardings=fleet.everywhere
    )
    clock = Clock(progress.elapsed)
    reported, saved = (progress.elapsed, progress.step), progress.elapsed
    while progress.fraction < 1:
        windows = train_batch(corpus.train, seed=SEED, step=progress.step, rows=rows, context=config.context)
        votes = np.zeros((jax.local_device_count(), 2), np.float32)
        votes[0] = (spent(clock.elapsed, progress.step, settings) if fleet.rank == 0 else 0), stop_requested()
        state, outcome = advance(state, windows, fleet.share(votes), np.float32(progress.step))
        loss, fraction, stop_votes = np.asarray(outcome).tolist()
        before, progress.fraction = progress.fraction, fraction
        progress.step, progress.tokens = progress.step + 1, progress.tokens + tokens_per_step
        progress.elapsed = clock.tick()
        if progress.elapsed - reported[0] >= REPORT_EVERY_S:
            rate = (progress.step - reported[1]) * tokens_per_step / (progress.elapsed - reported[0])
            total = max(progress.step, round(progress.step / max(fraction, 1e-6)))
            say(
                f"step {progress.step:6d}/{total}  loss {loss:.3f}  tokens/s {rate:.0f}"
                f"  elapsed {progress.elapsed:.1f}s"
            )
            progress.curve.append({"step": progress.step, "seconds": progress.elapsed, "loss": loss})
            reported = progress.elapsed, progress.step
        if stop_votes:
            break
        if int(before * EVALUATIONS) < int(fraction * EVALUATIONS) < EVALUATIONS:
            val_loss = evaluate(fleet, config, corpus, state, rows=32)
            say(f"eval  step {progress.step}  val_loss {val_loss:.3f}")
            progress.curve.append({"step": progress.step, "seconds": progress.elapsed, "val_loss": val_loss})
        if fleet.rank == 0 and progress.elapsed - saved >= CHECKPOINT_EVERY_S:
            save(settings.checkpoints, config, state, progress)
            saved = progress.elapsed
    return state


class Clock:
    """Seconds of training over all attempts. It starts with the second step: the first one compiles."""

    def __init__(self, before: float) -> None:
        self._before, self._started = before, 0.0

    @property
    def elapsed(self) -> float:
        return self._before + (time.monotonic() - self._started if self._started else 0.0)

    def tick(self) -> float:
        """Say that a step ended. Returns the seconds so far."""
        self._started = self._started or time.monotonic()
        return self.elapsed


def spent(elapsed: float, step: int, settings: Settings) -> float:
    """The fraction of the budget that is used up, 1 at most: seconds, or steps where there is a limit."""
    by_steps = step / settings.max_steps if settings.max_steps else 0.0
    return min(1.0, max(elapsed / settings.seconds, by_steps))


def evaluate(fleet: Fleet, config: Config, corpus: Corpus, state: State, *, rows: int) -> float:
    """Mean loss over ``rows`` windows per device of the held-out files."""
    windows = val_batch(corpus.val, rows=rows * jax.device_count(), context=config.context)
    return float(np.asarray(_loss(state["weights"], windows, config=config, spread=fleet.spread)))


def save(folder: Path, config: Config, state: State, progress: Progress) -> None:
    arrays = {f"{part}/{name}": np.asarray(leaf) for part, leaves in state.items() for name, leaf in leaves.items()}
    header = {"config": config.to_json(), "progress": progress.to_json()}
    checkpoint.save(folder, progress.step, header, arrays)


def finish(
    fleet: Fleet,
    config: Config,
    corpus: Corpus,
    state: State,
    progress: Progress,
    output: Path,
    say: Callable[..., None],
) -> None:
    """Measure the model on more of the held-out files and leave it in ``output``/model."""
    val_loss = evaluate(fleet, config, corpus, state, rows=32 if fleet.platform == "cpu" else 128)
    if fleet.rank == 0:
        folder = output / "model"
        weights = {name: np.asarray(leaf) for name, leaf in state["weights"].items()}
        checkpoint.write_archive(folder / "weights.npz", {"step": progress.step}, weights)
        checkpoint.write_json(folder / "config.json", config.to_json())
        checkpoint.write_json(folder / "metrics.json", {"val_loss": val_loss, **progress.to_json()})
    say(
        f"done  steps {progress.step}  val_loss {val_loss:.3f}  tokens {progress.tokens}"
        f"  seconds {progress.elapsed:.1f}"
    )


def _advance(
    state: State, windows: jax.Array, votes: jax.Array, step: jax.Array, *, config: Config, spread: model.Spread
) -> tuple[State, jax.Array]:
    fraction, stop_votes = jnp.sum(votes, axis=0)
    loss, gradient = jax.value_and_grad(model.loss)(state["weights"], windows, config, spread)
    weights, first, second = model.adamw(state["weights"], state["first"], state["second"], gradient, step, fraction)
    return {"weights": weights, "first": first, "second": second}, jnp.stack([loss, fraction, stop_votes])


_loss = jax.jit(model.loss, static_argnames=("config", "spread"))


def _say_nothing(_text: str) -> None:
    """What ranks other than 0 say."""


if __name__ == "__main__":
    sys.exit(main())
