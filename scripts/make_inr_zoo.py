"""Makes a zoo: one small network (SIREN) for each image of a data set, fitted to draw it.

    python scripts/make_inr_zoo.py --out mnist-zoo --images mnist --train 20000 --validation 1000 --test 5000

The images of each split are the first ones of an order that is drawn once and for all; those for validation are the
last ones of the order of the training images. So a zoo of more images has those of a smaller one, in the same splits,
whatever the seeds. Networks of the test images are made first, then those for validation, then those for training, and
where there are several views of an image, the first views of all images of a split come before the second ones.

Networks are on disk in shards of about a minute's work. A run that was killed goes on with `--if-exists resume` and
ends with the zoo that it would have made uninterrupted. How a network starts depends on the seed, the split, the image
and the view alone.

Writes the zoo (see `ngjax.zoo`), `report.json`, `psnr.png` and `networks.png` into the output folder.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import math
import pathlib
import shlex
import sys
import time
from typing import Any, Literal, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
import tqdm
import tyro
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import ngjax
from ngjax import train, zoo
from ngjax.files import write_atomically
from ngjax.machine import describe_machine, describe_versions
from ngjax.report import markdown_table, save_figure

SPLITS = ("train", "validation", "test")
MADE_ORDER = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class Config:
    """One zoo. Numbers of the recipe that are given replace those of the recipe named."""

    out: pathlib.Path
    """Folder of the zoo."""
    images: str = "mnist"
    """Data set: mnist, fashion_mnist, cifar10 or digits."""
    train: int | None = None
    """How many of its training images to use for training; by default all that validation leaves."""
    validation: int = 5000
    """How many of its training images to hold out for validation."""
    test: int | None = None
    """How many of its test images to use; by default all."""
    sizes: tuple[str, ...] = ()
    """Architectures, such as 2-32-32-1, to which the images are dealt in turn; by default two hidden layers of 32."""
    views: int = 1
    """Networks per image and architecture dealt, each from a start of its own."""
    recipe: Literal["fast", "dwsnets", "nfn"] = "fast"
    """How networks are fitted, see ngjax.zoo.RECIPES."""
    init: Literal["sitzmann", "dwsnets"] | None = None
    """Rule of the random start."""
    steps: int | None = None
    """Steps of Adam."""
    learning_rate: float | None = None
    """Of Adam."""
    omega: float | None = None
    """Frequency of the sines."""
    output_offset: float | None = None
    """Added to the output of the networks."""
    pixel_range: tuple[float, float] | None = None
    """What networks give for pixels of 0 and of 1."""
    stop_psnr: float | None = None
    """Networks that have reached this many dB are done; inf: all take all steps."""
    seed: int = 0
    """Of the random starts."""
    data_dir: pathlib.Path | None = None
    """Folder with the data sets; by default that of NGJAX_DATA_DIR, else they are downloaded."""
    if_exists: train.IfExists = "refuse"
    """For a folder that holds a zoo: refuse it, resume it (if it is this one), or overwrite it."""
    shard: int | None = None
    """Networks per shard; by default about a minute's work of two cores."""
    chunk_bytes: int | None = None
    """Memory for the networks fitted together, by default what suits the device."""
    floor: float = 15.0
    """Networks below this many dB are counted in the table, and drawn."""


class Plan(NamedTuple):
    """Networks to make, in order. Arrays `[N]`; `row` is the place of the image in the arrays of its split."""

    split: np.ndarray
    image: np.ndarray
    view: np.ndarray
    architecture: np.ndarray


