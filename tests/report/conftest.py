"""The finished chain, for all tests of the report."""

from report.test_report import results as results
