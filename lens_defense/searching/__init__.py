"""Search: which method, layers and strength make the edit that refuses most and breaks least.

In: a model, requests and sites. Out: EditSearch, the outcomes that were measured and their front.
May import: checking, editing and all below.
"""
