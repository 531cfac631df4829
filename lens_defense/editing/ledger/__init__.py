"""The edits that stand in a model: applied, undone, replayed, and kept in a folder."""
