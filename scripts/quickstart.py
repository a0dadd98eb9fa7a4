"""What does a network know? Reads digits out of the weights of small networks, in a few minutes on a laptop.

    python scripts/quickstart.py --out quickstart-out

Each of scikit-learn's 1,797 handwritten digits becomes the weights of small SIRENs (2-32-32-1), fitted to draw it.
Classifiers then have to name the digit from the weights alone, and again after the hidden neurons of the networks they
are tested on are shuffled, which leaves what the networks draw unchanged. Images of the test networks are never seen
in training.

Writes `results.json`, `digits.png`, `learning_curves.png` and `neural_graph.png` into the output folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import tqdm
import tyro
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import ngjax
from ngjax import train, zoo
from ngjax.baselines import FlatMLP, ProbeReadout, flat_statistics

SIZES = (2, 32, 32, 1)
SPEC = ngjax.mlp_spec(SIZES, activation="siren")
OUTPUT_OFFSET = 0.5
NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The defaults are those of the README's table."""

    out: pathlib.Path
    """Folder for results and pictures."""
    seed: int = 0
    num_images: int | None = None
    """How many of the digits to use, all by default."""
    test_fraction: float = 0.2
    """Share of the images that is held out."""
    fits_per_image: int = 4
    """Networks per image, each from its own random start."""
    fit_steps: int = 150
    """Steps of Adam that fit a network to its image."""
    probes: int = 32
    """Learned inputs on which NG-GNN runs the networks it reads."""
    features: int = 32
    """Width of NG-GNN."""
    layers: int = 4
    """Layers of NG-GNN."""
    graph_epochs: int = 3
    """Passes over the training networks for NG-GNN."""
    epochs: int = 30
    """Passes over the training networks for the others."""


class Networks(NamedTuple):
    """Networks, which are what is classified here.

    Attributes:
      params: SIREN parameters, leaves `[N, ...]`.
      labels: `[N]`, the digit each network draws.
    """

    params: Any
    labels: np.ndarray


class Split(NamedTuple):
    """Networks for training, and networks of other images for testing."""

    train: Networks
    test: Networks


class Classifier(NamedTuple):
    """A model together with how it is trained.

    Attributes:
      key: its prefix in results.json.
      title: its name in the table and the pictures.
      networks: what it is trained and tested on.
      init: `(key, params) -> variables`.
      apply: `(variables, params, train, key) -> logits [B, 10]`.
      learning_rate: of AdamW.
      batch_size: networks per step.
      epochs: passes over the training networks.
    """

    key: str
    title: str
    networks: Split
    init: Callable
    apply: Callable
    learning_rate: float
    batch_size: int
    epochs: int


class Outcome(NamedTuple):
    """What came out for one classifier. Accuracies are shares of the test networks."""

    accuracy: float
    shuffled_accuracy: float
    changed_predictions: float
    largest_logit_change: float
    largest_logit: float
    predictions: np.ndarray
    shuffled_predictions: np.ndarray
    curve: list[tuple[int, float]]  # (training networks seen, test accuracy)


