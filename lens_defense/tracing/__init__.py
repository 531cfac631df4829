"""Where is it: from requests to a map of effects, and from a map to the sites worth editing.

In: a model and requests. Out: Trace and other site maps, Sites.
May import: patching and all below. Never editing: the two meet in `sites` alone.
"""
