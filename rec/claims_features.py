"""The studies of Taobao's and AppS's rankers: which ways of using features are compared."""

from rec.arms import Study

STUDIES: dict[str, Study] = {}
