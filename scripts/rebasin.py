"""Two networks trained apart, and the way between them before and after their neurons are put into the same order.

    python scripts/rebasin.py --out runs/rebasin
    python scripts/rebasin.py --out runs/rebasin-cnn --model cnn --seeds 0 1 2

For each seed, two networks start from weights of their own, see the images in orders of their own, and end at about
the same loss. On the straight line between their weights the loss rises: the barrier. Then `ngjax.match_params`
permutes the neurons of the second one, which leaves its function as it was, and the line is walked again (Git Re-Basin,
Ainsworth et al. 2023, arXiv 2209.04836). Neurons in a random order are the control.

Writes `results.json` and `barrier.png` into the output folder, after every seed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import matplotlib as mpl
import numpy as np
import optax
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import ngjax
from ngjax import train, zoo
from ngjax.files import write_atomically
from ngjax.machine import describe_process
from ngjax.report import deviation_of, markdown_table, save_figure, with_deviation

EVALUATION_BATCH = 1000

Measure = Callable[[Any, str], tuple[float, float]]  # (params, split) -> cross-entropy, accuracy

TABLE_NOTES = """\
barrier: the most that the cross-entropy on the line between the two networks lies above the straight line between
  their own; 0 if it never does. Means over the seeds, and the standard deviation where there are several.
accuracy half-way: of the mean of the two networks' weights, on the test images.
distance: between the weights of the two networks, relative to the distance as trained."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are those of the README's table."""

    out: pathlib.Path
    """Folder for results and the picture."""
    model: Literal["mlp", "cnn"] = "mlp"
    """Dense layers, or convolutions of 3 x 3 with stride 2, the mean over all places, and a dense layer."""
    width: int | None = None
    """Neurons of each hidden layer; for a CNN the channels of the first, after which they double. By default 512
    for an MLP and 32 for a CNN."""
    depth: int = 3
    """Hidden layers."""
    seeds: tuple[int, ...] = (0,)
    """A pair of networks for each."""
    images: Literal["mnist", "fashion_mnist", "cifar10", "digits"] = "mnist"
    data_dir: pathlib.Path | None = None
    """Folder with data sets, by default that of the environment variable NGJAX_DATA_DIR; else they are downloaded."""
    num_images: int | None = None
    """How many of the training images to train on, and of the test images to test on; all by default."""
    epochs: float = 10
    """Passes over the training images."""
    batch_size: int = 256
    learning_rate: float = 0.1
    """Of SGD with momentum, lowered to zero along a cosine."""
    weight_decay: float = 2e-3
    """Times the weights, added to the gradient. More of it leaves fewer neurons that do nothing and match nothing."""
    points: int = 25
    """Places at which the lines are looked at, both ends included."""
    line_images: int = 10_000
    """How many training images to take the training loss on the lines from."""


class Split(NamedTuple):
    """Images `[N, H, W, C]` and their classes."""

    images: np.ndarray
    labels: np.ndarray


class Line(NamedTuple):
    """What is found at each point on the way from one network to another.

    Attributes:
      test_loss, train_loss: cross-entropy.
      test_accuracy: share of the test images.
      distance: between the weights at the ends.
    """

    test_loss: list[float]
    train_loss: list[float]
    test_accuracy: list[float]
    distance: float


LINES = {
    "as_trained": "as trained",
    "random": "neurons in a random order",
    "matched": "matched by ngjax.match_params",
}


class Outcome(NamedTuple):
    """What came out for one seed."""

    seed: int
    lines: dict[str, Line]  # by the keys of LINES
    train_seconds: float
    match_seconds: float


def main(config: Config) -> dict[str, Any]:
    """Runs all seeds; returns what results.json holds."""
    if not config.seeds or config.points < 3 or config.epochs <= 0:
        raise ValueError(
            f"seeds={config.seeds}, points={config.points}, epochs={config.epochs}: expected at least one seed, at "
            "least 3 points and epochs above 0"
        )
    out = train.prepare_folder(config.out)  # before any work: an unwritable folder fails here
    data = {split: load_split(config, split) for split in ("train", "test")}
    model = make_model(config, int(data["train"].labels.max()) + 1)
    example = jax.ShapeDtypeStruct((1, *data["train"].images.shape[1:]), np.float32)
    spec = ngjax.trace_spec(model.apply, jax.eval_shape(model.init, jax.random.key(0), example), example)
    print(f"{config.model} on {config.images}: {', '.join(f'{len(of.labels):,} {name}' for name, of in data.items())}")
    print(spec, flush=True)
    measure = make_measure(config, model, data)
    outcomes: list[Outcome] = []
    for seed in config.seeds:
        outcomes.append(run_seed(config, model, spec, data, measure, seed))
        results = summarize(config, spec, outcomes)
        with write_atomically(out / "results.json") as path:  # after every seed: what is done is kept, whatever comes
            path.write_text(json.dumps(results, indent=2) + "\n")
        save_figure(draw_lines(config, outcomes), out / "barrier.png")
    print("\n" + "\n".join(results["table"]) + f"\n\n{TABLE_NOTES}\n\nnumbers and picture are in {out}")
    return results


