"""Statistics of a data set: what patches do to each other on average, in fixed memory."""

from vit_interact.survey.quantities import Design, kernel, observe, pool
from vit_interact.survey.store import load_survey, merge_surveys

__all__ = ["Design", "kernel", "load_survey", "merge_surveys", "observe", "pool"]
