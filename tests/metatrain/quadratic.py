"""An optimizee with two parameters, and optimizers with one or two meta-parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngjax.metatrain.networks import MLP
from ngjax.metatrain.tasks import Batch, Task, TaskData

CURVATURE = jnp.array([1.0, 4.0])


@dataclasses.dataclass(frozen=True)
class Quadratic(Task):
    def init(self, key):
        return {"p": jax.random.normal(key, (2,)) + 2}

    def loss(self, params, batch):
        return 0.5 * jnp.mean(CURVATURE * (params["p"] - batch.inputs) ** 2) + 0.1

    def accuracy(self, params, batch):
        return jnp.exp(-self.loss(params, batch))

    def spec(self):
        return None  # no graph


TASK = Quadratic("quadratic", "points", MLP((1, 1), "relu"), batch_size=4)


def points(seed=0):
    rng = np.random.default_rng(seed)
    split = Batch(jnp.asarray(0.3 * rng.normal(size=(32, 2)).astype(np.float32)), jnp.zeros(32, jnp.int32))
    return TaskData(split, split)


def momentum(theta, task, learning_rate):
    """Heavy ball with a learned rate and decay; the run's own learning rate plays no part."""
    del task, learning_rate
    return optax.sgd(jnp.exp(theta["log_rate"]), momentum=jax.nn.sigmoid(theta["decay"]))


def scheduled(theta, task, learning_rate):
    """Gradient descent whose rate is the run's, times a learned factor."""
    del task
    return optax.sgd(lambda count: jnp.exp(theta["log_rate"]) * learning_rate(count))


def theta(log_rate=-2.0, decay=0.0):
    return {"log_rate": jnp.float32(log_rate), "decay": jnp.float32(decay)}
