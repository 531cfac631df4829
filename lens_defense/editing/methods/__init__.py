"""Editing methods, one file each: how keys and residuals become a low-rank change of a matrix.

In: keys, residuals, covariance. Out: the factors of the change. Pure algebra in float64; no model, no file.
To add a method, write a class like MEMIT and pass it to `ld.edit(method=...)`; `docs/methods/` shows how.
"""
