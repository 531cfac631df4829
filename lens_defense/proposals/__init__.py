"""What a request lacks, proposed by the model itself and to be looked at: its subject, other names of it.

In: a model and requests. Out: requests, names.
May import: patching, loading and all below.
"""
