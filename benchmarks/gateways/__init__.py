"""The parts of the gateway's benchmark: what stands before the upstream, what asks, and one module for each bar."""