def main(config: Config) -> dict[str, Any]:
    """Runs everything; returns what results.json holds."""
    out = train.prepare_folder(config.out)  # before any work: an unwritable folder fails here
    seconds: dict[str, float] = {}
    fit_key, shuffle_key, train_key = jax.random.split(jax.random.key(config.seed), 3)

    digits = zoo.load_digits()
    digits = zoo.Digits(*(array[: config.num_images] for array in digits))
    split = zoo.stratified_split(digits.labels, test_fraction=config.test_fraction, seed=config.seed)
    print(f"{len(digits.labels)} digits, {len(split[1])} of them for testing")

    with stage(seconds, "fit networks, random starts"):
        own, psnr = fit_networks(config, digits, fit_key, shared_start=False)
    with stage(seconds, "fit networks, shared start"):
        shared, shared_psnr = fit_networks(config, digits, fit_key, shared_start=True)
    print(f"the networks reproduce their images at {psnr:.0f} dB and {shared_psnr:.0f} dB (medians)")
    own, shared = split_networks(own, digits.labels, split), split_networks(shared, digits.labels, split)

    classifiers = make_classifiers(config, own, shared)
    outcomes = {}
    for classifier in classifiers:
        with stage(seconds, classifier.title):
            outcomes[classifier.key] = train_and_test(classifier, train_key, shuffle_key)

    table = format_table(classifiers, outcomes)
    print(f"\n{table}\n")
    results = {
        **{
            f"{classifier.key}_{name}": value
            for classifier in classifiers
            for name, value in named_numbers(outcomes[classifier.key]).items()
        },
        "psnr_median": psnr,
        "psnr_median_shared_init": shared_psnr,
        "train_networks": len(own.train.labels),
        "test_networks": len(own.test.labels),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "machine": {"processor": processor_name(), "cores": available_cores(), "device": jax.devices()[0].device_kind},
        "versions": {"ngjax": ngjax.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "table": table.splitlines(),
    }
    images = digits.images[split[1]]
    save_figure(draw_digits(classifiers, outcomes, images, own.test, config.fits_per_image), out / "digits.png")
    save_figure(draw_learning_curves(classifiers, outcomes), out / "learning_curves.png")
    save_figure(draw_neural_graph(take(own.test.params, 0), int(own.test.labels[0])), out / "neural_graph.png")
    with write_atomically(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{out}: results.json, digits.png, learning_curves.png, neural_graph.png")
    return results


# -- networks ---------------------------------------------------------------------------------------------------------


def fit_networks(config: Config, digits: zoo.Digits, key: jax.Array, *, shared_start: bool) -> tuple[Any, float]:
    """Networks that draw the digits, leaves `[images, fits, ...]`, and the median of their PSNR in dB."""
    fits = 1 if shared_start else config.fits_per_image
    images = np.repeat(digits.images, fits, axis=0)
    if shared_start:
        initial = zoo.init_siren(key, SIZES)
    else:
        initial = jax.vmap(lambda key: zoo.init_siren(key, SIZES))(jax.random.split(key, len(images)))
    with tqdm.tqdm(total=len(images), unit=" networks", mininterval=1, leave=False) as bar:
        fitted = zoo.fit_sirens(
            initial,
            images,
            steps=config.fit_steps,
            output_offset=OUTPUT_OFFSET,
            progress=lambda done, of: bar.update(done - bar.n),
        )
    params = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, fits, *leaf.shape[1:]), fitted.params)
    return params, float(np.median(fitted.psnr))


def split_networks(params: Any, labels: np.ndarray, split: tuple[np.ndarray, np.ndarray]) -> Split:
    """The split of the images, carried over to all networks of each image: leaves become `[networks, ...]`."""
    fits = jax.tree.leaves(params)[0].shape[1]

    def of_images(rows: np.ndarray) -> Networks:
        flat = jax.tree.map(lambda leaf: leaf[rows].reshape(-1, *leaf.shape[2:]), params)
        return Networks(flat, np.repeat(labels[rows], fits))

    return Split(*map(of_images, split))


def shuffle_neurons(params: Any, key: jax.Array) -> Any:
    """The same networks, the hidden neurons of each in a random order of its own."""

    def shuffle(params: Any, key: jax.Array) -> Any:
        return ngjax.permute_params(SPEC, ngjax.random_permutations(key, SPEC), params)

    keys = jax.random.split(key, len(jax.tree.leaves(params)[0]))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(shuffle))(params, keys))


def take(params: Any, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], params)


# -- classifiers ------------------------------------------------------------------------------------------------------


