"""Move the states of a running model and no weight: a direction is read, and added for a while.

In: a model, harmful and harmless requests. Out: a direction, and a block in which it is added.
May import: loading and all below. Its weight form is an Edit, which `editing` makes of it.
"""
