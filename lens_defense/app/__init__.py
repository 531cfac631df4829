"""For people: the command line, the demo, the explorer in Jupyter, the report page.

In: what a user types or clicks. Out: tables, pages, figures.
May import: everything.
"""
