"""Settings for every test: eight CPU devices, strict dtypes, shapes checked at run time.

All of it is on here and off for users.
"""

import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator

# Read once, when jax opens its backend, so these lines come before any import of it.
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Halves the time to compile. Later versions know no other emitters, and end where they are told of them.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
else:
    # Spares single operations those emitters.
    _FLAGS.append("--xla_disable_hlo_passes=fusion-wrapper")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

import hypothesis
import jax
import jaxtyping
import matplotlib
import pytest

# Annotated shapes and dtypes are checked in every function of the library that a test calls.
# This has to come before the first import of ngjax.
jaxtyping.install_import_hook("ngjax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Programs here run a few times on a few numbers: compiling is most of their cost, and LLVM most of that.
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many small objects that stay; looking through them all again and again is 5 % of the time.
gc.set_threshold(100_000, 50, 100)
matplotlib.use("agg")

# Examples are derived from the test itself, so every run tries the same ones; a compilation
# inside an example may take longer than any deadline.
hypothesis.settings.register_profile("ngjax", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("ngjax")


@pytest.fixture(autouse=True, scope="module")
def _free_programs() -> Iterator[None]:
    """Lets go of the programs that a module has compiled.

    Each holds several memory mappings, Linux allows a process 65,530, and LLVM crashes where it gets no more: the whole
    suite in two processes compiles more than that.
    """
    yield
    jax.clear_caches()
    gc.collect()


def _folder_from_environment(variable: str, contents: str) -> pathlib.Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: it names the folder with {contents}")
    path = pathlib.Path(folder)
    if not path.is_dir():
        pytest.fail(f"{variable}={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def parity_dir() -> pathlib.Path:
    """The folder of recorded cases of the reference models."""
    return _folder_from_environment("NGJAX_PARITY_DIR", "the recorded cases")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of image data sets."""
    return _folder_from_environment("NGJAX_DATA_DIR", "the image data sets")
