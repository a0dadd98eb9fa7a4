import jax
import numpy as np

from ngjax.metatrain.evaluation import Outcome, evaluate
from ngjax.metatrain.unroll import RunSettings, Trainer
from tests.metatrain import quadratic


def test_each_rate_meets_the_same_networks_and_the_best_one_is_found():
    # Settings of meta-training that would change the runs.
    trainer = Trainer(quadratic.TASK, quadratic.scheduled, RunSettings((3,), (7.0, 8.0), scale_spread=10.0))
    arguments = {"key": jax.random.key(0), "num_steps": 20, "num_seeds": 3}
    rates = (1e-6, 0.5, 5.0)
    outcome = evaluate(trainer, quadratic.theta(0.0), quadratic.points(), peak_rates=rates, **arguments)
    assert outcome.train_losses.shape == (3, 3, 20)
    assert outcome.test_loss.shape == outcome.test_accuracy.shape == (3, 3)
    assert outcome.best() == 1
    np.testing.assert_allclose(outcome.train_losses[0, :, 0], outcome.test_loss[0], rtol=0.5)
    assert outcome.test_loss[0].min() > 2 * outcome.test_loss[1].max()
    np.testing.assert_allclose(outcome.test_accuracy, np.exp(-outcome.test_loss), rtol=1e-5)


def test_a_rate_at_which_runs_diverge_is_not_the_best():
    losses = np.array([[3.0, np.nan], [2.0, 2.0], [np.inf, 1.0]])
    assert Outcome(np.zeros((3, 2, 1)), losses, losses).best() == 1