def main(config: Config) -> dict[str, Any]:
    """Makes the zoo, or what is missing of it; returns what report.json holds."""
    started = time.perf_counter()
    recipe = recipe_of(config)
    loaded = {split: zoo.load_images(config.images, split, data_dir=config.data_dir) for split in ("train", "test")}
    images = {"train": loaded["train"], "validation": loaded["train"], "test": loaded["test"]}
    drawn = draw_images(config, len(loaded["train"].labels), len(loaded["test"].labels))
    sizes = parse_sizes(config.sizes, channels=loaded["train"].images.shape[-1])
    plan = make_plan(drawn, len(sizes), config.views)
    shard = config.shard or networks_per_minute(recipe, sizes, loaded["train"].images.shape[1:])
    metadata = {
        "images": config.images,
        "image_shape": loaded["train"].images.shape[1:],
        "class_names": loaded["train"].class_names,
        "splits": {split: len(rows) for split, rows in drawn.items()},
        "views": config.views,
        "sizes": sizes,
        "recipe": {"name": config.recipe, **recipe._asdict()},
        "omega": recipe.omega,
        "output_offset": recipe.output_offset,
        "pixel_range": recipe.pixel_range,
        "seed": config.seed,
        "shard": shard,
    }
    run = {
        "command": shlex.join(sys.orig_argv),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "chunk_bytes": config.chunk_bytes,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    prepare(config.out, config.if_exists)
    with zoo.ZooWriter(config.out, metadata=metadata, categories={"split": SPLITS}, provenance=run) as writer:
        before = len(writer)
        steps, seconds = fit_all(config, recipe, writer, plan, images, sizes, shard)

    made = zoo.open(config.out)
    below = np.flatnonzero(made.labels["psnr"] < config.floor)
    table = format_table(made, sizes, config.floor)
    report = {
        **run,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": {"fitting": round(seconds, 1), "total": round(time.perf_counter() - started, 1)},
        "networks": len(made),
        "networks_of_this_run": len(made) - before,
        "milliseconds_per_network_step": round(1e3 * seconds / steps, 4) if steps else None,
        "below_floor": below.tolist(),
        "metadata": made.metadata,
        "table": table.splitlines(),
    }
    save_figure(draw_psnr(made, config.floor), config.out / "psnr.png")
    save_figure(draw_networks(made, recipe, images), config.out / "networks.png")
    with write_atomically(config.out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    if steps:
        print(
            f"{len(made) - before:,} networks in {seconds:,.0f} s, "
            f"{report['milliseconds_per_network_step']} ms per network and step"
        )
    print(f"the zoo, its report and pictures are in {config.out}")
    return report


# -- what to make -----------------------------------------------------------------------------------------------------


def recipe_of(config: Config) -> zoo.SirenRecipe:
    recipe = zoo.RECIPES[config.recipe]
    given = {name: getattr(config, name) for name in recipe._fields if getattr(config, name) is not None}
    if given.get("stop_psnr") == math.inf:
        given["stop_psnr"] = None
    return recipe._replace(**given)


def draw_images(config: Config, train_images: int, test_images: int) -> dict[str, np.ndarray]:
    """Rows of the images of each split, in the order in which they are used."""
    num_train = train_images - config.validation if config.train is None else config.train
    num_test = test_images if config.test is None else config.test
    for name, count in (("train", num_train), ("validation", config.validation), ("test", num_test)):
        if count < 0:
            raise ValueError(f"{name}: expected a number of images, received {count}")
    if num_train + config.validation > train_images or num_test > test_images:
        raise ValueError(
            f"{config.images} has {train_images} training and {test_images} test images; asked for "
            f"{num_train} for training and {config.validation} for validation, and {num_test} for testing"
        )
    if not num_train + config.validation + num_test:
        raise ValueError("train, validation, test: expected at least one image, received 0, 0 and 0")
    # Not by the seed: zoos of the same images are to have them in the same splits.
    order, test_order = (np.random.default_rng(0).permutation(count) for count in (train_images, test_images))
    return {
        "train": order[:num_train],
        "validation": order[train_images - config.validation :],
        "test": test_order[:num_test],
    }


def parse_sizes(texts: tuple[str, ...], channels: int) -> list[tuple[int, ...]]:
    if not texts:
        return [(2, 32, 32, channels)]
    sizes = []
    for text in texts:
        parts = text.split("-")
        if len(parts) < 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"sizes: expected neurons per layer such as 2-32-32-{channels}, received {text!r}")
        if parts[0] != "2" or parts[-1] != str(channels):
            raise ValueError(
                f"sizes: expected 2 inputs (x and y) and {channels} outputs, the channels of an image; received {text}"
            )
        sizes.append(tuple(map(int, parts)))
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes: an architecture is there twice in {', '.join(texts)}")
    return sizes


def make_plan(drawn: dict[str, np.ndarray], architectures: int, views: int) -> Plan:
    if views < 1:
        raise ValueError(f"views: expected at least one network per image, received {views}")
    parts = []
    for split in MADE_ORDER:
        rows = drawn[split]
        for view in range(views):
            architecture = (np.arange(len(rows)) + view) % architectures
            parts.append((np.full(len(rows), SPLITS.index(split)), rows, np.full(len(rows), view), architecture))
    return Plan(*(np.concatenate(columns).astype(np.int32) for columns in zip(*parts, strict=True)))


def networks_per_minute(recipe: zoo.SirenRecipe, sizes: list[tuple[int, ...]], image_shape: tuple[int, ...]) -> int:
    """About so many, by a rule that does not depend on the machine: shards have to be the same in every run."""
    weights = sum(a * b for layers in sizes for a, b in itertools.pairwise(layers)) / len(sizes)
    seconds = 1.2e-10 * recipe.steps * image_shape[0] * image_shape[1] * weights
    return max(1, min(4096, 2 ** round(math.log2(60 / max(seconds, 1e-6)))))


def shards_of(plan: Plan, shard: int, architectures: int) -> list[np.ndarray]:
    """Rows of the plan that make up each shard: runs of `shard` networks, apart by architecture."""
    runs = np.split(np.arange(len(plan.image)), range(shard, len(plan.image), shard))
    apart = [run[plan.architecture[run] == number] for run in runs for number in range(architectures)]
    return [rows for rows in apart if len(rows)]


def prepare(folder: pathlib.Path, if_exists: train.IfExists) -> None:
    """Sees to a zoo that is in the folder already."""
    index, shards = folder / "index.json", list(folder.glob("shard-*.safetensors"))
    if not (index.exists() or shards) or if_exists == "resume":
        return
    if if_exists == "refuse":
        raise FileExistsError(
            f"{folder} already holds a zoo: choose another folder, --if-exists resume to continue it, or "
            "--if-exists overwrite to delete it"
        )
    if index.exists():
        with zoo.ZooWriter(folder):  # no other process is writing to it
            index.unlink()
    for path in shards:  # which are no zoo without their index
        path.unlink()


# -- making it --------------------------------------------------------------------------------------------------------


def fit_all(
    config: Config,
    recipe: zoo.SirenRecipe,
    writer: zoo.ZooWriter,
    plan: Plan,
    images: dict[str, zoo.Images],
    sizes: list[tuple[int, ...]],
    shard: int,
) -> tuple[int, float]:
    """Fits and appends what the zoo lacks; returns the number of steps, of all networks together, and the seconds."""
    shards = shards_of(plan, shard, len(sizes))
    ends = np.cumsum([len(rows) for rows in shards])
    total, done = int(ends[-1]), len(writer)
    if done and done not in ends:
        raise ValueError(f"{config.out} has {done} networks, which is not where a shard of this zoo ends")
    if done:
        print(f"{done:,} of {total:,} networks are there already")
    key, start, steps, first = jax.random.key(config.seed), time.perf_counter(), 0, done
    terminal = sys.stderr.isatty()
    with tqdm.tqdm(total=total, initial=done, unit=" networks", disable=not terminal) as bar:
        for rows in shards[np.searchsorted(ends, done, side="right") :]:
            pixels, labels = gather(images, plan, rows)

            def show(count: int, _: int, done: int = done) -> None:
                bar.update(done + count - bar.n)

            fits = zoo.fit_images(
                recipe,
                network_keys(key, plan.split[rows], plan.image[rows], plan.view[rows]),
                sizes[plan.architecture[rows[0]]],
                pixels,
                chunk_bytes=config.chunk_bytes,
                progress=show,
            )
            fits = jax.device_get(fits)
            columns = {
                "label": labels,
                "image": plan.image[rows],
                "view": plan.view[rows],
                "split": plan.split[rows],
                "psnr": fits.psnr.astype(np.float32),
                "steps": fits.steps.astype(np.int32),
            }
            check_finite(columns)
            spec = ngjax.mlp_spec(sizes[plan.architecture[rows[0]]], activation="siren")
            writer.append(spec, fits.params, columns)
            done += len(rows)
            steps += int(fits.steps.sum())
            if not terminal:
                rate = (done - first) / (time.perf_counter() - start)
                print(
                    f"{done:,}/{total:,} networks  {rate:.3g}/s  {(total - done) / rate / 60:.1f} min left  "
                    f"PSNR {np.median(fits.psnr):.1f} dB",
                    flush=True,
                )
    return steps, time.perf_counter() - start


@jax.jit
def network_keys(key: jax.Array, split: jax.Array, image: jax.Array, view: jax.Array) -> jax.Array:
    def of_network(*numbers: jax.Array) -> jax.Array:
        result = key
        for number in numbers:
            result = jax.random.fold_in(result, number)
        return result

    return jax.vmap(of_network)(split, image, view)


def gather(images: dict[str, zoo.Images], plan: Plan, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images of some networks, and their classes."""
    pixels = [images[SPLITS[split]].images[row] for split, row in zip(plan.split[rows], plan.image[rows], strict=True)]
    labels = [images[SPLITS[split]].labels[row] for split, row in zip(plan.split[rows], plan.image[rows], strict=True)]
    return np.stack(pixels), np.array(labels, np.int32)


def check_finite(columns: dict[str, np.ndarray]) -> None:
    broken = np.flatnonzero(~np.isfinite(columns["psnr"]))
    if len(broken):
        first = broken[0]
        raise ValueError(
            f"{len(broken)} of {len(columns['psnr'])} networks have no finite PSNR; the first is that of image "
            f"{columns['image'][first]} ({SPLITS[columns['split'][first]]}, view {columns['view'][first]}). "
            "Lower the learning rate, or check the pixel range"
        )


# -- report -----------------------------------------------------------------------------------------------------------


def format_table(made: zoo.Zoo, sizes: list[tuple[int, ...]], floor: float) -> str:
    """What is in the zoo, as a table in Markdown."""
    header = ("split", "network", "networks", "PSNR 5 %", "median", "95 %", "worst", f"below {floor:g} dB", "steps")
    rows = []
    for split in SPLITS:
        for number, layers in enumerate(sizes):
            chosen = np.intersect1d(made.rows(split=split), np.flatnonzero(architectures_of(made, sizes) == number))
            if not len(chosen):
                continue
            psnr, steps = made.labels["psnr"][chosen], made.labels["steps"][chosen]
            quantiles = (f"{value:.1f}" for value in np.quantile(psnr, (0.05, 0.5, 0.95, 0)))
            taken = f"{steps.min()}" if steps.min() == steps.max() else f"{steps.min()} to {steps.max()}"
            name = "-".join(map(str, layers))
            rows.append((split, name, f"{len(chosen):,}", *quantiles, str(int((psnr < floor).sum())), taken))
    return markdown_table(header, rows, titles=2)


def architectures_of(made: zoo.Zoo, sizes: list[tuple[int, ...]]) -> np.ndarray:
    """For each network the number of its architecture in `sizes`."""
    numbers = [sizes.index(tuple(group.size for group in spec.node_groups)) for spec in made.specs]
    return np.array(numbers)[made.spec_ids]


def draw_psnr(made: zoo.Zoo, floor: float) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 4))
    psnr = made.labels["psnr"]
    bins = np.linspace(psnr.min(), psnr.max() + 1e-3, 60).tolist()
    for split in SPLITS:
        rows = made.rows(split=split)
        if len(rows):
            axis.hist(psnr[rows], bins=bins, density=True, histtype="step", label=f"{split}, {len(rows):,} networks")
    axis.axvline(floor, color="gray", linestyle=":", label=f"{np.count_nonzero(psnr < floor)} below {floor:g} dB")
    axis.set(xlabel="PSNR in dB", ylabel="share per dB", title="How well networks draw their images")
    axis.legend(frameon=False)
    return figure


def draw_networks(made: zoo.Zoo, recipe: zoo.SirenRecipe, images: dict[str, zoo.Images]) -> Figure:
    """Images beside what their networks draw: the first ones of the zoo, and the worst."""
    by_psnr = np.argsort(made.labels["psnr"], kind="stable")
    first = np.arange(min(12, len(made)))
    columns = [*first, *by_psnr[: min(4, len(made))]]
    low, high = recipe.pixel_range
    shape = images["train"].images.shape[1:3]
    # Compiled for each architecture; one operation after the other would take longer.
    render = jax.jit(
        functools.partial(
            zoo.render, height=shape[0], width=shape[1], omega=recipe.omega, output_offset=recipe.output_offset
        )
    )
    figure, axes = plt.subplots(2, len(columns), figsize=(len(columns), 2.6), squeeze=False)
    for j, row in enumerate(columns):
        entry = made[int(row)]
        image = images[entry.labels["split"]].images[entry.labels["image"]]
        drawn = (np.asarray(render(entry.params)) - low) / (high - low)
        for axis, picture in zip(axes[:, j], (image, drawn), strict=True):
            axis.imshow(picture.clip(0, 1).squeeze(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[1, j].set_xlabel(f"{entry.labels['psnr']:.1f} dB", fontsize=8)
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("network")
    axes[0, len(first)].set_title("the worst", loc="left", fontsize=9)
    return figure


if __name__ == "__main__":
    mpl.use("agg")
    main(tyro.cli(Config, description=__doc__))
