"""A small config with arms, for the comparison tool."""

from configs import common
from tests.train import tiny

ARMS = common.ARMS


def get_config(arm="winft"):
    config = common.with_windows(tiny.config(steps=2).unlock(), arm)
    config.winft.every = 4
    config.data.test = "test"
    return config.lock()
