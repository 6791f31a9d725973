"""Which checkpoints stay, and which is the best, also after a restart."""

import jax.numpy as jnp
import pytest

from vit_interact.train.checkpoint import Checkpoints
from vit_interact.train.state import TrainState, no_metrics


def state(step):
    params = {"head": jnp.full(3, float(step))}
    return TrainState(jnp.asarray(step, jnp.int32), params, (), None, no_metrics())


def test_the_best_is_kept_and_found_again_after_a_restart(tmp_path):
    accuracies = {1: 0.1, 2: 0.9, 3: None, 4: 0.3}
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step, accuracy in accuracies.items():
        checkpoints.save(state(step), {"config": {}}, accuracy)
    checkpoints.wait()
    assert checkpoints.steps() == [4, 2] and checkpoints.best_step() == 2
    checkpoints.close()

    again = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    assert again.best_step() == 2
    for step, accuracy in {5: 0.9, 6: None, 7: 0.2}.items():
        again.save(state(step), {"config": {}}, accuracy)
    again.wait()
    # The earliest of equals is the best; either may stay.
    assert again.steps()[0] == 7 and again.best_step() in (2, 5)
    again.close()


def test_without_validation_there_is_no_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"config": {}}, None)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 2] and checkpoints.best_step() is None
    loaded = checkpoints.load(2, state(0))
    assert float(loaded.params["head"][0]) == 2 and int(loaded.step) == 2
    assert "checkpoints/3" in checkpoints.newest()
    checkpoints.close()
    with pytest.raises(ValueError, match=r"config\.a: 1, now 2"):
        other = Checkpoints(tmp_path)
        other.save(state(4), {"config": {"a": 1}}, None)
        other.wait()
        other.resume(state(0), {"a": 2}, "error")
