"""The tool that tries other uses of indicators, on a tiny model."""

import numpy as np
import pytest

from tests.models.helpers import tiny
from tools.try_indicators import Trials, _table


@pytest.mark.slow
def test_every_trial_runs_and_keeps_its_area():
    model, params, images = tiny(batch=3)
    trials = Trials(model, params, area=0.5, removed=0.5)
    found = trials.run(images)
    kinds = {name.partition(":")[0] for name in found}
    assert kinds == {"windows", "removal"} and len(found) == 2 * 13 + 9
    whole = np.asarray(trials.plain(images))
    rows = {row["trial"]: row for row in _table(whole.argmax(-1), whole, [found])}
    assert rows["whole model"]["top1"] == rows["whole model"]["agreement"] == 1
    for name, row in rows.items():
        if name.startswith("windows"):
            assert abs(row["area"] - 0.5) < 0.15, name
            assert row["area"] == pytest.approx(rows[name.removesuffix(" (centred)")]["area"])
            assert row["kl"] >= 0
