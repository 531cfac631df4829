"""A running model: run it with hooks and in batches, generate answers, change its weights and put them back.

In: a TransformerBridge, token ids. Out: logits and states, answers, fingerprints, changed weights.
May import: sites, prompts, storage, statistics. It knows nothing of tracing, editing or checking.
"""
