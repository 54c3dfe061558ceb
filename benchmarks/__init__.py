"""The benchmark suite: the same answers through a bare loop, the usual designs, and Backchannel."""
