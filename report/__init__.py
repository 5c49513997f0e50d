"""Figures and self-contained HTML pages, for the scripts only."""
