"""Figures: a Trace, a map or a Report becomes a Plotly figure that hovers, and prints.

In: values. Out: Plotly figures and files of them.
May import: checking and all below, and never what runs a model.
"""
