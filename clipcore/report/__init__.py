"""The HTML page about a run; ``clipcore.evaluate.page`` makes the page of evaluation results.

===============  =================================================================
``collect.py``   collects the page's content: curves, figures and worked examples
``page.py``      renders it as one self-contained file
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
