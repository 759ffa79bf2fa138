"""One page of a table's scores and pictures."""
