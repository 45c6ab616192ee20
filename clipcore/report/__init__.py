"""The page about a run, which a person looks at after it; that of results is ``clipcore.evaluate.page``.

===============  =================================================================
``collect.py``   what the page shows: curves, figures and worked examples
``page.py``      draws it, as one file with everything in it
===============  =================================================================
"""

from clipcore.report.page import (
    Line,
    PairMatrix,
    ReportData,
    RetrievalExample,
    ZeroShotExample,
    line_chart,
    render,
    smooth,
    ticks,
    write_report,
)

__all__ = [
    "Line",
    "PairMatrix",
    "ReportData",
    "RetrievalExample",
    "ZeroShotExample",
    "line_chart",
    "render",
    "smooth",
    "ticks",
    "write_report",
]
