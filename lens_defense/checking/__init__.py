"""Did it work, and what did it cost: the same questions before and after an edit, judged and counted.

In: a model, an Edit and a Suite. Out: Report.
May import: tracing, editing and all below.
"""
