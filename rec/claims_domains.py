"""The studies of Pinterest's MTMD: one model of all domains against a model each."""

from rec.arms import Study

STUDIES: dict[str, Study] = {}