# -- networks ---------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, images):
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, images):
        x = images
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def make_model(config: Config, classes: int) -> nn.Module:
    if config.model == "mlp":
        return MLP((config.width or 512,) * config.depth, classes)
    return CNN(tuple((config.width or 32) * 2**i for i in range(config.depth)), classes)


def load_split(config: Config, split: str) -> Split:
    """Images with mean 0 and deviation 1 over all of them, about."""
    loaded = zoo.load_images(config.images, split, data_dir=config.data_dir)
    images, labels = loaded.images[: config.num_images], loaded.labels[: config.num_images]
    return Split((images - np.float32(0.13)) / np.float32(0.31), labels)


# -- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(
    config: Config, model: nn.Module, spec: ngjax.NeuralGraphSpec, data: dict[str, Split], measure: Measure, seed: int
) -> Outcome:
    """Trains a pair of networks and walks from the first to the second, in each of the orders of its neurons."""
    keys = jax.random.split(jax.random.key(seed), 4)
    start = time.perf_counter()
    first, second = (
        train_network(config, model, data["train"], keys[i], f"seed {seed}, network {i + 1} of 2") for i in range(2)
    )
    train_seconds = time.perf_counter() - start
    start = time.perf_counter()
    perms = ngjax.match_params(spec, second, first, key=keys[2])
    match_seconds = time.perf_counter() - start
    print(f"seed {seed}: matched in {match_seconds:.1f} s", flush=True)
    ends = {
        "as_trained": second,
        "random": ngjax.permute_params(spec, ngjax.random_permutations(keys[3], spec), second),
        "matched": ngjax.permute_params(spec, perms, second),
    }
    lines = {}
    for name, end in ends.items():
        begin = time.perf_counter()
        lines[name] = walk(config, measure, first, end)
        print(
            f"seed {seed}: {LINES[name]}: barrier {barrier(lines[name].test_loss):.4f}, "
            f"{time.perf_counter() - begin:.0f} s, {len(ends) - len(lines)} more",
            flush=True,
        )
    return Outcome(seed, lines, round(train_seconds, 1), round(match_seconds, 2))


def train_network(config: Config, model: nn.Module, split: Split, key: jax.Array, title: str) -> Any:
    """One network from its own start, with the images in its own order; numpy arrays."""
    init_key, order_key, step_key = jax.random.split(key, 3)
    count = len(split.labels)
    num_steps = max(1, round(config.epochs * count / config.batch_size))
    rows_at = train.epoch_batches(count, config.batch_size, seed=int(jax.random.bits(order_key)))
    print(f"{title}: {num_steps:,} steps", flush=True)

    def loss_fn(params: Any, batch: Split, key: jax.Array) -> tuple[jax.Array, dict]:
        del key
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, batch.images), batch.labels)
        return losses.mean(), {}

    def batch_at(step: int) -> Split:
        rows = rows_at(step)
        return Split(split.images[rows], split.labels[rows])

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, num_steps // 20, num_steps)
    optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=0.9))
    result = train.fit(
        loss_fn,
        jax.jit(model.init)(init_key, split.images[:1]),
        batch_at,
        optimizer=optimizer,
        num_steps=num_steps,
        key=step_key,
        mesh=train.data_mesh(jax.devices()[:1]),
    )
    return jax.device_get(result.state.params)


# -- the line between two networks ------------------------------------------------------------------------------------


def make_measure(config: Config, model: nn.Module, data: dict[str, Split]) -> Callable[[Any, str], tuple[float, float]]:
    """Loss and accuracy of networks on the test images, and on the first of the training images."""

    @jax.jit
    def sums(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(-1) == labels).sum()

    def measure(params: Any, split: str) -> tuple[float, float]:
        images, labels = data[split]
        if split == "train":
            images, labels = images[: config.line_images], labels[: config.line_images]
        parts = [
            sums(params, images[i : i + EVALUATION_BATCH], labels[i : i + EVALUATION_BATCH])
            for i in range(0, len(labels), EVALUATION_BATCH)
        ]
        loss, correct = np.sum(jax.device_get(parts), axis=0, dtype=np.float64) / len(labels)
        return float(loss), float(correct)

    return measure


