"""The files that dvn writes: their format, their metadata, who owns which indices, and slices. Without torch."""
