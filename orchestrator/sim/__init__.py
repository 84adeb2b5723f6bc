"""The cluster in simulated time: the live core and the nodes' own batchers over modelled devices and links."""
