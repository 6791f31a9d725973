"""Which checkpoints stay, and which is the best, also after a restart."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def test_what_all_devices_hold_is_copied_and_not_cut_up(tmp_path, caplog):
    """Orbax by itself compiles a slice for each device and shape, and runs one for each array."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = {"kernel": jnp.arange(32.0).reshape(8, 4), "bias": jnp.arange(8.0)}
    whole = TrainState(jnp.asarray(1, jnp.int32), params, (), None, no_metrics())
    whole = jax.device_put(whole, everywhere)
    checkpoints = Checkpoints(tmp_path)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        checkpoints.save(whole, {"config": {}}, None)
        checkpoints.wait()
    compiled = [line for line in caplog.messages if line.startswith("Compiling")]
    assert not compiled
    split = NamedSharding(mesh, PartitionSpec("data"))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim else everywhere),
        whole,
    )
    loaded = checkpoints.load(1, abstract)
    checkpoints.close()
    assert loaded.params["kernel"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, loaded, whole)
