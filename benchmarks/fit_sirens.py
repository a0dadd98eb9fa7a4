"""What does fitting a SIREN to an image cost, against a loop over single images in PyTorch?

Both fit the same images from the same initial weights by the same recipe in one run, on the same cores: PyTorch one
network after the other with all threads for each, as the published zoos were made, this library many at once. The two
take turns, and the best of several rounds counts, since other work on the machine slows both. That they do the same
shows in the PSNR they end with.

    python benchmarks/fit_sirens.py --steps 100

Needs PyTorch. Compare the rows of one run with each other, not with other machines.
"""

import argparse
import itertools
import time

import jax
import numpy as np
import torch

from ngjax import zoo
from ngjax.machine import available_cores


def fit_in_torch(
    recipe: zoo.SirenRecipe, sizes: tuple[int, ...], initial: zoo.SirenParams, images: np.ndarray
) -> np.ndarray:
    """PSNR of each network; `initial` has leaves `[networks, ...]`."""
    height, width = images.shape[1:3]
    coordinates = torch.from_numpy(zoo.image_coordinates(height, width))
    psnr = []
    for row, image in enumerate(images):
        target = torch.from_numpy(image.reshape(height * width, -1))
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        with torch.no_grad():
            for number, layer in enumerate(layers):
                layer.weight.copy_(torch.tensor(initial[f"layer_{number}"]["kernel"][row].T))
                layer.bias.copy_(torch.tensor(initial[f"layer_{number}"]["bias"][row]))

        def mse(layers: list[torch.nn.Linear] = layers, target: torch.Tensor = target) -> torch.Tensor:
            x = coordinates
            for layer in layers[:-1]:
                x = torch.sin(recipe.omega * layer(x))
            return torch.nn.functional.mse_loss(layers[-1](x) + recipe.output_offset, target)

        optimizer = torch.optim.Adam(
            [weight for layer in layers for weight in layer.parameters()], lr=recipe.learning_rate
        )
        for _ in range(recipe.steps):
            optimizer.zero_grad()
            mse().backward()
            optimizer.step()
        psnr.append(-10 * torch.log10(mse()).item())
    return np.array(psnr)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    sizes = tuple(map(int, arguments.sizes.split("-")))
    # All steps, so that both take the same number.
    recipe = zoo.RECIPES[arguments.recipe]._replace(steps=arguments.steps, stop_psnr=None, pixel_range=(0.0, 1.0))
    images = zoo.load_images(arguments.images, "train").images[: arguments.networks]
    keys = jax.random.split(jax.random.key(0), len(images))
    start = jax.vmap(lambda key: zoo.init_siren(key, sizes, omega=recipe.omega, rule=recipe.init))(keys)
    start = jax.tree.map(np.asarray, start)
    few = slice(arguments.torch_networks)

    def ours() -> np.ndarray:
        return np.asarray(zoo.fit_images(recipe, keys, sizes, images, chunk_bytes=arguments.chunk_bytes).psnr)[few]

    def theirs() -> np.ndarray:
        return fit_in_torch(recipe, sizes, jax.tree.map(lambda leaf: leaf[few], start), images[few])

    rows = {
        "PyTorch, one by one": (theirs, len(images[few])),
        "ngjax.zoo.fit_images": (ours, len(images)),
    }
    psnr: dict[str, np.ndarray] = {}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    zoo.fit_images(recipe._replace(steps=1), keys, sizes, images, chunk_bytes=arguments.chunk_bytes)  # compiles
    for _ in range(arguments.rounds):
        for name, (fit, networks) in rows.items():
            begin = time.perf_counter()
            psnr[name] = fit()
            seconds[name].append((time.perf_counter() - begin) / networks / recipe.steps)
    size = f"{images.shape[1]} x {images.shape[2]} pixels"
    print(f"{arguments.sizes} on {size}, {recipe.steps} steps, {available_cores()} cores")
    for name, times in seconds.items():
        print(f"  {name:22s} {1e3 * min(times):7.4f} ms per network and step, PSNR {np.mean(psnr[name]):.2f} dB")
    slow, fast = (min(times) for times in seconds.values())
    print(f"  ratio {slow / fast:.2f}; largest difference of PSNR {np.ptp(list(psnr.values()), axis=0).max():.2f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=list(zoo.RECIPES), default="dwsnets")
    parser.add_argument("--images", default="mnist")
    parser.add_argument("--sizes", default="2-32-32-1")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--networks", type=int, default=120, help="how many this library fits")
    parser.add_argument("--torch-networks", type=int, default=4, help="how many PyTorch fits, the first ones")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk-bytes", type=int, default=None)
    main(parser.parse_args())
