"""GPT-2 three ways: plain JAX, scanned layers in Linen, low-rank adapters merged into its weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .base import Architecture, Network, linen
from .builders import plain, tokens


class Sizes(NamedTuple):
    vocabulary: int
    length: int
    width: int
    heads: int
    hidden: int
    depth: int


SMALL = Sizes(vocabulary=50257, length=1024, width=768, heads=12, hidden=3072, depth=12)
NARROW = Sizes(vocabulary=17, length=8, width=12, heads=3, hidden=10, depth=2)


def dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def layer_norm(params: Any, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Of arrays `[batch, places, heads, dimensions]`."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


# -- plain JAX ---------------------------------------------------------------------------------------------------------


def _linear(n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (n_in, n_out), "bias": (n_out,)}


def gpt2_shapes(sizes: Sizes) -> Any:
    d = sizes.width
    norm = {"scale": (d,), "bias": (d,)}
    block = {
        "ln_1": norm,
        "c_attn": _linear(d, 3 * d),
        "c_proj": _linear(d, d),
        "ln_2": norm,
        "c_fc": _linear(d, sizes.hidden),
        "c_out": _linear(sizes.hidden, d),
    }
    return {"wte": (sizes.vocabulary, d), "wpe": (sizes.length, d), "h": [block] * sizes.depth, "ln_f": norm}


def gpt2_block(params: Any, x: jax.Array, heads: int) -> jax.Array:
    fused = dense(params["c_attn"], layer_norm(params["ln_1"], x))
    q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(fused, 3, -1))
    x = x + dense(params["c_proj"], causal_attention(q, k, v).reshape(x.shape))
    hidden = jax.nn.gelu(dense(params["c_fc"], layer_norm(params["ln_2"], x)), approximate=True)
    return x + dense(params["c_out"], hidden)


def gpt2_logits(params: Any, ids: jax.Array, heads: int) -> jax.Array:
    x = params["wte"][ids] + params["wpe"][: ids.shape[1]]
    for block in params["h"]:
        x = gpt2_block(block, x, heads)
    return layer_norm(params["ln_f"], x) @ params["wte"].T


def gpt2(sizes: Sizes, batch: int, length: int) -> Network:
    ids = tokens(batch, length, sizes.vocabulary)
    return plain(lambda params, ids: gpt2_logits(params, ids, sizes.heads), gpt2_shapes(sizes), ids)


# -- scanned layers ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm(1e-5, name="ln_1")(x)
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask)
        h = nn.Dense(self.hidden, name="c_fc")(nn.LayerNorm(1e-5, name="ln_2")(x))
        return x + nn.Dense(x.shape[-1], name="c_out")(nn.gelu(h, approximate=True)), None


class ScannedGPT2(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        sizes = self.sizes
        embed = nn.Embed(sizes.vocabulary, sizes.width, name="wte")
        positions = self.param("wpe", nn.initializers.normal(0.01), (sizes.length, sizes.width))
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=sizes.depth)
        x, _ = stack(sizes.heads, sizes.hidden, name="h")(embed(ids) + positions[: ids.shape[1]], None)
        return embed.attend(nn.LayerNorm(1e-5, name="ln_f")(x))


def scanned_gpt2(sizes: Sizes, batch: int, length: int) -> Network:
    return linen(ScannedGPT2(sizes), tokens(batch, length, sizes.vocabulary))


# -- adapters ----------------------------------------------------------------------------------------------------------


def merged(params: Any) -> Any:
    """The weights of queries and values with their adapters added, as for inference."""

    def block(base: Any, adapter: Any) -> Any:
        q, v = (adapter[name]["a"] @ adapter[name]["b"] for name in "qv")
        kernel = base["c_attn"]["kernel"] + jnp.concatenate([q, jnp.zeros_like(q), v], 1)
        return base | {"c_attn": base["c_attn"] | {"kernel": kernel}}

    base = params["base"]
    return base | {"h": [block(*pair) for pair in zip(base["h"], params["adapters"], strict=True)]}


def lora_gpt2(sizes: Sizes, rank: int, batch: int, length: int) -> Network:
    adapter = {name: {"a": (sizes.width, rank), "b": (rank, sizes.width)} for name in "qv"}
    shapes = {"base": gpt2_shapes(sizes), "adapters": [adapter] * sizes.depth}
    ids = tokens(batch, length, sizes.vocabulary)
    return plain(lambda params, ids: gpt2_logits(merged(params), ids, sizes.heads), shapes, ids)


# The stream; in each of two layers three heads, four dimensions of queries and keys and four of values in each, and ten
# hidden neurons.
FREE = ((3, 1), (3, 1), (4, 3), (4, 3), (4, 3), (4, 3), (10, 1), (10, 1), (12, 1))

GPTS = (
    Architecture(
        "GPT-2",
        "plain JAX",
        lambda: gpt2(SMALL, 1, 64),
        lambda: gpt2(NARROW, 2, 8),
        FREE,
        (("wte", 0, "gather"), ("wpe", 0, "input")),
    ),
    Architecture(
        "GPT-2, scanned layers",
        "Flax Linen",
        lambda: scanned_gpt2(SMALL, 1, 64),
        lambda: scanned_gpt2(NARROW, 2, 8),
        FREE,
        (
            ("params/wte/embedding", 0, "gather"),
            ("params/wpe", 0, "input"),
            ("params/h/ln_1/scale", 0, "scan"),
            ("params/h/attention/query/kernel", 0, "scan"),
        ),
    ),
    Architecture(
        "GPT-2 with LoRA adapters, merged",
        "plain JAX",
        lambda: lora_gpt2(SMALL, 4, 1, 64),
        lambda: lora_gpt2(NARROW, 5, 2, 8),
        tuple(sorted((*FREE, *[(5, 1)] * 4))),  # and the adapters' rank, of queries and of values
        (("base/wte", 0, "gather"), ("base/wpe", 0, "input")),
    ),
)
