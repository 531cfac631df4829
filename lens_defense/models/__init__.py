"""A running model: loading it, forward passes with hooks, batches, answers, its MLP output matrices.

In: a name or a folder, token ids. Out: a TransformerBridge, logits and states, answers, changed weights.
May import: sites, prompts, storage, statistics. It knows nothing of tracing, editing or checking.
"""
