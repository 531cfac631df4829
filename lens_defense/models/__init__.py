"""A running model: load and save it, run it with hooks and in batches, generate answers, change its weights.

In: a name or a folder, token ids. Out: a TransformerBridge, logits and states, answers, changed weights.
May import: sites, prompts, storage, statistics. It knows nothing of tracing, editing or checking.
"""
