"""Which unit owns what, in which order a task takes units, and what that costs."""