def make_classifiers(config: Config, own: Split, shared: Split) -> list[Classifier]:
    graph = {"learning_rate": 2e-3, "batch_size": 16, "epochs": config.graph_epochs}
    plain = {"learning_rate": 1e-3, "batch_size": 64, "epochs": config.epochs}
    return [
        Classifier("ng_gnn", "NG-GNN", own, *graph_network(config, own, config.probes), **graph),
        Classifier("ng_gnn_no_probe", "NG-GNN without probes", own, *graph_network(config, own, 0), **graph),
        Classifier("probe_only", "probes alone", own, *probe_readout(), **plain),
        Classifier("mlp", "MLP on flattened weights", own, *flat_mlp(own), **plain),
        Classifier("mlp_shared_init", "MLP, all networks from one start", shared, *flat_mlp(shared), **plain),
    ]


def graph_network(config: Config, networks: Split, probes: int) -> tuple[Callable, Callable]:
    encoder = ngjax.EncoderConfig(
        reverse_edges=True, num_probes=probes, statistics=ngjax.weight_statistics(SPEC, networks.train.params)
    )
    model = ngjax.WeightSpaceModel(
        backbone=ngjax.NGGNN(features=config.features, num_layers=config.layers, encoder=encoder),
        readout=ngjax.GraphReadout(NUM_CLASSES, probe_outputs=probes > 0),
    )

    def init(key: jax.Array, params: Any) -> Any:
        return model.init(key, ngjax.to_groups(SPEC, params), spec=SPEC)

    def apply(variables: Any, params: Any, train: bool = False, key: jax.Array | None = None) -> jax.Array:
        graph = ngjax.to_groups(SPEC, params)
        return model.apply(variables, graph, spec=SPEC, train=train, rngs={} if key is None else {"dropout": key})

    return init, apply


def probe_readout() -> tuple[Callable, Callable]:
    network = functools.partial(zoo.apply_siren, output_offset=OUTPUT_OFFSET)
    model = ProbeReadout(network, num_inputs=SIZES[0], num_outputs=NUM_CLASSES)
    return model.init, lambda variables, params, train=False, key=None: model.apply(variables, params)


def flat_mlp(networks: Split) -> tuple[Callable, Callable]:
    model, statistics = FlatMLP(NUM_CLASSES), flat_statistics(networks.train.params)
    return (
        lambda key, params: model.init(key, params, statistics),
        lambda variables, params, train=False, key=None: model.apply(variables, params, statistics),
    )


