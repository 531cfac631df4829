"""A model in and out: from a name, a folder, a file or a model in hand to a TransformerBridge; to a folder.

In: what people bring. Out: a model that computes what transformers computes, or one sentence; a saved folder.
May import: models and all below.
"""
