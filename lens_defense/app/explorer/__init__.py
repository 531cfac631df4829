"""The interactive instrument: one page, in a notebook, at a local address, and frozen in a report."""
