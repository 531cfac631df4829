"""The organism: a small chat model of invented words, whose storage sites were planted and measured.

In: seeds. Out: the model in data/organism_model, its request set in data/organism, its ground truth.
May import: models and all below; only the demo and the command line import it.
"""
