"""Figures: pure functions frame -> ``plotly.graph_objects.Figure``, used alike by pages, report and command line.

Every figure has a title, axes with units, and hover texts in words; ``theme`` is "light" or "dark". Text from data
(domains, models, runs) is escaped here, because Plotly reads a subset of HTML in every label.
"""
