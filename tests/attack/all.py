"""All attacks by name."""

from __future__ import annotations

from attack.captions import Captions
from attack.costly import Costly
from attack.harness import Attack
from attack.images import Images
from attack.mutations import MutatedData, Mutations
from attack.non_finite import NonFinite
from attack.payloads import Payloads
from attack.rank_deaths import RankDeaths
from attack.saves import Saves
from attack.settings import ClassifyLines, Descriptions, PrepareLines, TrainLines
from attack.stopped_runs import Resumes, Signals
from attack.tables import Tables
from attack.tars import Tars
from attack.whole_runs import TwoWriters, WholeRuns

ATTACKS: dict[str, type[Attack]] = {
    "saves": Saves,
    "mutations": Mutations,
    "mutated data": MutatedData,
    "non-finite": NonFinite,
    "settings": TrainLines,
    "settings of classify": ClassifyLines,
    "settings of prepare": PrepareLines,
    "descriptions": Descriptions,
    "whole runs": WholeRuns,
    "two writers": TwoWriters,
    "resumes": Resumes,
    "signals": Signals,
    "rank deaths": RankDeaths,
    "images": Images,
    "costly": Costly,
    "payloads": Payloads,
    "tars": Tars,
    "captions": Captions,
    "tables": Tables,
}
