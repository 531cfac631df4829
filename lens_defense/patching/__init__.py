"""The runs of a trace: clean, corrupted, and with single states patched, measured exactly or by one gradient.

In: a prompt with its answer, a corruption, cells to patch, metrics. Out: the metrics of every patched run.
May import: models and all below. It knows nothing of maps and sites' choice, which `tracing` makes of it.
"""