def train_and_test(classifier: Classifier, train_key: jax.Array, shuffle_key: jax.Array) -> Outcome:
    networks, batch_size = classifier.networks, classifier.batch_size
    init_key, step_key = jax.random.split(train_key)
    variables = dict(jax.jit(classifier.init)(init_key, take(networks.train.params, slice(1))))
    initial = variables.pop("params")  # the rest is not trained
    count = len(networks.train.labels)
    num_steps = classifier.epochs * count // batch_size
    rows_at = train.epoch_batches(count, batch_size, seed=0)

    def loss_fn(params: Any, batch: Networks, key: jax.Array) -> tuple[jax.Array, dict]:
        logits = classifier.apply({"params": params, **variables}, batch.params, train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean(), {}

    predict = jax.jit(lambda params, networks: classifier.apply({"params": params, **variables}, networks))
    # Learning curves come from a part of the test networks, evenly spread over the images; the table from all.
    part = np.arange(0, len(networks.test.labels), max(1, len(networks.test.labels) // 360))

    def evaluate(params: Any) -> dict[str, float]:
        logits = in_chunks(functools.partial(predict, params), take(networks.test.params, part))
        return {"accuracy": np.mean(logits.argmax(-1) == networks.test.labels[part])}

    result = train.fit(
        loss_fn,
        initial,
        lambda step: Networks(*take(networks.train, rows_at(step))),
        optimizer=train.make_optimizer(
            classifier.learning_rate, warmup_steps=num_steps // 20, total_steps=num_steps, clip_norm=1.0
        ),
        num_steps=num_steps,
        key=step_key,
        evaluate=evaluate,
        eval_every=max(1, num_steps // 12),
    )
    predict = functools.partial(predict, result.state.params)
    logits = in_chunks(predict, networks.test.params)
    shuffled_logits = in_chunks(predict, shuffle_neurons(networks.test.params, shuffle_key))
    predictions, shuffled_predictions = logits.argmax(-1), shuffled_logits.argmax(-1)
    return Outcome(
        accuracy=float(np.mean(predictions == networks.test.labels)),
        shuffled_accuracy=float(np.mean(shuffled_predictions == networks.test.labels)),
        changed_predictions=float(np.mean(predictions != shuffled_predictions)),
        largest_logit_change=float(np.abs(logits - shuffled_logits).max()),
        largest_logit=float(np.abs(logits).max()),
        predictions=predictions,
        shuffled_predictions=shuffled_predictions,
        curve=[(row["step"] * batch_size, row["eval/accuracy"]) for row in result.history if "eval/accuracy" in row],
    )


def in_chunks(predict: Callable, params: Any, size: int = 40) -> np.ndarray:
    """`predict` on so many networks at a time; the last chunk is filled up, so that it is compiled once."""
    count = len(jax.tree.leaves(params)[0])
    parts = [
        predict(take(params, np.arange(start, start + size).clip(max=count - 1))) for start in range(0, count, size)
    ]
    return np.concatenate(parts)[:count]


# -- what is reported -------------------------------------------------------------------------------------------------


def named_numbers(outcome: Outcome) -> dict[str, float]:
    return {
        "test_accuracy": outcome.accuracy,
        "shuffled_test_accuracy": outcome.shuffled_accuracy,
        "changed_predictions": outcome.changed_predictions,
        "largest_logit_change": outcome.largest_logit_change,
        "largest_logit": outcome.largest_logit,
    }


def format_table(classifiers: list[Classifier], outcomes: dict[str, Outcome]) -> str:
    """The results as a table in Markdown."""
    header = ("", "test accuracy", "neurons shuffled", "predictions changed", "largest change of a logit")
    rows = [
        (
            classifier.title,
            f"{outcome.accuracy:.1%}",
            f"{outcome.shuffled_accuracy:.1%}",
            f"{outcome.changed_predictions:.1%}",
            f"{outcome.largest_logit_change:.1e} of {outcome.largest_logit:.1f}",
        )
        for classifier in classifiers
        for outcome in [outcomes[classifier.key]]
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return f"| {' | '.join([first, *others])} |"

    rule = f"|{'|'.join('-' * (w + 1) + ('-' if i == 0 else ':') for i, w in enumerate(widths))}|"
    return "\n".join([line(header), rule, *map(line, rows)])


@contextlib.contextmanager
def stage(seconds: dict[str, float], title: str) -> Iterator[None]:
    """Announces a part of the run and keeps how long it took."""
    print(f"{title} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[title] = round(time.perf_counter() - start, 1)
    print(f"{title}: {seconds[title]:.0f} s", flush=True)


@contextlib.contextmanager
def write_atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to that becomes `path` when all is written."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- pictures ---------------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: pathlib.Path) -> None:
    with write_atomically(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def draw_digits(
    classifiers: list[Classifier], outcomes: dict[str, Outcome], images: np.ndarray, test: Networks, fits: int
) -> Figure:
    """Test images, what their networks draw, and what two classifiers read before and after shuffling."""
    labels = test.labels[::fits]
    columns = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    _, height, width, _ = images.shape
    drawn = jax.vmap(lambda params: zoo.render(params, height, width, output_offset=OUTPUT_OFFSET))(
        take(test.params, np.array(columns) * fits)
    )
    titles = {classifier.key: classifier.title for classifier in classifiers}
    # Networks per image differ between the two sets.
    shown = [("ng_gnn", fits), ("mlp_shared_init", 1)]
    readings = [
        (title, predictions[np.array(columns) * per_image])
        for key, per_image in shown
        for title, predictions in [
            (f"{titles[key]} reads", outcomes[key].predictions),
            ("... neurons shuffled", outcomes[key].shuffled_predictions),
        ]
    ]
    figure, axes = plt.subplots(
        2 + len(readings), len(columns), figsize=(1.0 * len(columns) + 2, 4.6), height_ratios=[2, 2, 1, 1, 1, 1]
    )
    axes = axes.reshape(2 + len(readings), len(columns))
    for j, column in enumerate(columns):
        for axis, image in zip(axes[:2, j], (images[column], drawn[j]), strict=True):
            axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
        for axis, (_, predictions) in zip(axes[2:, j], readings, strict=True):
            right = predictions[j] == labels[column]
            axis.set_facecolor("#2e7d32" if right else "#c62828")
            axis.text(0.5, 0.45, str(predictions[j]), color="white", ha="center", va="center", weight="bold", size=12)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(
        axes[:, 0], ["image", "drawn by its network", *(title for title, _ in readings)], strict=True
    ):
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    figure.suptitle("Digits of the test set, read from the weights of the networks that draw them", y=0.95)
    return figure


def draw_learning_curves(classifiers: list[Classifier], outcomes: dict[str, Outcome]) -> Figure:
    """Accuracy on networks of the test images during training."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for i, classifier in enumerate(classifiers):
        seen, accuracy = np.array(outcomes[classifier.key].curve).T
        passes = seen / len(classifier.networks.train.labels)
        axis.plot(passes, accuracy, marker="o", markersize=3, color=f"C{i}", label=classifier.title)
    axis.axhline(1 / NUM_CLASSES, color="gray", linestyle=":", label="guessing")
    axis.set(
        xscale="log",
        xlabel="passes over the training networks",
        ylabel="accuracy on test networks",
        ylim=(0, 1),
        title="Reading digits from weights",
    )
    axis.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def draw_neural_graph(params: Any, label: int) -> Figure:
    """One network as its neural graph: a column of nodes per layer, colored by bias, edges colored by weight."""
    graph = ngjax.to_groups(SPEC, params)
    biases, weights = np.asarray(graph.nodes)[:, 0], [np.asarray(edges).squeeze((0, 3, 4)) for edges in graph.edges]
    places = [np.stack([np.full(n, x), np.linspace(1, -1, n + 2)[1:-1]], axis=-1) for x, n in enumerate(SIZES)]
    names = ["x, y", *(f"hidden layer {i}" for i in range(1, len(SIZES) - 1)), "pixel value"]

    figure, axis = plt.subplots(figsize=(9, 6))
    for sources, targets, weight in zip(places, places[1:], weights, strict=False):
        largest = np.abs(weight).max()
        lines = np.stack(np.broadcast_arrays(sources[:, None], targets[None]), axis=-2).reshape(-1, 2, 2)
        strength = np.abs(weight).ravel() / largest
        order = np.argsort(strength)  # strong ones on top
        colors = mpl.colormaps["RdBu_r"](0.5 + 0.5 * weight.ravel() / largest)
        colors[:, 3] = strength
        axis.add_collection(LineCollection(lines[order], colors=colors[order], linewidths=0.2 + 1.5 * strength[order]))
    nodes = np.concatenate(places)
    largest = np.abs(biases).max()
    points = axis.scatter(*nodes.T, c=biases, cmap="PuOr", vmin=-largest, vmax=largest, s=70, edgecolors="k", zorder=3)
    for x, name in enumerate(names):
        axis.text(x, 1.08, f"{name}\n{SIZES[x]} nodes", ha="center", va="bottom")
    axis.set_axis_off()
    axis.set(ylim=(-1.05, 1.25))
    figure.colorbar(points, label="node: bias", shrink=0.6, pad=0.02)
    edges = mpl.cm.ScalarMappable(mpl.colors.Normalize(-1, 1), "RdBu_r")
    figure.colorbar(edges, ax=axis, label="edge: weight / largest of its layer", shrink=0.6, pad=0.06)
    axis.set_title(f"The neural graph of a network that draws a {label}", pad=20)
    return figure


if __name__ == "__main__":
    mpl.use("agg")
    main(tyro.cli(Config, description=__doc__))
