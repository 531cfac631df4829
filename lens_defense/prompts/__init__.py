"""What is asked: requests with their harmful subject marked, and the tokens that a model reads.

In: text, files, hub data sets, a tokenizer. Out: Request, Prompt, the token ids of answers, corpora.
May import: storage and statistics. It never runs a model.
"""
