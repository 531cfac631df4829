"""Change it: from sites to a planned change of MLP output matrices, and to a changed model.

In: a model, requests and sites. Out: Edit (a plan), Forecast; the Ledger applies and undoes edits.
May import: loading and all below. Never tracing: the two meet in `sites` alone.
"""
