"""Converts a published zoo of image SIRENs into a zoo of this library.

    python scripts/convert_zoo.py --name dwsnets_mnist --source mnist-inrs.zip --out dwsnets-mnist
    python scripts/convert_zoo.py --name nfn_cifar10 --source siren_cifar_wts.tar --out nfn-cifar10 --views 1

Nothing is unpacked to disk, torch is not needed, and the pickles in the archive are not executed. A conversion that was
killed goes on when the same command is given again; given once more after that, it changes nothing. With --compare 100
the table says how well networks draw the images that they are labeled with.

Where to find the archives, and how they are laid out: the README of the authors' code (github.com/AvivNavon/DWSNets,
github.com/AllanYangZhou/nfn) and ngjax.zoo.convert_published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib

import jax
import numpy as np
import tqdm
import tyro

from ngjax import zoo


@dataclasses.dataclass(frozen=True)
class Config:
    """One conversion."""

    name: str
    """Which zoo it is: dwsnets_mnist, dwsnets_fashion_mnist, nfn_mnist, nfn_fashion_mnist or nfn_cifar10."""
    source: pathlib.Path
    """The archive as it was downloaded, or the folder unpacked from it."""
    out: pathlib.Path
    """Folder of the zoo."""
    splits: pathlib.Path | None = None
    """DWSNets: split file, by default the one in the archive. That of MNIST has none; see validation."""
    validation: int | None = None
    """DWSNets MNIST without a split file: how many training images to draw for validation, by default 5,000."""
    seed: int | None = None
    """Of that draw, by default 0."""
    split_points: tuple[int, int] | None = None
    """NFN: first image for validation and first one for testing, by default 45,000 and 50,000."""
    views: int | None = None
    """NFN: networks per image at most, by default all. 1 leaves augmentations out."""
    compare: int = 0
    """Networks of each split to compare with the images that they draw; adds their PSNR to the table."""
    data_dir: pathlib.Path | None = None
    """Folder with these images; by default that of NGJAX_DATA_DIR, else they are downloaded."""


def main(config: Config) -> zoo.Zoo:
    """Converts, prints a table and returns the zoo."""
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("compare", "data_dir")
    }
    print(f"reading {config.source}", flush=True)
    with contextlib.ExitStack() as stack:
        bars: list[tqdm.tqdm] = []

        def progress(done: int, total: int) -> None:
            if bars:
                bars[0].update(done - bars[0].n)
            else:
                # What an earlier run has done does not count for the rate, on which the time left depends.
                bars.append(stack.enter_context(tqdm.tqdm(total=total, initial=done, unit=" networks", smoothing=0.1)))

        conversion = zoo.convert_published(**options, progress=progress)
    made = zoo.open(config.out)
    psnr = compare(made, config.compare, config.data_dir) if config.compare else {}
    print(f"\n{format_table(made, psnr)}\n")
    for reason, names in conversion.left_out.items():
        print(f"left out {len(names):,} checkpoints {reason}, such as {names[0]}")
    print(f"{conversion.converted:,} networks converted, {conversion.networks:,} in the zoo {config.out}")
    return made


def compare(made: zoo.Zoo, count: int, data_dir: pathlib.Path | None) -> dict[str, float]:
    """By split, the median PSNR in dB of the first networks of original images (view 0), for a peak of 1."""
    metadata = made.metadata
    images = {
        split: zoo.load_images(metadata["images"], split, data_dir=data_dir).images for split in ("train", "test")
    }
    low, high = metadata["pixel_range"]
    height, width, _ = metadata["image_shape"]
    draw = jax.jit(
        jax.vmap(
            lambda params: zoo.render(
                params, height, width, omega=metadata["omega"], output_offset=metadata["output_offset"]
            )
        )
    )
    medians = {}
    for split in made.categories["split"]:
        rows = made.rows(split=split, view=0)[:count]
        if not len(rows):
            continue
        numbers = made.labels["image"][rows]
        if metadata["image_numbers"] == "by data set split":
            targets = images["test" if split == "test" else "train"][numbers]
        else:
            last = len(images["train"])
            targets = np.stack([images["train"][i] if i < last else images["test"][i - last] for i in numbers])
        drawn = (np.asarray(draw(made.read(rows))) - low) / (high - low)
        medians[split] = float(np.median(-10 * np.log10(np.mean((drawn - targets) ** 2, axis=(1, 2, 3)))))
    return medians


def format_table(made: zoo.Zoo, psnr: dict[str, float]) -> str:
    """Networks, images, views and networks per class of each split, and PSNR where it is known."""
    labels = made.labels
    header = f"{'split':<12}{'networks':>10}{'images':>9}{'views':>7}  networks per class"
    lines = [f"{header:<52}  median PSNR" if psnr else header]
    for split in made.categories["split"]:
        rows = made.rows(split=split)
        if not len(rows):
            continue
        counts = np.bincount(labels["label"][rows], minlength=len(made.metadata["class_names"]))
        images, views = (len(np.unique(labels[name][rows])) for name in ("image", "view"))
        per_class = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        line = f"{split:<12}{len(rows):>10,}{images:>9,}{views:>7}  {per_class}"
        lines.append(f"{line:<52}  {psnr[split]:.1f} dB" if psnr else line)
    sizes = ", ".join("-".join(map(str, one)) for one in made.metadata["sizes"])
    shown = f"{made.metadata['published']}: {sizes}, omega {made.metadata['omega']:g}"
    return "\n".join([shown, *lines])


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
