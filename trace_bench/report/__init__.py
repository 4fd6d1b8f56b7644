"""The report of a run, and the comparison of several, from the files of the runs alone."""

from trace_bench.report.comparison import compare
from trace_bench.report.page import write_comparison_page
from trace_bench.report.results import Results
from trace_bench.report.tables import DASH, Table, markdown, percent
from trace_bench.report.write import check_output, write_comparison, write_report, write_reports

__all__ = [
    "DASH",
    "Results",
    "Table",
    "check_output",
    "compare",
    "markdown",
    "percent",
    "write_comparison",
    "write_comparison_page",
    "write_report",
    "write_reports",
]
