"""The whole cluster in simulated time: every process as it is, over a simulated clock, network and devices."""
