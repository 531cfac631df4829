"""Change it: from sites to a planned change of MLP output matrices, and to a changed model.

In: a model, requests and sites. Out: Edit (a plan), Forecast; the Ledger applies and undoes edits.
`edit.py` is the verb. A method of `methods/` makes the change, of what `solving/` or `tuning/` prepare;
`ledger/` applies it, `export/` hands it on.
May import: loading and all below. Never tracing: the two meet in `sites` alone.
"""