def walk(config: Config, measure: Measure, first: Any, second: Any) -> Line:
    """From the first network to the second, in equal steps."""
    shares = np.linspace(0, 1, config.points, dtype=np.float32)
    mixes = [jax.tree.map(lambda a, b: (1 - t) * a + t * b, first, second) for t in shares]  # noqa: B023
    test, seen = ([measure(mix, split) for mix in mixes] for split in ("test", "train"))
    squares = jax.tree.map(lambda a, b: float(np.sum((np.float64(a) - np.float64(b)) ** 2)), first, second)
    return Line(
        test_loss=[loss for loss, _ in test],
        train_loss=[loss for loss, _ in seen],
        test_accuracy=[accuracy for _, accuracy in test],
        distance=math.sqrt(sum(jax.tree.leaves(squares))),
    )


def barrier(losses: Sequence[float]) -> float:
    """The largest height of a loss above the straight line between its ends, on a path in equal steps.

    Entezari et al. 2022 (arXiv 2110.06296); Git Re-Basin's, above the mean of the ends, where these are equal.
    """
    return float(np.max(np.asarray(losses) - np.linspace(losses[0], losses[-1], len(losses))).clip(min=0))


# -- what is reported -------------------------------------------------------------------------------------------------


def numbers_of(line: Line, as_trained: Line) -> dict[str, float]:
    return {
        "test_barrier": barrier(line.test_loss),
        "train_barrier": barrier(line.train_loss),
        "halfway_test_accuracy": float(np.interp(0.5, np.linspace(0, 1, len(line.test_loss)), line.test_accuracy)),
        "relative_distance": line.distance / as_trained.distance,
    }


def summarize(config: Config, spec: ngjax.NeuralGraphSpec, outcomes: list[Outcome]) -> dict[str, Any]:
    """What results.json holds after these seeds."""
    per_seed = [
        {name: numbers_of(line, outcome.lines["as_trained"]) for name, line in outcome.lines.items()}
        for outcome in outcomes
    ]
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    ends = [(o.lines["as_trained"].test_accuracy[0], o.lines["as_trained"].test_accuracy[-1]) for o in outcomes]
    mean, deviation = ({name: {} for name in LINES} for _ in range(2))
    for name in LINES:
        for number in per_seed[0][name]:
            values = [numbers[name][number] for numbers in per_seed]
            mean[name][number] = float(np.mean(values))
            deviation[name][number] = deviation_of(values)
    return {
        "mean": mean,
        "deviation": deviation,  # between seeds, with Bessel's correction
        "test_accuracy": float(np.mean(ends)),  # of the networks as trained
        "seeds": [
            {
                "seed": outcome.seed,
                **numbers,
                "train_seconds": outcome.train_seconds,
                "match_seconds": outcome.match_seconds,
                "lines": {name: line._asdict() for name, line in outcome.lines.items()},
            }
            for outcome, numbers in zip(outcomes, per_seed, strict=True)
        ],
        "num_params": sum(math.prod(param.shape) for param in spec.params),
        **describe_process(),
        "config": {name: value for name, value in settings.items() if name not in ("out", "data_dir")},
        "table": format_table(mean, deviation).splitlines(),
    }


def format_table(mean: dict[str, Any], deviation: dict[str, Any]) -> str:
    """The results as a table in Markdown."""

    def cell(name: str, number: str, style: str) -> str:
        return with_deviation(mean[name][number], deviation[name][number], style)

    header = ("", "test loss barrier", "training loss barrier", "test accuracy half-way", "distance")
    columns = {
        "test_barrier": ".4f",
        "train_barrier": ".4f",
        "halfway_test_accuracy": ".2%",
        "relative_distance": ".3f",
    }
    rows = [(title, *(cell(name, number, style) for number, style in columns.items())) for name, title in LINES.items()]
    return markdown_table(header, rows)


def draw_lines(config: Config, outcomes: list[Outcome]) -> Figure:
    """Loss and accuracy on the way from one network to the other: the mean over seeds, and each seed pale."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    shares = np.linspace(0, 1, config.points)
    colors = {"as_trained": "#c62828", "random": "#9e9e9e", "matched": "#2e7d32"}
    styles = {"as_trained": "-", "random": "--", "matched": "-"}
    for axis, number in zip(axes, ("test_loss", "test_accuracy"), strict=True):
        for name, title in LINES.items():
            values = np.array([getattr(outcome.lines[name], number) for outcome in outcomes])
            if len(values) > 1:
                axis.plot(shares, values.T, color=colors[name], alpha=0.3, linewidth=0.8)
            axis.plot(shares, values.mean(0), styles[name], color=colors[name], linewidth=2, label=title)
        axis.set(xlabel="share of the second network's weights", xlim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="cross-entropy on test images")
    axes[1].set(ylabel="accuracy on test images")
    axes[1].yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    figure.suptitle(f"Between two {config.model.upper()}s trained apart on {config.images}")
    figure.tight_layout()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3)
    return figure


if __name__ == "__main__":
    mpl.use("agg")
    main(tyro.cli(Config, description=__doc__))
