"""How much memory the views of an attention may take, counted in matrices [batch, dst, src]."""

DENSE_LIMIT = 4 * 2**30  # bytes that dense(), mean() and all that hold a matrix take without being told more
AT_ONCE = 4  # matrices [batch, dst, src] that mean() holds at its height
