"""Pure torch: features, teacher weights, matching, the network, pre-processing."""
