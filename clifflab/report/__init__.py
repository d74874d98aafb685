"""The report: figures and one self-contained HTML page."""

from clifflab.report.page import render_page as render_page
